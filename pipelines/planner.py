"""Predicts what a recipe will take, from runs on two samples of the user's own data.

A stage costs something once (models, the driver's own work) and something a row. The larger
sample says what both cost together, the difference of the two what a row costs. Stages that
compare rows with each other grow faster than their rows; how much, the two samples say, too.
"""

import math
from dataclasses import dataclass
from typing import Any

from curation import storage
from curation.dataset import Dataset
from curation.errors import ConfigError
from pipelines.cluster import Cluster
from pipelines.run_record import RunRecord, StageEntry

PLAN_FILE = "plan.json"
"""In a work folder: the report compares the run with it."""
_PAIRWISE = frozenset({"near_dedup", "leaks", "retrieve", "cluster", "balance"})
_ON_DEVICES = frozenset({"embed"})
_EXHAUSTIVE_ROWS = 50_000
"""Up to so many rows all pairs are compared: time grows by the square at most; by lists beyond."""
_LEAST_UNCERTAINTY = 0.1
_STATED_RATES = 1.0
"""Uncertainty where the speed of a device is stated, not measured: twice or half."""


@dataclass(frozen=True)
class Sample:
    """A finished run on a sample: its record, its work folder, and what its stages used."""

    record: RunRecord
    work: str
    usage: tuple[dict[str, Any], ...]
    """The event `stage_finished` of each stage of the pool, in order."""


@dataclass(frozen=True)
class StagePlan:
    """What one stage of the pool will take."""

    stage: str
    rows: float
    """Rows that reach it."""
    wall_s: float
    """Seconds on the cluster."""
    core_hours: float
    gpu_hours: float
    peak_bytes: float
    """Memory of a worker at its peak, as in the sample."""
    disk_bytes: float
    """Bytes that it leaves on disk."""
    network_bytes: float
    """Bytes read and written, if storage lies behind the network."""
    limited_by: str
    """cores, devices or network."""
    uncertainty: float
    """Share by which `wall_s` may be wrong, up to a factor of 1 + this."""


def plan_stages(
    small: Sample, large: Sample, images: float, cluster: Cluster | None
) -> list[StagePlan]:
    """Plans of each stage of the pool. Rows of a stage grow with the pool, as in the sample.

    cluster: None for this machine with one worker, as the samples ran.
    """
    scale = images / max(large.record.pool[0].record.rows_in, 1)
    left = [_bytes_left(entry, large.work) for entry in large.record.pool]
    return [
        _plan_stage(small, large, number, scale, left, cluster)
        for number in range(len(large.record.pool))
    ]


def _plan_stage(
    small: Sample,
    large: Sample,
    number: int,
    scale: float,
    left: list[int],
    cluster: Cluster | None,
) -> StagePlan:
    entry, usage = large.record.pool[number], large.usage[number]
    rows = entry.record.rows_in * scale
    once, work_s, doubt = _extrapolate(small.usage[number], usage, entry.stage, rows)
    busy = max(1.0, usage["cpu_s"] / max(usage["item_s"], 1e-9))  # cores of one worker
    network = (left[number] + _bytes_read(large, number, left)) * scale
    on_devices = cluster is not None and entry.stage in _ON_DEVICES and cluster.devices > 0
    compute_s, network_s, device_s = work_s, 0.0, 0.0
    if cluster is not None:
        network_s = network / (1e9 * cluster.network_gb_s * cluster.nodes)
        compute_s = work_s * busy / (cluster.cores * cluster.cpu_speed)
        if on_devices:
            device_s = work_s * busy / cluster.gpu_speed
            compute_s = device_s / cluster.devices
    by_network = network_s > compute_s
    return StagePlan(
        stage=entry.stage,
        rows=rows,
        wall_s=once + max(compute_s, network_s),
        core_hours=0.0 if on_devices else (once + work_s * busy) / 3600,
        gpu_hours=device_s / 3600,
        peak_bytes=float(usage["peak_bytes"]),
        disk_bytes=left[number] * scale,
        network_bytes=network,
        limited_by="network" if by_network else "devices" if on_devices else "cores",
        uncertainty=max(doubt, _STATED_RATES) if on_devices else doubt,
    )


def _extrapolate(
    small: dict[str, Any], large: dict[str, Any], stage: str, rows: float
) -> tuple[float, float, float]:
    """Seconds once, seconds of workers for so many rows, and their relative uncertainty."""
    n1, n2 = max(small["rows_in"], 1), max(large["rows_in"], 1)
    t1, t2 = small["item_s"], large["item_s"]
    mean = t2 / n2
    each = (t2 - t1) / (n2 - n1) if n2 > n1 else mean
    each = min(mean, max(each, 0.3 * mean))
    once = max(0.0, large["seconds"] - t2) + (t2 - each * n2)
    doubt = max(_LEAST_UNCERTAINTY, 1 - each / mean if mean else 0.0)
    work_s = each * rows
    if stage in _PAIRWISE and rows > n2:
        most = 1.0 if rows <= _EXHAUSTIVE_ROWS else 0.3
        measured = math.log(max(t2, 1e-3) / max(t1, 1e-3)) / math.log(n2 / n1) if n2 > n1 else 1
        growth = (rows / n2) ** min(most, max(0.0, measured - 1))
        work_s *= growth
        doubt = max(doubt, 0.5 if rows > _EXHAUSTIVE_ROWS else 0.25)
    return once, work_s, doubt


def _bytes_read(large: Sample, number: int, left: list[int]) -> int:
    """Bytes of the images or raw bytes that a stage reads, where it decodes them."""
    reads = {"canonicalize": "download", "pack": "canonicalize", "embed": "canonicalize"}
    reads |= dict.fromkeys(("quality", "nsfw", "faces"), "canonicalize")
    wanted = reads.get(large.record.pool[number].stage)
    names = [entry.stage for entry in large.record.pool]
    return left[names.index(wanted)] if wanted in names else 0


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
