import numpy as np

from curation.neighbors.search.search import Search, search_exhaustively
from pipelines.engines.local_engine import LocalEngine
from tests.curation.neighbors.conftest import ids_of, vectors_of

WIDTH = 16


def found_by(rows, seeds, k, folder):
    search = Search(rows, seeds, k, str(folder))
    search_exhaustively(search, LocalEngine())
    parts = [search.nearest(partition) for partition in range(seeds.num_partitions)]
    return tuple(np.concatenate(side) for side in zip(*parts, strict=True))


def by_brute_force(rows, seeds, k):
    """Positions and cosines, of equals the smallest id first."""
    scores = (vectors_of(seeds) @ vectors_of(rows).T).astype(np.float32)
    ids = [bytes(one) for one in ids_of(rows)]
    order = [sorted(range(len(ids)), key=lambda row: (-line[row], ids[row])) for line in scores]
    best = np.array(order)[:, :k]
    return best, np.take_along_axis(scores, best, axis=1)


def test_search_exhaustively__equals_brute_force(arranged, tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, WIDTH))
    vectors[40:60] = vectors[20:40]  # equal rows: the smaller id comes first
    rows = arranged(vectors)
    seeds = arranged(
        np.concatenate([rng.normal(size=(80, WIDTH)), vectors[20:60]]), "seeds", queries_of=rows
    )
    assert min(rows.num_partitions, seeds.num_partitions) > 1
    positions, cosines = found_by(rows, seeds, 9, tmp_path / "search")
    expected, scores = by_brute_force(rows, seeds, 9)
    assert (positions == expected).all()
    assert (cosines == scores).all()


def test_search_exhaustively__a_crowd_of_equals_is_thinned_out(arranged, tmp_path):
    rows = arranged(np.ones((700, WIDTH)))
    seeds = arranged(np.ones((2, WIDTH)), "seeds", queries_of=rows)
    positions, _ = found_by(rows, seeds, 3, tmp_path / "search")
    ids = ids_of(rows)
    assert [bytes(ids[row]) for row in positions[0]] == sorted(map(bytes, ids))[:3]


def test_search_exhaustively__fewer_rows_than_k(arranged, tmp_path):
    rng = np.random.default_rng(1)
    rows = arranged(rng.normal(size=(4, WIDTH)))
    seeds = arranged(rng.normal(size=(3, WIDTH)), "seeds", queries_of=rows)
    positions, cosines = found_by(rows, seeds, 6, tmp_path / "search")
    assert (positions[:, 4:] == -1).all()
    assert np.isnan(cosines[:, 4:]).all()
    assert (np.sort(positions[:, :4]) == np.arange(4)).all()
