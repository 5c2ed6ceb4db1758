import numpy as np
import pytest

from curation.neighbors.kernels.products import FLOAT32, Products

KINDS = [FLOAT32, Products("bfloat16")]


@pytest.fixture(params=KINDS, ids=lambda one: one.precision)
def products(request):
    return request.param


@pytest.fixture
def sides():
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=(n, 48)) * 10 ** rng.uniform(-2, 2, (n, 1)) for n in (70, 300))
    right[:40] = left[:40] + 0.1 * np.abs(left[:40]).mean(axis=1, keepdims=True)
    return left.astype(np.float32), right.astype(np.float32)


def cosines(left, right):
    left, right = (
        np.float64(one) / np.linalg.norm(np.float64(one), axis=1)[:, None] for one in (left, right)
    )
    return left @ right.T


def as_array(scores):
    return scores if isinstance(scores, np.ndarray) else scores.float().numpy()


def prepared(products, sides):
    return [products.prepare(one) for one in sides]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_scores__err_by_no_more_than_the_band(products, sides, dtype):
    left, right = (one.astype(dtype) for one in sides)
    scores = as_array(products.scores(products.prepare(left), products.prepare(right)))
    assert scores.shape == (70, 300)
    assert np.abs(scores - cosines(left, right)).max() <= products.band(48)


@pytest.mark.parametrize("bound", [0.9, 0.2, 0.0, -0.3])
def test_above__gives_all_pairs_above_a_bound_with_their_scores(products, sides, bound):
    left, right = prepared(products, sides)
    wanted, band = cosines(*sides), products.band(48)
    rows, columns, scores = products.above(left, right, bound - band)
    found = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert found >= {tuple(pair) for pair in np.argwhere(wanted > bound).tolist()}
    assert all(wanted[pair] > bound - 4 * band for pair in found)
    assert np.abs(scores - wanted[rows, columns]).max(initial=0) <= band


def test_above__takes_a_bound_for_each_row(products, sides):
    left, right = prepared(products, sides)
    bounds = np.linspace(0.1, 0.9, 70, dtype=np.float32)
    rows, _, scores = products.above(left, right, bounds)
    assert (scores > bounds[rows] - 2 * products.band(48)).all()
    sure = cosines(*sides) > bounds[:, None] + 2 * products.band(48)
    assert len(rows) >= sure.sum()


@pytest.mark.parametrize("k", [1, 4, 300])
def test_highest__are_those_of_a_sort(products, sides, k):
    left, right = prepared(products, sides)
    scores = products.scores(left, right)
    wanted = np.sort(as_array(scores), axis=1)[:, ::-1][:, :k]
    np.testing.assert_array_equal(np.sort(products.highest(scores, k))[:, ::-1], wanted)
    reached = products.kth_highest(scores, k)
    assert (reached <= wanted[:, -1]).all()
    assert ((as_array(scores) >= reached[:, None]).sum(axis=1) >= k).all()


def test_rows__are_some_of_the_prepared(products, sides):
    left, right = prepared(products, sides)
    some = np.array([3, 3, 60])
    np.testing.assert_allclose(
        as_array(products.scores(products.rows(left, some), right)),
        as_array(products.scores(left, right))[some],
        atol=products.band(48),
    )
