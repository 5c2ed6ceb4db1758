"""Predicts what a recipe will take, from runs on two samples of the user's own data.

A stage costs something once (models, the driver's own work) and something a row. The larger
sample says what both cost together, the difference of the two what a row costs. Stages that
compare rows with each other grow faster than their rows; how much, the two samples say, too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pydantic import JsonValue

from curation import storage
from curation.dataset import Dataset
from curation.errors import ConfigError
from curation.image_filter import ImageFilter
from pipelines.engines.local_engine import LocalEngine
from pipelines.engines.metered_engine import MeteredEngine
from pipelines.operate.events import EventLog, RunObserver, read_events
from pipelines.operate.forecast import step_name
from pipelines.operate.hardware import ClusterSpec
from pipelines.run.demo_site import site_of
from pipelines.run.recipe import load_recipe
from pipelines.run.run_record import RunRecord, StageEntry
from pipelines.run.runner import RecipeRun
from pipelines.run.stage_runner import Silent

PLAN_FILE = "plan.json"
"""In a work folder: the report compares the run with it."""
_EXHAUSTIVE_ROWS = 50_000
"""Up to so many rows all pairs are compared: time grows by the square at most; by lists beyond."""
_LEAST_UNCERTAINTY = 0.1
_SHORT_S = 0.5
"""Items of less are not worth correcting: their seconds are mostly start."""
_STATED_RATES = 1.0
"""Uncertainty where the speed of a device is stated, not measured: twice or half."""


@dataclass(frozen=True)
class Sample:
    """A finished run on a sample: its record, its work folder, and what its stages used."""

    record: RunRecord
    work: str
    usage: tuple[Mapping[str, float], ...]
    """The event `stage_finished` of each stage, in the order of `steps`."""

    def steps(self) -> list["Step"]:
        """The stages of every set, then those of the pool."""
        flows = [*self.record.sets.items(), ("", self.record.pool)]
        usage, steps = iter(self.usage), []
        for name, entries in flows:
            left = [_bytes_left(entry, self.work) for entry in entries]
            first = entries[0].record
            full = float(first.settings.get("rows_per_shard") or first.rows_in)
            num_shards = max(1, math.ceil(first.rows_in / max(full, 1.0)))
            for number, entry in enumerate(entries):
                read = _bytes_read(entries, self.work, number)
                held = entry.record.rows_in / num_shards
                share = entry.record.rows_in / max(first.rows_in, 1)
                shard = ShardRows(held, max(held, full * share))
                steps.append(Step(name, entry, next(usage), left[number], read, shard))
        return steps


@dataclass(frozen=True)
class ShardRows:
    """Rows of one shard that reach a stage."""

    sample: float
    """In the sample."""
    full: float
    """Where there are enough rows to fill shards."""


@dataclass(frozen=True)
class Step:
    """What a stage did in a sample."""

    set_name: str
    """Empty for the pool."""
    entry: StageEntry
    usage: Mapping[str, float]
    bytes_left: int
    """Bytes on disk afterward."""
    bytes_read: int
    """Bytes of the files that it decodes."""
    shard: ShardRows

    @property
    def name(self) -> str:
        """The stage, and of a set SET/STAGE."""
        return step_name(self.set_name, self.entry.stage)


@dataclass(frozen=True)
class StagePlan:
    """What one stage will take."""

    stage: str
    """Its name; SET/STAGE for a set's."""
    rows: float
    """Rows that reach it."""
    wall_s: float
    """Seconds on the cluster."""
    core_hours: float
    gpu_hours: float
    peak_bytes: float
    """Memory of a worker at its peak, with shards as full as in the whole job."""
    disk_bytes: float
    """Bytes that it leaves on disk."""
    network_bytes: float
    """Bytes read and written, if storage lies behind the network."""
    limited_by: str
    """cores, devices or network."""
    uncertainty: float
    """Share by which `wall_s` may be wrong, up to a factor of 1 + this."""


def measure_sample(recipe: str, work: str, rows: int, changes: Sequence[str]) -> Sample:
    """Run a recipe on a sample with one worker."""
    checked = load_recipe(recipe, {"work": work}, [*changes, f"max_rows={rows}"])
    storage.make_folder(work)
    engine = LocalEngine()
    observer = RunObserver(EventLog(work), Silent(), engine, {})
    metered = MeteredEngine(engine, observer.heard)
    with site_of(checked.recipe.demo_site, work):
        record = RecipeRun(checked, work, metered, observer).run()
    finished = [one for one in read_events(work) if one.event == "stage_finished"]
    return Sample(record, work, tuple(one.model_dump() for one in finished))


def plan_stages(
    small: Sample, large: Sample, images: float, cluster: ClusterSpec | None
) -> list[StagePlan]:
    """Plans of each stage of the sets, which keep their size, and of the pool.

    Rows of a stage grow with its flow, as in the sample.
    cluster: None for this machine with one worker, as the samples ran.
    """
    firsts = {name: entries[0].record for name, entries in large.record.sets.items()}
    # Rows of a whole set for each that the sample read.
    shares = {name: float(one.figures.get("share_read", 1.0)) for name, one in firsts.items()}
    scales = {name: 1 / max(share, 1e-12) for name, share in shares.items()}
    scales[""] = images / max(large.record.pool[0].record.rows_in, 1)
    pairs = zip(small.steps(), large.steps(), strict=True)
    return [_plan_step(less, more, scales[more.set_name], cluster) for less, more in pairs]


def plan_of(
    stages: Sequence[StagePlan], images: float, cluster: ClusterSpec | None
) -> dict[str, JsonValue]:
    """The plan of all stages together, as `curate plan --out` writes it."""
    wall_s = sum(one.wall_s for one in stages)
    spread = sum(one.wall_s * one.uncertainty for one in stages)
    slowest = max(stages, key=lambda one: one.wall_s)
    return {
        "images": images,
        "cluster": None if cluster is None else cluster.model_dump(mode="json"),
        "wall_s": wall_s,
        "wall_low_s": sum(one.wall_s / (1 + one.uncertainty) for one in stages),
        "wall_high_s": wall_s + spread,
        "core_hours": sum(one.core_hours for one in stages),
        "gpu_hours": sum(one.gpu_hours for one in stages),
        "disk_bytes": sum(one.disk_bytes for one in stages),
        "network_bytes": sum(one.network_bytes for one in stages),
        "peak_bytes": max(one.peak_bytes for one in stages),
        "bottleneck": slowest.stage,
        "limited_by": slowest.limited_by,
        "stages": [asdict(one) for one in stages],
    }


def _plan_step(small: Step, large: Step, scale: float, cluster: ClusterSpec | None) -> StagePlan:
    kind, usage = large.entry.kind, large.usage
    rows = large.entry.record.rows_in * scale
    once, work_s, doubt = _extrapolate(small.usage, usage, rows, pairwise=kind.compares_rows)
    busy = max(1.0, usage["cpu_s"] / max(usage["item_s"], 1e-9))  # cores of one worker
    network = (large.bytes_left + large.bytes_read) * scale
    on_devices = cluster is not None and kind.runs_on_gpus and cluster.devices > 0
    compute_s, network_s, device_s = work_s, 0.0, 0.0
    if cluster is not None:
        network_s = network / (1e9 * cluster.network_gb_s * cluster.nodes)
        compute_s = work_s * busy / (cluster.cores * cluster.cpu_speed)
        if on_devices:
            device_s = work_s * busy / cluster.gpu_speed
            compute_s = device_s / cluster.devices
    by_network = network_s > compute_s
    return StagePlan(
        stage=large.name,
        rows=rows,
        wall_s=once + max(compute_s, network_s),
        core_hours=0.0 if on_devices else (once + work_s * busy) / 3600,
        gpu_hours=device_s / 3600,
        peak_bytes=_peak_bytes(small, large, rows),
        disk_bytes=large.bytes_left * scale,
        network_bytes=network,
        limited_by="network" if by_network else "devices" if on_devices else "cores",
        uncertainty=max(doubt, _STATED_RATES) if on_devices else doubt,
    )


def _peak_bytes(small: Step, large: Step, rows: float) -> float:
    """Memory of a worker at its peak: grows with the rows of a shard, or up to a stage's bound."""
    peak = float(large.usage["peak_bytes"])
    if large.entry.kind.compares_rows:
        comparison = large.entry.record.settings.get("comparison") or {}
        bound = comparison.get("memory_gb", 0.0) * 1e9
        return max(peak, bound) if rows > _EXHAUSTIVE_ROWS else peak
    added = large.shard.sample - small.shard.sample
    grown = large.usage["grown_bytes"] - small.usage["grown_bytes"]
    each = max(0.0, grown) / added if added > 0 else 0.0
    return peak + each * (min(large.shard.full, rows) - large.shard.sample)


def _extrapolate(
    small: Mapping[str, float], large: Mapping[str, float], rows: float, *, pairwise: bool
) -> tuple[float, float, float]:
    """Seconds once, seconds of workers for so many rows, and their relative uncertainty."""
    n1, n2 = max(small["rows_in"], 1), max(large["rows_in"], 1)
    t1, t2, doubt = _undisturbed(small, large)
    mean = t2 / n2
    each = (t2 - t1) / (n2 - n1) if n2 > n1 else mean
    each = min(mean, max(each, 0.3 * mean))
    once = max(0.0, large["seconds"] - large["item_s"]) + (t2 - each * n2)
    doubt = max(_LEAST_UNCERTAINTY, doubt, 1 - each / mean if mean else 0.0)
    work_s = each * rows
    if pairwise and rows > n2:
        most = 1.0 if rows <= _EXHAUSTIVE_ROWS else 0.3
        measured = math.log(max(t2, 1e-3) / max(t1, 1e-3)) / math.log(n2 / n1) if n2 > n1 else 1
        growth = (rows / n2) ** min(most, max(0.0, measured - 1))
        work_s *= growth
        doubt = max(doubt, 0.5 if rows > _EXHAUSTIVE_ROWS else 0.25)
    return once, work_s, doubt


def _undisturbed(
    small: Mapping[str, float], large: Mapping[str, float]
) -> tuple[float, float, float]:
    """Seconds that the items of both samples take where nobody else works, and their doubt.

    Other work on the machine stretches the seconds of the clock, but hardly those of the cores: so
    the sample that got more cores at a time says how long the other would have taken.
    """
    t1, t2 = small["item_s"], large["item_s"]
    if min(t1, t2) < _SHORT_S:
        return t1, t2, 0.0
    got = [one["cpu_s"] / one["item_s"] for one in (small, large)]
    most = max(got)
    if most <= 0:
        return t1, t2, 0.0
    return small["cpu_s"] / most, large["cpu_s"] / most, 1 - min(got) / most


def _bytes_read(entries: Sequence[StageEntry], work: str, number: int) -> int:
    """Bytes of the files that a stage decodes: as fetched, or as they are stored."""
    are_filters = [issubclass(one.kind, ImageFilter) for one in entries[: number + 1]]
    if are_filters[-2:] == [True, True]:
        return 0  # the first of filters that follow each other decodes for all of them
    columns = entries[number].built().required_columns()
    return sum(
        _bytes_of(storage.join(work, entry.folder, output))
        for column, output in (("raw", "raw"), ("image", "images"))
        for entry in entries[:number]
        if column in columns and output in entry.record.outputs
    )


def _bytes_of(path: str) -> int:
    return sum(shard.num_bytes for shard in Dataset.open(path).manifest.shards)


def _bytes_left(entry: StageEntry, work: str) -> int:
    """Bytes of the outputs that are still there: raw bytes go once canonicalize has committed."""
    folder = storage.join(work, entry.folder)
    outputs = (name for name in entry.record.outputs if name != "raw")
    total = sum(_bytes_of(storage.join(folder, output)) for output in outputs)
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
