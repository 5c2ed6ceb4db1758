import numpy as np

from curation.neighbors.join.pairs import Candidates, PairCollector
from curation.neighbors.kernels.identical import first_among, first_identical
from curation.neighbors.kernels.products import Products
from curation.neighbors.kernels.quantized import integer_products, nearest_centroids


def test_pair_collector__rounding_never_decides():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    exact = (rows.astype(np.float64) @ rows.T.astype(np.float64)).astype(np.float32)
    a, b = np.nonzero(np.triu(exact > 0.3, 1))
    noisy = exact[a, b] + rng.uniform(-0.05, 0.05, len(a)).astype(np.float32)
    collector = PairCollector(200, 0.4, rows.__getitem__)
    near = noisy > collector.bound(0.05)
    collector.add(a[near], b[near], noisy[near], 0.05)
    collector.edges()
    assert collector.num_pairs == np.triu(exact > 0.4, 1).sum()
    found = collector.candidates()
    np.fill_diagonal(exact, -1)
    best = exact.argmax(axis=1)
    for row in np.flatnonzero((exact > 0.4).any(axis=1)):
        assert best[row] in found.twins[found.rows == row]


def test_candidates__possible_keeps_what_may_be_the_best():
    found = Candidates(
        np.array([7, 7, 7, 9]),
        np.array([1, 2, 3, 4]),
        np.array([0.9, 0.85, 0.5, 0.1], np.float32),
        np.full(4, 0.03, np.float32),
    ).possible_of_any()
    assert found.twins.tolist() == [1, 2, 4]


def test_products__error_stays_within_the_band():
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(400, 512)).astype(np.float16)
    raw[:200] = raw[200:] + rng.normal(size=(200, 512)).astype(np.float16) * np.float16(0.3)
    unit = raw.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for products in (Products(), Products("bfloat16")):
        prepared = products.prepare(raw)
        rows, columns, scores = products.above(prepared, prepared, -2)
        assert len(scores) == 400 * 400
        error = np.abs(scores - (unit @ unit.T)[rows, columns]).max()
        assert error <= products.band(512)
        a, b, _ = products.above(prepared, prepared, 0.5 - products.band(512))
        assert set(zip(*np.nonzero(unit @ unit.T > 0.5), strict=True)) <= set(
            zip(a, b, strict=True)
        )


def test_integer_products__are_exact_for_any_number_of_rows():
    rng = np.random.default_rng(0)
    rows = rng.integers(-127, 128, (70, 512)).astype(np.int8)
    centroids = rng.integers(-127, 128, (33, 512)).astype(np.int8)
    expected = rows.astype(np.int64) @ centroids.T.astype(np.int64)
    for count in (1, 5, 70):
        assert (integer_products(rows[:count], centroids).numpy() == expected[:count]).all()
    assert (nearest_centroids(rows, centroids) == expected.argmax(axis=1)).all()


def test_first_identical__groups_equal_rows():
    rows = np.array([[1, 2], [3, 4], [1, 2], [1, 2], [3, 5]], np.float16)
    first = first_identical(rows)
    assert first.tolist() == [0, 1, 0, 0, 4]
    active = np.array([False, True, True, True, True])
    assert first_among(first, active).tolist() == [-1, 1, 2, 2, 4]
