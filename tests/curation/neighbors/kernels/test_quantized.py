import numpy as np
import pytest

from curation.neighbors.kernels import quantized
from curation.neighbors.kernels.quantized import (
    integer_products,
    largest_of,
    lengths_of,
    nearest_centroids,
    pair_products,
    quantize_centroids,
    quantize_rows,
)


def integers(seed, *shape):
    return np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8)


@pytest.mark.parametrize("has_instructions", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (31, 1040), (40, 1048), (200, 2048)])
def test_integer_products__are_exact(monkeypatch, rows, width, has_instructions):
    if not has_instructions:
        monkeypatch.setattr(quantized, "multiplies", lambda _: False)
    left, right = integers(0, rows, width), integers(1, 24, width)
    left[0], right[0] = -127, 127  # the largest sum
    found = integer_products(left, right)
    np.testing.assert_array_equal(found.numpy(), left.astype(np.int64) @ right.T.astype(np.int64))


@pytest.mark.parametrize("rows", [0, 1, 50, 5000])
def test_nearest_centroids__are_those_of_brute_force_and_of_equals_the_first(rows):
    vectors, centroids = integers(2, rows, 32), integers(3, 60, 32)
    centroids[40:] = centroids[:20]
    wanted = (vectors.astype(np.int64) @ centroids.T.astype(np.int64)).argmax(axis=1)
    np.testing.assert_array_equal(nearest_centroids(vectors, centroids), wanted)


def test_quantize_rows__each_by_its_own_largest_number():
    rows = np.array([[1, -2, 0.5], [100, 50, -25]], np.float32)
    assert quantize_rows(rows).tolist() == [[64, -127, 32], [127, 64, -32]]


def test_quantize_centroids__all_by_the_largest_of_all():
    rows = np.array([[1, -2, 0.5], [4, 2, -1]], np.float32)
    assert quantize_centroids(rows).tolist() == [[32, -64, 16], [127, 64, -32]]
    assert largest_of(-rows) == 4


def test_lengths_and_pair_products__are_those_of_plain_sums():
    rows, others = integers(4, 9000, 20), integers(5, 50, 20)
    who, which = np.arange(9000), np.arange(9000) % 50
    wide = rows.astype(np.int64)
    np.testing.assert_allclose(lengths_of(rows), np.linalg.norm(wide, axis=1), rtol=1e-15)
    wanted = (wide * others[which]).sum(axis=1)
    np.testing.assert_array_equal(pair_products(rows, who, others, which), wanted)
