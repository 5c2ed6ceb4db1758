import numpy as np
import pyarrow as pa
import pytest

from curation.dataset import Dataset, write_dataset
from curation.pool import Pool
from curation.schema import make_id, schema_of
from curation.stage import StageFolder, StageInputs
from curation.stages.balance import Balance
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage


@pytest.fixture
def balance(tmp_path):
    def run(pool, target, *, name="out", workers=1, seed=0, **settings):
        folder = StageFolder(str(tmp_path / name), "balance")
        stage = Balance(target=target, **settings)
        return run_stage(stage, StageInputs(pool, {}, seed), folder, LocalEngine(workers), Silent())

    return run


def pool_of(tmp_path, paths, sizes=None, order=None, name="rows"):
    schema = schema_of(["id", "cluster", "clusters"])
    paths = np.asarray(paths)
    order = np.arange(len(paths)) if order is None else order
    ids = np.array([make_id(str(i)) for i in range(len(paths))], object)[order]
    paths = paths[order]
    bounds = np.cumsum([0, *(sizes or [len(paths)])])
    tables = [
        pa.table(
            {
                "id": ids[a:b].tolist(),
                "cluster": paths[a:b, 0].tolist(),
                "clusters": paths[a:b].tolist(),
            },
            schema=schema,
        )
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return Pool("pool", {"clusters": write_dataset(str(tmp_path / name), tables, schema)})


def paths_of(*sizes):
    """Leaf i of so many rows, in cluster i // 2 of the level above."""
    leaves = np.repeat(np.arange(len(sizes)), sizes)
    return np.stack([leaves, leaves // 2], axis=1)


def test_balance__equal_shares_down_the_tree(tmp_path, balance):
    record, outputs = balance(pool_of(tmp_path, paths_of(100, 5, 60, 60)), 80)
    rows = outputs["decisions"].read().to_pandas().query("keep")
    assert rows["cluster"].value_counts().sort_index().tolist() == [35, 5, 20, 20]
    assert record.dropped == {"not_drawn": 225 - 80}
    assert [level["drawn"] for level in record.figures["levels"]] == [80, 80]
    assert record.figures["shortfall"] == 0
    tree = Dataset.open(str(tmp_path / "out" / "tree")).read().to_pandas()
    leaves, tops = tree.query("level == 1"), tree.query("level == 2")
    assert leaves["parent"].tolist() == [0, 0, 1, 1]
    assert leaves["rows"].tolist() == [100, 5, 60, 60]
    assert leaves["drawn"].tolist() == [35, 5, 20, 20]
    assert tops["parent"].isna().all()
    assert (tops["rows"].tolist(), tops["drawn"].tolist()) == ([105, 120], [40, 40])


def test_balance__multiplier_draws_rows_more_than_once(tmp_path, balance):
    record, outputs = balance(pool_of(tmp_path, paths_of(40, 3)), 20, multiplier=4)
    rows = outputs["decisions"].read().to_pandas()
    assert rows["draws"].sum() == 20
    assert rows.query("cluster == 1")["draws"].tolist() in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    assert record.rows_out == 13


def test_balance__a_pool_that_is_too_small(tmp_path, balance):
    record, _ = balance(pool_of(tmp_path, paths_of(4, 3)), 20)
    assert (record.rows_out, record.figures["shortfall"]) == (7, 13)


def test_balance__content_depends_on_the_seed_alone(tmp_path, balance):
    paths, order = paths_of(50, 10, 80, 1), np.random.default_rng(0).permutation(141)
    pools = [
        pool_of(tmp_path, paths),
        pool_of(tmp_path, paths, sizes=[41, 0, 100], order=order, name="other"),
    ]
    digests = [
        balance(pools[i], 30, name=f"{i}-{seed}", workers=workers, seed=seed)[1][
            "decisions"
        ].manifest.content_digest
        for i, workers, seed in ((0, 1, 0), (1, 2, 0), (0, 1, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_balance__empty_pool(tmp_path, balance):
    record, _ = balance(pool_of(tmp_path, np.empty((0, 2), np.int64)), 5)
    assert (record.rows_in, record.figures["drawn"]) == (0, 0)
