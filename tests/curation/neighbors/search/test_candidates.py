import numpy as np
import pytest

from curation.neighbors.kernels.products import FLOAT32, Products
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.search import candidates
from curation.neighbors.search.candidates import QueryHits, nearest_in, sort_keys


def made(seed, count, queries=20):
    rng = np.random.default_rng(seed)
    owners = rng.integers(0, queries, count)
    return QueryHits(owners, rng.permutation(count), rng.normal(size=count).astype(np.float32))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("tile", [64, 1 << 13])
def test_nearest_in__holds_the_k_nearest_of_all(monkeypatch, tile, precision):
    monkeypatch.setattr(candidates, "_TILE", tile)
    rng, products = np.random.default_rng(0), Products(precision)
    queries, rows = (rng.normal(size=(n, 24)).astype(np.float32) for n in (30, 500))
    found = nearest_in(products, products.prepare(queries), products.prepare(rows), 7)
    given = set(zip(found.queries.tolist(), found.positions.tolist(), strict=True))
    scores = FLOAT32.prepare(queries) @ FLOAT32.prepare(rows).T
    wanted = np.argsort(-scores, axis=1)[:, :7]
    assert {(query, int(row)) for query in range(30) for row in wanted[query]} <= given
    assert len(given) < 30 * 40  # and few besides
    errors = scores[found.queries, found.positions] - found.scores
    assert np.abs(errors).max() <= products.band(24)


def test_nearest_in__what_lies_below_a_known_floor_is_left_out():
    rng = np.random.default_rng(1)
    queries, rows = (FLOAT32.prepare(rng.normal(size=(n, 8))) for n in (5, 200))
    scores = queries @ rows.T
    floor = np.sort(scores, axis=1)[:, -3].astype(np.float32)
    found = nearest_in(FLOAT32, queries, rows, 10, floor)
    assert np.bincount(found.queries, minlength=5).tolist() == [3] * 5


@pytest.mark.parametrize("k", [1, 4, 30])
def test_possible__is_what_may_be_among_the_k_nearest(k):
    hits, band = made(2, 400), 0.05
    expected = set()
    for query in range(20):
        mine = np.flatnonzero(hits.queries == query)
        scores = np.sort(hits.scores[mine])[::-1]
        floor = scores[k - 1] - np.float32(2 * band) if len(mine) >= k else -np.inf
        expected |= set(hits.positions[mine[hits.scores[mine] >= floor]].tolist())
    found = hits.possible(k, band)
    assert set(found.positions.tolist()) == expected
    assert (np.diff(found.queries) >= 0).all()
    same = np.diff(found.queries) == 0
    assert (np.diff(found.scores)[same] <= 0).all()


def test_kth__of_queries_with_k_hits():
    hits = made(3, 200)
    queries, scores = hits.nearest_first().kth(10)
    counts = np.bincount(hits.queries, minlength=20)
    assert queries.tolist() == np.flatnonzero(counts >= 10).tolist()
    for query, score in zip(queries, scores, strict=True):
        assert score == np.sort(hits.scores[hits.queries == query])[-10]


def test_read__gives_the_hits_of_one_partition(tmp_path):
    hits, path = made(4, 300), str(tmp_path / "hits.bin")
    queries = RowFiles("", 8, "float16", (0, 5, 5, 20), (0, 1, 2, 3))
    hits.write(path, queries)
    for partition, (start, stop) in enumerate([(0, 5), (5, 5), (5, 20)]):
        found = QueryHits.read(path, partition)
        mine = (hits.queries >= start) & (hits.queries < stop)
        assert sorted(found.positions) == sorted(hits.positions[mine])
        for query in range(start, stop):
            one = found.between(query, query + 1)
            assert sorted(one.scores) == sorted(hits.scores[hits.queries == query])


def test_sort_keys__by_query_then_by_falling_score():
    queries = np.array([1, 0, 1, 0, 1, 0])
    scores = np.array([-0.5, 0.25, 0.75, -0.0, 1.0, -1.0], np.float32)
    assert np.argsort(sort_keys(queries, scores)).tolist() == [1, 3, 5, 4, 2, 0]
