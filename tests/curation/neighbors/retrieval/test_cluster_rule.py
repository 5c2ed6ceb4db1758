import numpy as np

from curation.neighbors.clusters.centroids import Centroids
from curation.neighbors.kernels.id_hashes import hash_ids
from curation.neighbors.retrieval import hit_files
from curation.neighbors.retrieval.cluster_rule import ClusterRule
from curation.neighbors.retrieval.hit_files import HitFiles
from curation.neighbors.retrieval.seed_rule import SeedRule
from pipelines.engines.local_engine import LocalEngine
from tests.curation.neighbors.conftest import ids_of, vectors_of


def around(labels, seed):
    return np.eye(6, 12)[labels] + 0.05 * np.random.default_rng(seed).normal(size=(len(labels), 12))


def test_cluster_rule__draws_the_smallest_hashes_of_seeded_clusters_then_caps(
    arranged, pool_like, tmp_path, monkeypatch
):
    monkeypatch.setattr(hit_files, "_ROWS_PER_BUCKET", 100)  # clusters in several buckets
    rows = arranged(around(np.random.default_rng(0).integers(0, 6, 300), 1))
    seeds = arranged(around(np.repeat(np.arange(4), [5, 2, 9, 4]), 2), "seeds", queries_of=rows)
    rule = SeedRule(set="s", rule="cluster", per_cluster=20, min_hits=4, cap=45)
    hits = HitFiles.planned([rule], [seeds], rows, pool_like, str(tmp_path / "hits"))
    assert hits.num_buckets > 1
    centroids = Centroids.written(str(tmp_path / "centroids.bin"), np.eye(6, 12, dtype=np.float32))
    draw = ClusterRule(rows, centroids, {0: rule}, 7, str(tmp_path / "draw"))
    figures = draw.run({0: seeds}, hits, LocalEngine())

    owners, ids = vectors_of(rows).argmax(axis=1), ids_of(rows)
    drawn, caps = hash_ids(ids, "draw", "s", 7), hash_ids(ids, "cap", "s", 7)
    ranks = {}
    for cluster in (0, 2, 3):  # cluster 1 holds two seeds, where four are asked for
        mine = sorted(np.flatnonzero(owners == cluster), key=lambda row: drawn[row])[:20]
        ranks |= {row: (cluster, rank + 1) for rank, row in enumerate(mine)}
    kept = sorted(ranks, key=lambda row: caps[row])[:45]
    found = {
        (one["id"], one["cluster"], one["rank"])
        for one in hits.by_batch.read(0, hits.num_items).to_pylist()
    }
    assert found == {(bytes(ids[row]), *ranks[row]) for row in kept}
    assert figures == {"s": {"seeds": 20, "clusters": 3, "before_cap": len(ranks), "hits": 45}}
