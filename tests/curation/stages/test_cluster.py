import numpy as np
import pytest
from pydantic import ValidationError

from curation.dataset import Dataset
from curation.schema import make_id
from curation.stage import StageFolder, StageInputs
from curation.stages.cluster import Cluster
from pipelines.local_engine import LocalEngine
from pipelines.stage_runner import Silent, run_stage

WIDTH = 24


@pytest.fixture
def cluster(tmp_path):
    def run(pool, *, name="out", workers=1, **settings):
        folder = StageFolder(str(tmp_path / name), "cluster")
        stage = Cluster(embeddings="copy", **settings)
        record, outputs = run_stage(
            stage, StageInputs(pool), folder, LocalEngine(workers), Silent()
        )
        return record, outputs, folder

    return run


def groups(seed, sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    noise = np.random.default_rng(seed).normal(size=(len(labels), WIDTH))
    return labels, np.eye(len(sizes), WIDTH)[labels] + 0.05 * noise


def test_cluster__groups_and_levels(embed, cluster):
    labels, rows = groups(0, [50, 40, 40, 30, 40, 60])
    record, outputs, folder = cluster(embed(rows, sizes=[100, 160]), levels=(6, 2), iterations=4)
    found = outputs["clusters"].read().to_pydict()
    assert len(set(zip(labels, found["cluster"], strict=True))) == 6
    assert min(found["similarity"]) > 0.9
    paths = np.array(found["clusters"])
    assert (paths[:, 0] == found["cluster"]).all()
    assert len({tuple(path) for path in paths}) == 6  # a cluster lies in one above
    assert record.figures["clusters"] == [6, 2]
    assert len(record.figures["mean_cosine_by_pass"]) == 4
    centroids = Dataset.open(folder.output("centroids")).read()
    assert centroids["level"].to_pylist() == [1] * 6 + [2] * 2


def test_cluster__content_does_not_depend_on_shards_order_or_workers(embed, cluster):
    _, rows = groups(1, [70, 50, 30])
    ids = [make_id(str(i)) for i in range(150)]
    order = np.random.default_rng(0).permutation(150)
    pools = [embed(rows, ids=ids), embed(rows, ids=ids, sizes=[60, 90], order=order)]
    digests = {
        cluster(pool, name=f"{i}", workers=i + 1, levels=(9, 3))[1][
            "clusters"
        ].manifest.content_digest
        for i, pool in enumerate(pools)
    }
    assert len(digests) == 1


def test_cluster__bad_rows_few_rows_and_no_rows(embed, cluster):
    rows = np.eye(4, WIDTH)
    rows[2] = 0
    record, outputs, _ = cluster(embed(rows), levels=(9,))
    assert record.dropped == {"bad_vector": 1}
    assert sorted(outputs["clusters"].read()["cluster"].to_pylist()) == [0, 1, 2]
    record, _, _ = cluster(embed(np.empty((0, WIDTH))), levels=(9,), name="none")
    assert record.rows_in == 0


def test_cluster__levels_must_fall():
    with pytest.raises(ValidationError, match="levels must be positive and fall"):
        Cluster(embeddings="copy", levels=(5, 50))
