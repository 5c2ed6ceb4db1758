from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.dataset import Dataset, write_dataset
from curation.errors import EngineError, LedgerError, SchemaError
from curation.ledger import SHARD_FAILED, commit_shard, finished_shards
from curation.pool import Pool
from curation.schema import make_id, schema_of
from curation.stage import Shard, ShardStage, StageFolder, StageInputs, reject
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, StageRunner, run_stage

SCHEMA = schema_of(["id", "width", "height"])


class Even(ShardStage):
    """Keeps even widths and emits their squares."""

    limit: int = 100
    """Widths above it are dropped too."""
    reasons = ("odd", "large")

    def required_columns(self):
        return ("width",)

    def outputs(self):
        return {"squares": schema_of(["id", "num_bytes"])}

    def process(self, shard, opened):
        width = shard.array("width")
        shard.record_score(width.astype(float), self.limit)
        reject(shard, width % 2 == 1, "odd")
        reject(shard, width > self.limit, "large")
        shard.emit("squares", {"num_bytes": width.astype(np.int64) ** 2})


def pool_of(tmp_path, *sizes: int) -> Pool:
    starts = np.cumsum([0, *sizes])
    tables = [
        pa.table(
            {
                "id": [make_id(str(i)) for i in range(a, b)],
                "width": range(a, b),
                "height": range(a, b),
            },
            schema=SCHEMA,
        )
        for a, b in zip(starts[:-1], starts[1:], strict=True)
    ]
    return Pool.of(write_dataset(str(tmp_path / "rows"), tables, SCHEMA))


def test_run_stage__every_row_is_accounted_for(tmp_path):
    pool = pool_of(tmp_path, 5, 0, 4)
    record, outputs = run_stage(
        Even(limit=6),
        StageInputs(pool),
        StageFolder(str(tmp_path / "s"), "even"),
        LocalEngine(),
        Silent(),
    )
    assert (record.rows_in, record.rows_out, record.dropped) == (9, 4, {"large": 1, "odd": 4})
    decisions = outputs["decisions"].read().to_pydict()
    assert decisions["keep"] == [i % 2 == 0 and i <= 6 for i in range(9)]
    assert decisions["reason"][7:] == ["odd", "large"]
    assert decisions["threshold"] == [6.0] * 9
    assert outputs["squares"].read()["num_bytes"].to_pylist() == [0, 4, 16, 36]


def test_pool__reads_live_rows_across_side_cars(tmp_path):
    pool = pool_of(tmp_path, 5, 4)
    _, outputs = run_stage(
        Even(), StageInputs(pool), StageFolder(str(tmp_path / "s"), "even"), LocalEngine(), Silent()
    )
    decisions = outputs.pop("decisions")
    later = pool.with_stage(outputs, decisions)
    table = later.read(1, ["height", "num_bytes"])
    assert table.to_pydict() == {
        "id": [make_id("6"), make_id("8")],
        "height": [6, 8],
        "num_bytes": [36, 64],
    }
    assert later.shard_rows().tolist() == [3, 2]
    assert later.num_rows == 5
    with pytest.raises(SchemaError, match="column 'image' is missing"):
        later.read(0, ["image"])


def test_run_stage__finished_work_is_not_done_again(tmp_path, monkeypatch):
    pool, folder = pool_of(tmp_path, 5, 4), StageFolder(str(tmp_path / "s"), "even")
    first, _ = run_stage(Even(), StageInputs(pool), folder, LocalEngine(), Silent())
    monkeypatch.setattr(Even, "process", None)
    again, outputs = run_stage(Even(), StageInputs(pool), folder, LocalEngine(), Silent())
    assert again == first
    assert isinstance(outputs["squares"], Dataset)


def test_run_stage__resumes_by_shard(tmp_path):
    pool, folder = pool_of(tmp_path, 5, 4), StageFolder(str(tmp_path / "s"), "even")
    calls = []

    class Dying(Even):
        def process(self, shard, opened):
            calls.append(shard.index)
            if shard.index == 1 and len(calls) < 3:
                raise KeyboardInterrupt
            super().process(shard, opened)

    with pytest.raises(KeyboardInterrupt):
        run_stage(Dying(), StageInputs(pool), folder, LocalEngine(), Silent())
    assert list(finished_shards(folder)) == [0]
    assert not Dataset.is_finished(folder.output("decisions"))
    calls.append(-1)
    record, _ = run_stage(Dying(), StageInputs(pool), folder, LocalEngine(), Silent())
    assert calls == [0, 1, -1, 1]
    assert record.rows_in == 9


def test_commit_shard__unlisted_reason_is_our_mistake(tmp_path):
    shard = Shard(pool_of(tmp_path, 3).read(0, ["width"]), 0)
    shard.emit("squares", {"num_bytes": np.zeros(3)})
    reject(shard, [True, False, False], "whim")
    with pytest.raises(LedgerError, match="'whim', unlisted"):
        commit_shard(Even(), StageFolder(str(tmp_path / "s"), "even"), shard)


def test_reject__first_reason_stays(tmp_path):
    shard = Shard(pool_of(tmp_path, 3).read(0, ["width"]), 0)
    reject(shard, [True, True, False], "odd")
    reject(shard, [False, True, True], "large")
    assert shard.reasons.tolist() == ["odd", "odd", "large"]
    with pytest.raises(LedgerError, match="flags for 3 rows"):
        reject(shard, [True], "odd")


def test_run_stage__sweeps_what_killed_writers_left(tmp_path):
    pool, folder = pool_of(tmp_path, 5), StageFolder(str(tmp_path / "s"), "even")
    left = tmp_path / "s" / "squares" / ".0123.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a shard")
    run_stage(Even(), StageInputs(pool), folder, LocalEngine(), Silent())
    assert not left.exists()


class Fragile(Even):
    """Fails on shards that begin with a width, while a file is there."""

    flag: str
    """Path of the file."""

    def process(self, shard, opened):
        if Path(self.flag).exists() and shard.array("width")[0] == 5:
            raise OSError("no luck")
        super().process(shard, opened)


def test_run_stage__failed_shards_are_accepted_and_tried_again_later(tmp_path):
    flag = tmp_path / "flag"
    flag.touch()
    stage, inputs = Fragile(flag=str(flag)), StageInputs(pool_of(tmp_path, 5, 3, 4))
    folder = StageFolder(str(tmp_path / "s"), "fragile")
    engine = LocalEngine(first_pause_s=0.01)
    with pytest.raises(EngineError, match=r"1 of 3 shards failed 3 times \(1\): OSError: no luck"):
        run_stage(stage, inputs, folder, engine, Silent())

    tolerant = StageRunner(engine, Silent(), max_failed_shards=1)
    record, outputs = tolerant.run(stage, inputs, folder)
    assert record.failed_shards == {1: "OSError: no luck"}
    assert record.dropped == {"odd": 4, SHARD_FAILED: 3}
    assert (record.rows_in, record.rows_out) == (12, 5)
    assert outputs["squares"].attributes["failed_shards"] == {"1": "OSError: no luck"}

    flag.unlink()
    assert tolerant.run(stage, inputs, folder)[0] == record  # still accepted
    record, outputs = run_stage(stage, inputs, folder, engine, Silent())
    assert (record.failed_shards, record.rows_out) == ({}, 6)
    whole, _ = run_stage(stage, inputs, StageFolder(str(tmp_path / "t"), "t"), engine, Silent())
    assert outputs["squares"].manifest.content_digest == whole.outputs["squares"]
