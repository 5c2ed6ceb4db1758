"""`curate plan`: what a recipe will take, measured on a sample."""

import tempfile

from curation import storage
from pipelines import console
from pipelines.local_engine import LocalEngine
from pipelines.planner import StageEstimate, estimate
from pipelines.recipe import load_recipe
from pipelines.runner import RecipeRun, RunRecord
from pipelines.stage_runner import Silent
from pipelines.verbs.run import demo_site


def print_plan(
    recipe: str,
    images: float,
    sample: int,
    cores: int,
    changes: list[str],
    as_json: bool,
    out: str | None = None,
) -> None:
    """Measure two samples; print the estimates, and write them where `out` says."""
    console.set_up_logging(False)
    with tempfile.TemporaryDirectory(prefix="curate-plan-") as folder:
        runs = [
            _measure(recipe, storage.join(folder, name), rows, changes)
            for name, rows in (("small", sample // 4), ("large", sample))
        ]
        estimates = estimate(runs[0], runs[1], images)
    if out is not None:
        storage.write_json(out, [vars(one) for one in estimates])
    if as_json:
        console.print_json([vars(one) for one in estimates])
    else:
        _print(estimates, images, cores)


def _measure(recipe: str, work: str, rows: int, changes: list[str]) -> tuple[RunRecord, str]:
    """Run the recipe on a sample with one worker."""
    checked = load_recipe(recipe, {"work": work}, [*changes, f"max_rows={rows}"])
    storage.make_folder(work)
    with demo_site(checked.recipe, work):
        return RecipeRun(checked, work, LocalEngine(), Silent()).run(), work


def _print(estimates: list[StageEstimate], images: float, cores: int) -> None:
    total = sum(one.core_hours for one in estimates)
    console.print_rows(
        ("stage", "rows", "core-hours", "share", "disk"),
        [
            (
                one.stage,
                f"{one.rows:,.0f}",
                f"{one.core_hours:,.2f}",
                f"{one.core_hours / total:.0%}",
                f"{one.disk_bytes / 1e9:,.2f} GB",
            )
            for one in estimates
        ],
        f"{images:,.0f} rows, measured on this machine",
    )
    slowest = max(estimates, key=lambda one: one.core_hours)
    console.print_pairs(
        {
            "core-hours": f"{total:,.1f}",
            f"hours on {cores:,} such cores": f"{total / cores:,.2f}",
            "disk left": f"{sum(one.disk_bytes for one in estimates) / 1e9:,.1f} GB",
            "bottleneck": slowest.stage,
        },
        title="",
    )
