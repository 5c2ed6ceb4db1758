import numpy as np
import pytest

from curation.neighbors.rows.routers import HashRouter, IdRouter


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (2000, 16), np.uint8)
    vectors = rng.normal(size=(2000, 8)).astype(np.float16)
    vectors[1000:1500] = vectors[:500]
    return ids, vectors


@pytest.mark.parametrize("num_lists", [1, 7, 256])
def test_id_router__homes_ascend_with_ids_and_are_equally_large(rows, num_lists):
    ids, vectors = rows
    homes = IdRouter(num_lists).route(ids, vectors, None).home
    order = sorted(range(2000), key=lambda row: ids[row].tobytes())
    assert (np.diff(homes[order]) >= 0).all()
    wanted = [int.from_bytes(row[:4].tobytes(), "big") * num_lists >> 32 for row in ids]
    assert homes.tolist() == wanted


@pytest.mark.parametrize("num_lists", [1, 7, 64])
def test_hash_router__identical_rows_share_a_home_and_others_scatter(rows, num_lists):
    ids, vectors = rows
    routes = HashRouter(num_lists).route(ids, vectors, None)
    assert (routes.home[1000:1500] == routes.home[:500]).all()
    counts = np.bincount(routes.home, minlength=num_lists)
    assert len(counts) == num_lists
    assert counts.min() > 0.4 * 2000 / num_lists
    assert len(routes.probes) == 0
