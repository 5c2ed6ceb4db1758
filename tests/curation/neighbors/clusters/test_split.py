import numpy as np

from curation.neighbors.clusters import split as splitting
from curation.neighbors.clusters.assignment import Assignment
from curation.neighbors.clusters.centroids import Centroids, index_for
from curation.neighbors.clusters.split import SplitPlan, split_clusters
from curation.neighbors.rows.shard_batches import BatchExchange
from pipelines.engines.local_engine import LocalEngine
from tests.curation.neighbors.conftest import FIT, vectors_of


def test_split_plan__as_many_leaves_as_asked_or_as_there_are_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(splitting, "_ROWS_PER_BUCKET", 100)
    counts = np.array([70, 2, 0, 60, 300, 5])
    plan = SplitPlan.written(str(tmp_path / "plan.bin"), counts, 4)
    assert plan.load()["first_leaf"].tolist() == [0, 4, 6, 6, 10, 14, 18]
    assert plan.load()["bucket"].tolist() == [0, 0, 0, 0, 1, 2]
    assert plan.cluster_starts == (0, 4, 5, 6)
    assert plan.leaf_starts == (0, 10, 14, 18)


def test_split_clusters__each_row_gets_the_nearest_leaf_of_its_own_cluster(
    arranged, tmp_path, monkeypatch
):
    monkeypatch.setattr(splitting, "_ROWS_PER_BUCKET", 100)
    monkeypatch.setattr(splitting, "_ROWS_AT_ONCE", 50)
    rng = np.random.default_rng(0)
    files = arranged(np.eye(5, 16)[rng.integers(0, 5, 300)] + 0.15 * rng.normal(size=(300, 16)))
    centroids = Centroids.written(str(tmp_path / "parents.bin"), np.eye(5, 16, dtype=np.float32))
    engine, root = LocalEngine(), str(tmp_path / "split")
    indexed = index_for(files, centroids, 0.98, 0, root, engine)
    by_shard = BatchExchange(str(tmp_path / "by-shard"), 1)
    leaves, items = split_clusters(Assignment(files, indexed, 1), 3, FIT, root, by_shard, engine)
    assert leaves.num_rows == 15
    assert items > 1
    told = {one["row"]: one for one in by_shard.read(0, items).to_pylist()}
    assert sorted(told) == list(range(300))
    rows, leaf_rows = vectors_of(files), vectors_of(leaves)
    for position, row in enumerate(files.places(np.arange(300))[1].tolist()):
        parent, one = int(rows[position, :5].argmax()), told[row]
        scores = leaf_rows[3 * parent : 3 * parent + 3] @ rows[position]
        assert one["cluster"] // 3 == parent
        assert abs(scores[one["cluster"] % 3] - one["similarity"]) < 1e-5
        assert scores.max() - one["similarity"] < 0.01  # 8-bit products take near equals for equal
