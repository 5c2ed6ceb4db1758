import numpy as np
import pytest

from curation.neighbors.kernels.quantized import quantize_rows
from curation.neighbors.kernels.sketches import WIDTH, least_cosine, least_product, sketches_of


def pairs_at(cosine, count=1500, width=2048, seed=0):
    """Rows in pairs of a cosine, as 8-bit integers."""
    rng = np.random.default_rng(seed)
    left, other = rng.normal(size=(2, count, width))
    left /= np.linalg.norm(left, axis=1)[:, None]
    other -= (other * left).sum(axis=1)[:, None] * left
    other /= np.linalg.norm(other, axis=1)[:, None]
    right = cosine * left + np.sqrt(1 - cosine**2) * other
    return quantize_rows(left), quantize_rows(right)


@pytest.mark.parametrize("cosine", [0.5, 0.8, 0.95])
def test_sketches_of__cosines_are_those_of_the_rows_within_the_stated_deviation(cosine):
    left, right = (sketches_of(side).astype(np.float64) for side in pairs_at(cosine))
    found = (left * right).sum(axis=1)
    found /= np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    assert abs(found.mean() - cosine) < 0.01
    assert found.std() == pytest.approx((1 - cosine**2) / np.sqrt(WIDTH), rel=0.15)
    assert (found >= least_cosine(cosine)).mean() > 0.99


def test_sketches_of__products_of_alike_rows_reach_the_least_product():
    left, right = (sketches_of(side).astype(np.int64) for side in pairs_at(0.9))
    assert ((left * right).sum(axis=1) >= least_product(0.9)).mean() > 0.99
    unlike = (left * np.roll(right, 1, axis=0)).sum(axis=1)
    assert (unlike >= least_product(0.9)).mean() < 0.001


@pytest.mark.parametrize("rows", [0, 1, 9000])
def test_sketches_of__threads_and_blocks_change_nothing(rows):
    some = pairs_at(0.5, 9000, 64)[0][:rows]
    found = sketches_of(some, threads=2)
    assert found.shape == (rows, WIDTH)
    np.testing.assert_array_equal(found[-3:], sketches_of(some[-3:]))
