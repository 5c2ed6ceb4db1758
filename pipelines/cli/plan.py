"""`curate plan`: what a recipe will take, measured on a sample."""

import tempfile
from dataclasses import asdict
from typing import Any

from curation import storage
from pipelines.cli.run import demo_site
from pipelines.engines.local_engine import LocalEngine
from pipelines.operate import console
from pipelines.operate.events import EventLog, RunObserver, read_events
from pipelines.operate.hardware import Cluster
from pipelines.operate.planner import Sample, StagePlan, plan_stages
from pipelines.run.recipe import load_recipe
from pipelines.run.runner import RecipeRun
from pipelines.run.stage_runner import Silent


def make_plan(
    recipe: str, images: float, sample: int, cluster: Cluster | None, changes: list[str]
) -> list[StagePlan]:
    """Run the recipe on a quarter of the sample and on all of it, and extrapolate."""
    with tempfile.TemporaryDirectory(prefix="curate-plan-") as folder:
        small, large = (
            _measure(recipe, storage.join(folder, name), rows, changes)
            for name, rows in (("small", sample // 4), ("large", sample))
        )
        return plan_stages(small, large, images, cluster)


def print_plan(
    stages: list[StagePlan], images: float, cluster: Cluster | None, out: str | None, as_json: bool
) -> None:
    """Print a plan, and write it where it is asked for."""
    plan = {
        "images": images,
        "cluster": cluster and cluster.model_dump(mode="json"),
        **_totals(stages),
    }
    plan["stages"] = [asdict(one) for one in stages]
    if out is not None:
        storage.write_json(out, plan)
    if as_json:
        console.print_json(plan)
        return
    _print(stages, images, cluster)


def _measure(recipe: str, work: str, rows: int, changes: list[str]) -> Sample:
    """Run the recipe on a sample with one worker."""
    checked = load_recipe(recipe, {"work": work}, [*changes, f"max_rows={rows}"])
    storage.make_folder(work)
    observer = RunObserver(EventLog(work), Silent(), {}, lambda: None)
    with demo_site(checked.recipe, work):
        engine = observer.observe(LocalEngine())
        record = RecipeRun(checked, work, engine, observer).run()
    finished = [one for one in read_events(work) if one["event"] == "stage_finished"]
    return Sample(record, work, tuple(finished))


def _totals(stages: list[StagePlan]) -> dict[str, Any]:
    wall_s = sum(one.wall_s for one in stages)
    spread = sum(one.wall_s * one.uncertainty for one in stages)
    slowest = max(stages, key=lambda one: one.wall_s)
    return {
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
    }


def _print(stages: list[StagePlan], images: float, cluster: Cluster | None) -> None:
    totals = _totals(stages)
    titles = (
        *("stage", "rows", "hours", "±", "core-hours", "GPU-hours"),
        *("peak GB", "disk GB", "network GB", "by"),
    )
    console.print_rows(
        titles,
        [
            (
                one.stage,
                f"{one.rows:,.0f}",
                f"{one.wall_s / 3600:,.2f}",
                f"{one.uncertainty:.0%}",
                f"{one.core_hours:,.2f}",
                f"{one.gpu_hours:,.2f}",
                f"{one.peak_bytes / 1e9:.2f}",
                f"{one.disk_bytes / 1e9:,.2f}",
                f"{one.network_bytes / 1e9:,.2f}",
                one.limited_by,
            )
            for one in stages
        ],
        f"{images:,.0f} rows, measured on this machine",
    )
    low, high = totals["wall_low_s"] / 3600, totals["wall_high_s"] / 3600
    console.print_pairs(
        {
            "hours": f"{totals['wall_s'] / 3600:,.2f} ({low:,.2f} to {high:,.2f})",
            "on": _described(cluster),
            "core-hours": f"{totals['core_hours']:,.1f}",
            "GPU-hours": f"{totals['gpu_hours']:,.1f}",
            "disk left": f"{totals['disk_bytes'] / 1e9:,.1f} GB",
            "network": f"{totals['network_bytes'] / 1e9:,.1f} GB",
            "bottleneck": f"{totals['bottleneck']}, limited by {totals['limited_by']}",
        },
        title="",
    )


def _described(cluster: Cluster | None) -> str:
    if cluster is None:
        return "this machine, with one worker"
    return f"{cluster.nodes:,} nodes, {cluster.cores:,} cores, {cluster.devices:,} GPUs"
