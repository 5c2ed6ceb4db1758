import numpy as np
import pytest

from curation.neighbors.index.vector_index import Comparison, VectorIndex
from curation.neighbors.retrieval.hit_files import HitFiles
from curation.neighbors.retrieval.sample_rule import SampleRule
from curation.neighbors.retrieval.seed_rule import SeedRule
from pipelines.engines.local_engine import LocalEngine
from tests.curation.neighbors.conftest import ids_of, vectors_of


@pytest.fixture
def sampled(arranged, pool_like, tmp_path):
    def run(vectors, seed_vectors, k, on_collision="keep"):
        rows = arranged(vectors)
        seeds = arranged(seed_vectors, "seeds", queries_of=rows)
        rule = SeedRule(set="s", rule="sample", k=k)
        hits = HitFiles.planned([rule], [seeds], rows, pool_like, str(tmp_path / "hits"))
        index = VectorIndex(rows, Comparison(method="all"), 0)
        one = SampleRule(index, seeds, k, on_collision, str(tmp_path / "search"))
        figures = one.run(hits.writer(0), LocalEngine())
        return rows, seeds, hits.by_batch.read(0, hits.num_items), figures

    return run


def found_by(hits):
    """(seed, rank, image) of every hit."""
    return {(one["seed"], one["rank"], one["id"]) for one in hits.to_pylist()}


def test_sample_rule__the_k_nearest_of_every_seed(sampled):
    rng = np.random.default_rng(0)
    rows, seeds, hits, figures = sampled(rng.normal(size=(200, 12)), rng.normal(size=(90, 12)), 5)
    ids, seed_ids = ids_of(rows), ids_of(seeds)
    best = np.argsort(-(vectors_of(seeds) @ vectors_of(rows).T), axis=1)[:, :5]
    assert found_by(hits) == {
        (bytes(seed_ids[seed]), rank + 1, bytes(ids[row]))
        for seed in range(90)
        for rank, row in enumerate(best[seed])
    }
    assert (figures["seeds"], figures["hits"], figures["shortfall"]) == (90, 450, 0)


def test_sample_rule__next_gives_each_image_once_closest_pairs_first(sampled):
    rng = np.random.default_rng(1)
    rows, seeds, hits, figures = sampled(
        rng.normal(size=(60, 6)), rng.normal(size=(10, 6)), 3, "next"
    )
    scores = (vectors_of(seeds) @ vectors_of(rows).T).astype(np.float32)
    candidates = np.argsort(-scores, axis=1)[:, :16]  # 4 k + 4 of each seed
    pairs = sorted((-scores[s, row], s, row) for s in range(10) for row in candidates[s])
    taken, given = set(), {seed: [] for seed in range(10)}
    for _, seed, row in pairs:
        if row not in taken and len(given[seed]) < 3:
            taken.add(row)
            given[seed].append(row)
    ids, seed_ids = ids_of(rows), ids_of(seeds)
    assert found_by(hits) == {
        (bytes(seed_ids[seed]), rank + 1, bytes(ids[row]))
        for seed, mine in given.items()
        for rank, row in enumerate(mine)
    }
    assert figures["shortfall"] == 30 - sum(map(len, given.values()))
