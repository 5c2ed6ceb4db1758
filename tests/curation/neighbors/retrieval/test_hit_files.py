import numpy as np
import pytest

from curation.dataset import Dataset
from curation.neighbors.retrieval.hit_files import HitFiles, best_hits, write_hits
from curation.neighbors.retrieval.seed_rule import SeedRule
from pipelines.engines.local_engine import LocalEngine
from tests.curation.neighbors.conftest import ids_of

RULES = (SeedRule(set="z", rule="sample", k=9), SeedRule(set="a", rule="cluster", cap=90))


@pytest.fixture
def written(arranged, pool_like, tmp_path):
    """Hits of two sets, and what was written."""
    rng = np.random.default_rng(0)
    rows = arranged(rng.normal(size=(80, 8)))
    seeds = arranged(rng.normal(size=(30, 8)), "seeds", queries_of=rows)
    hits = HitFiles.planned(RULES, [seeds, seeds], rows, pool_like, str(tmp_path / "hits"))
    positions, ids = rng.integers(0, 80, (2, 60)), ids_of(rows)
    similarities = rng.integers(0, 4, (2, 60)) / 4
    ranks, numbers = rng.integers(1, 9, (2, 60)), rng.integers(0, 30, (2, 60))
    seed_ids = ids_of(seeds)[numbers[0]]
    hits.writer(0).write(0, positions[0], ranks[0], similarities[0], seeds=seed_ids)
    hits.writer(1).write(0, positions[1], ranks[1], similarities[1], clusters=numbers[1])
    sample = zip(positions[0], ranks[0], similarities[0], seed_ids, strict=True)
    cluster = zip(positions[1], ranks[1], similarities[1], numbers[1], strict=True)
    expected = [
        *((bytes(ids[p]).hex(), "z", bytes(s).hex(), int(r), x, None) for p, r, x, s in sample),
        *((bytes(ids[p]).hex(), "a", None, int(r), x, int(c)) for p, r, x, c in cluster),
    ]
    return rows, hits, expected


def test_write_hits__by_id_then_set_then_seed_then_rank(written, tmp_path):
    _, hits, expected = written
    folder = str(tmp_path / "out")
    write_hits(hits, folder, LocalEngine(), {"stage": "retrieve"})
    names = ("id", "seed_set", "seed_id", "rank", "similarity", "cluster")
    found = [tuple(one[name] for name in names) for one in Dataset.open(folder).read().to_pylist()]
    key = [(one[0], one[1], one[2] or "", one[3]) for one in found]
    assert key == sorted(key)
    assert sorted(found, key=repr) == sorted(expected, key=repr)


def test_best_hits__sample_first_then_the_nearest_then_the_smallest_seed(written):
    _, hits, expected = written
    best = best_hits(hits.by_batch.read(0, hits.num_items))
    found = {one["id"].hex(): one for one in best.to_pylist()}
    assert len(found) == best.num_rows == len({one[0] for one in expected})
    for row_id, one in found.items():
        mine = [hit for hit in expected if hit[0] == row_id]
        first = min(mine, key=lambda hit: (hit[1] == "a", -hit[4], hit[2] or ""))
        assert one["similarity"] == first[4]
        assert one["seed"].hex() == (first[2] or "0" * 32)


def test_write_none__no_hits_at_all(arranged, pool_like, tmp_path):
    rows = arranged(np.ones((1, 8)))
    hits = HitFiles.planned(RULES, [rows, rows], rows, pool_like, str(tmp_path / "hits"))
    hits.write_none()
    write_hits(hits, str(tmp_path / "out"), LocalEngine(), {})
    assert Dataset.open(str(tmp_path / "out")).num_rows == 0
