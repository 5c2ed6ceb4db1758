import numpy as np
import pytest

from curation.neighbors.kernels.id_hashes import hash_ids, share_bound


def test_hash_ids__depends_on_the_salt_and_looks_uniform():
    ids = np.random.default_rng(0).integers(0, 256, (4000, 16), np.uint8)
    first, second = hash_ids(ids, "a", 1), hash_ids(ids, "a", 2)
    assert (first != second).all()
    assert np.histogram(first / 2.0**64, 10, (0, 1))[0] == pytest.approx([400] * 10, rel=0.2)


def test_share_bound__a_share_of_the_hashes_lies_below_it():
    hashes = hash_ids(np.random.default_rng(1).integers(0, 256, (5000, 16), np.uint8), "b")
    bounds = share_bound(np.array([0.0, 0.2, 0.9, 1.0, 3.0]))
    shares = [float((hashes <= bound).mean()) for bound in bounds]
    assert shares == pytest.approx([0, 0.2, 0.9, 1, 1], abs=0.02)
