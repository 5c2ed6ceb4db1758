import subprocess
import sys

import numpy as np
import pytest

from curation.neighbors.rows.column_file import write_columns
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.search.matching import Matching
from curation.neighbors.search.search import Search
from pipelines.engines.local_engine import LocalEngine


def searched(folder, positions, similarities, bounds, num_rows):
    """A search whose results are given: (Q, K) each; bounds: where partitions of seeds begin."""
    rows = RowFiles(str(folder), 8, "float16", (0, num_rows), (0, 1))
    queries = RowFiles(str(folder), 8, "float16", tuple(bounds), tuple(range(len(bounds))))
    search = Search(rows, queries, positions.shape[1], str(folder))
    for number, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        columns = {"positions": positions[start:stop], "similarities": similarities[start:stop]}
        write_columns(search.nearest_path(number), columns)
    return search


def one_by_one(positions, scores, k):
    """Which pairs are given, and how many requests met a taken image."""
    taken, given, collisions = set(), np.zeros(positions.shape, bool), 0
    pairs = sorted((-scores[q, j], q, j) for q, j in np.ndindex(*positions.shape))
    for _, q, j in pairs:
        if positions[q, j] < 0 or given[q].sum() == k:
            continue
        if positions[q, j] in taken:
            collisions += 1
            continue
        taken.add(positions[q, j])
        given[q, j] = True
    return given, collisions


@pytest.mark.parametrize("seed", range(8))
def test_matching__equals_serving_pairs_one_by_one(tmp_path, monkeypatch, seed):
    monkeypatch.setattr("curation.neighbors.search.matching._FEWEST_OF_A_RUN", 3)
    monkeypatch.setattr("curation.neighbors.search.matching._SERVED_AT_ONCE", 5)
    rng = np.random.default_rng(seed)
    positions = np.stack([rng.permutation(60)[:12] for _ in range(30)])
    scores = -np.sort(-rng.integers(0, 1 + 3 * seed, (30, 12)).astype(np.float32), axis=1)
    positions[rng.random(30) < 0.2, 9:] = -1  # fewer neighbors than asked for
    bounds = [0, 7, 7, 20, 30]
    search = searched(tmp_path, positions, scores, bounds, 60)
    matching = Matching(search, 3, pairs_held=1 + seed, pairs_per_file=10)
    expected, collisions = one_by_one(positions, scores, 3)
    assert matching.run(LocalEngine()) == {"collisions": collisions}
    assert (np.concatenate([matching.chosen(p) for p in range(4)]) == expected).all()


def test_matching__all_pairs_alike_and_none_at_all(tmp_path):
    positions = np.tile(np.arange(9), (5, 1))
    search = searched(tmp_path / "a", positions, np.ones((5, 9), np.float32), [0, 2, 5], 9)
    matching = Matching(search, 2)
    assert matching.run(LocalEngine())["collisions"] == 2 + 4 + 6 + 8 + 0
    chosen = np.concatenate([matching.chosen(p) for p in range(2)])
    assert chosen.sum(axis=1).tolist() == [2, 2, 2, 2, 1]
    nothing = searched(
        tmp_path / "b", -np.ones((3, 2), np.int64), np.zeros((3, 2), "f4"), [0, 3], 9
    )
    none = Matching(nothing, 2)
    assert none.run(LocalEngine()) == {"collisions": 0}
    assert not none.chosen(0).any()


def test_matching__damaged_runs_are_made_again(tmp_path):
    rng = np.random.default_rng(0)
    positions = np.stack([rng.permutation(40)[:8] for _ in range(20)])
    scores = -np.sort(-rng.random((20, 8)).astype(np.float32), axis=1)
    matching = Matching(searched(tmp_path, positions, scores, [0, 10, 20], 40), 2)
    matching.run(LocalEngine())
    expected = [matching.chosen(p) for p in range(2)]
    for path in (tmp_path / "matched").glob("*.bin"):
        path.write_bytes(path.read_bytes()[:-1])
    matching.run(LocalEngine())
    assert all((matching.chosen(p) == expected[p]).all() for p in range(2))


def test_matching__memory_does_not_grow_with_the_pairs(tmp_path):
    """Holding all 4 million pairs took 207 MiB; merging them takes 43, and 57 for 24 million."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(sys.path[0])!r})
import numpy as np
from curation.neighbors.search.matching import Matching
from curation.neighbors.rows.column_file import write_columns
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.search.search import Search
from pipelines.engines.local_engine import LocalEngine

seeds, k, parts, num_rows = 1000, 100, 40, 1_000_000
bounds = tuple(range(0, seeds * parts + 1, seeds))
rows = RowFiles("{tmp_path}", 8, "float16", (0, num_rows), (0, 1))
queries = RowFiles("{tmp_path}", 8, "float16", bounds, tuple(range(parts + 1)))
search = Search(rows, queries, k, "{tmp_path}")
rng = np.random.default_rng(0)
for part in range(parts):
    scores = -np.sort(-rng.random((seeds, k)).astype(np.float32), axis=1)
    columns = {{"positions": rng.integers(0, num_rows, (seeds, k)), "similarities": scores}}
    write_columns(search.nearest_path(part), columns)
matching = Matching(search, 8)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
matching.run(LocalEngine())
print(peak() - before, sum(int(matching.chosen(p).sum()) for p in range(parts)))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    grown, given = map(int, result.stdout.split())
    assert given > 300_000
    assert grown < 100 << 20
