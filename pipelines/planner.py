"""Predicts what a recipe will take, from runs on two samples of the user's own data.

A stage's time is taken as a + b rows: two samples tell what it costs once (models, processes) from
what it costs a row. Neighbour stages grow a little faster than that on large pools.
"""

from dataclasses import dataclass

from curation import storage
from curation.dataset import Dataset
from curation.errors import ConfigError
from curation.ledger import StageRecord
from pipelines.runner import RunRecord, StageEntry

_LEAST_SECONDS_A_ROW = 1e-7
"""Where both samples took as long: a row costs something."""


@dataclass(frozen=True)
class StageEstimate:
    """What one stage of the pool will take."""

    stage: str
    rows: float
    """Rows that reach it."""
    core_hours: float
    disk_bytes: float
    """Bytes that it leaves on disk."""


def estimate(
    small: tuple[RunRecord, str], large: tuple[RunRecord, str], images: float
) -> list[StageEstimate]:
    """Estimates for each stage of the pool.

    small, large: the records of two finished runs on samples, with their work folders. Rows of a
    stage grow with the pool, as in the larger sample.
    """
    entries = zip(small[0].pool, large[0].pool, strict=True)
    scale = images / max(large[0].pool[0].record.rows_in, 1)
    return [_estimate_stage(one, two, large[1], scale) for one, two in entries]


def _estimate_stage(small: StageEntry, large: StageEntry, work: str, scale: float) -> StageEstimate:
    once, each = _fit(small.record, large.record)
    rows = large.record.rows_in * scale
    return StageEstimate(
        stage=large.stage,
        rows=rows,
        core_hours=(once + each * rows) / 3600,
        disk_bytes=_bytes_left(large, work) * scale,
    )


def _fit(small: StageRecord, large: StageRecord) -> tuple[float, float]:
    """Seconds once and seconds a row."""
    more_rows = large.rows_in - small.rows_in
    more_seconds = large.seconds - small.seconds
    if more_rows <= 0 or more_seconds <= 0:
        return small.seconds, _LEAST_SECONDS_A_ROW
    each = more_seconds / more_rows
    return max(0.0, large.seconds - each * large.rows_in), each


def _bytes_left(entry: StageEntry, work: str) -> int:
    """Bytes of the outputs that are still there: raw bytes go once canonicalize has committed."""
    folder = storage.join(work, entry.folder)
    total = 0
    for output in entry.record.outputs:
        if output == "raw":
            continue
        dataset = Dataset.open(storage.join(folder, output))
        total += sum(shard.num_bytes for shard in dataset.manifest.shards)
    packed = storage.join(folder, "packed")
    if Dataset.is_finished(packed):
        total += sum(Dataset.open(packed).read(["num_bytes"])["num_bytes"].to_pylist())
    return total


def read_plan(path: str) -> dict[str, float]:
    """Planned seconds of each stage, from what `curate plan --out` wrote.

    Raises:
        StorageError, ConfigError: the file is missing, or no plan.
    """
    plan = storage.read_json(path)
    if not isinstance(plan, dict) or "stages" not in plan:
        raise ConfigError(f"{path}: is no plan; write one with `curate plan RECIPE --out {path}`")
    return {stage["stage"]: float(stage["wall_s"]) for stage in plan["stages"]}
