"""Commands on whole runs: run, preflight, plan, status and clean."""

import tempfile
import time
from typing import Annotated

import typer

from pipelines.cli.options import (
    Changes,
    EngineOptions,
    Json,
    Recipe,
    ShardOptions,
    Work,
)


def run(
    recipe: Recipe,
    work: Work,
    engine: ShardOptions = ShardOptions(),
    max_disk: Annotated[
        str | None, typer.Option("--max-disk", help="Most that DIR may hold, such as 200GB.")
    ] = None,
    plan_file: Annotated[
        str | None, typer.Option("--plan", help="A plan to compare with: curate plan --out.")
    ] = None,
    changes: Changes = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Work folder of an earlier run: only what is new is taken."),
    ] = None,
    json: Json = False,
) -> None:
    """Run a whole recipe: from a list of URLs to a manifest, a report and a checkpoint.

    Finished work is kept: the same command goes on where a killed run stopped.

    Examples:

        curate run demo --work build/demo

        curate run my.yaml --work /data/run1 --engine ray --workers 32 --set paths.urls=/data/urls

        curate run my.yaml --work /data/run2 --base /data/run1 --set paths.urls=/data/more-urls
    """
    from pipelines.cli.tables import print_finished_run, summary_of
    from pipelines.operate import console
    from pipelines.run.whole_run import RunLimits, run_recipe

    console.set_up_logging(False)
    began = time.monotonic()
    limits = RunLimits(engine.max_failed_shards, max_disk, plan_file)
    done = run_recipe(
        recipe, work, engine.start(), changes=changes or [], base=base, limits=limits, quiet=json
    )
    summary = summary_of(done, work.rstrip("/"), round(time.monotonic() - began, 1))
    if json:
        console.print_json(summary)
    else:
        print_finished_run(done.record, summary)


def preflight(
    recipe: Recipe,
    work: Work,
    engine: EngineOptions = EngineOptions(),
    changes: Changes = None,
    base: Annotated[str | None, typer.Option("--base", help="As for `curate run`.")] = None,
    json: Json = False,
) -> None:
    """Open every stage of a recipe on every node and compare what they find; exit 1 refuses.

    Example:

        curate preflight my.yaml --work /data/run1 --engine ray --set paths.urls=/data/urls
    """
    from pipelines.cli.tables import print_preflight
    from pipelines.operate import console
    from pipelines.run.preflight import preflight as look_everywhere
    from pipelines.run.recipe import load_recipe

    work = work.rstrip("/")
    checked = load_recipe(recipe, {"work": work}, changes or [])
    found = look_everywhere(checked, work, engine.start(), base)
    may_run = not found.refusals
    if json:
        nodes = {name: vars(one) for name, one in found.nodes.items()}
        told = {"refusals": found.refusals, "warnings": found.warnings}
        console.print_json({"ok": may_run, **told, "nodes": nodes})
    else:
        print_preflight(recipe, found)
    if not may_run:
        raise typer.Exit(1)


def plan(
    recipe: Recipe,
    images: Annotated[float, typer.Option("--images", min=1, help="Rows of the pool: 1.2e9.")],
    sample: Annotated[
        int, typer.Option("--sample", min=8, help="Rows of your own data to measure on.")
    ] = 1000,
    cores: Annotated[
        int | None, typer.Option("--cores", min=1, help="Cores of a node; none: one worker here.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="A YAML file of rates, or 20x8xV100,cpus=40.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Write it, for `curate run --plan` and the report.")
    ] = None,
    changes: Changes = None,
    json: Json = False,
) -> None:
    """Predict hours, memory and disk of a recipe, stage by stage, from a sample of your data.

    Runs the recipe up to the packed shards on a quarter of the sample and on all of it, so that
    what a stage costs once is told from what it costs a row.

    Examples:

        curate plan demo --images 1e6

        curate plan my.yaml --images 1.2e9 --sample 2000 --cores 40 --cluster 20x8xV100
    """
    from curation import storage
    from pipelines.cli.tables import print_plan
    from pipelines.operate import console
    from pipelines.operate.hardware import ClusterSpec, read_cluster
    from pipelines.operate.planner import measure_sample, plan_of, plan_stages

    machines = ClusterSpec(cpus=cores) if cores else None
    if cluster:
        machines = read_cluster(cluster, cores)
    with tempfile.TemporaryDirectory(prefix="curate-plan-") as folder:
        small, large = (
            measure_sample(recipe, f"{folder}/{name}", rows, changes or [])
            for name, rows in (("small", sample // 4), ("large", sample))
        )
        stages = plan_stages(small, large, images, machines)
    found = plan_of(stages, images, machines)
    if out is not None:
        storage.write_json(out, found)
    if json:
        console.print_json(found)
    else:
        print_plan(found, stages, machines)


def status(
    work: Annotated[str, typer.Argument(help="Work folder of a run, finished or not.")],
    json: Json = False,
) -> None:
    """Tell what a run is doing, from another terminal or machine: stage, speed, time left.

    Example:

        curate status build/demo
    """
    from pipelines.cli.tables import print_status
    from pipelines.operate import console
    from pipelines.operate.status import status_of

    found = status_of(work.rstrip("/"))
    if json:
        known = {name: value for name, value in vars(found).items() if value is not None}
        console.print_json({**known, "stages": found.finished_stages()})
        return
    print_status(work, found)


def clean(
    work: Annotated[str, typer.Argument(help="Work folder of a finished run.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    json: Json = False,
) -> None:
    """Remove what a finished run no longer needs: stages of other settings, scratch.

    Example:

        curate clean build/demo --dry-run
    """
    from pipelines.operate import console
    from pipelines.operate.clean import clean as remove_unneeded

    removed = remove_unneeded(work.rstrip("/"), dry_run=dry_run)
    if json:
        console.print_json(removed)
        return
    console.print_rows(("folder", "bytes"), list(removed.items()))
    verb = "would be" if dry_run else "were"
    console.print_line(f"{sum(removed.values()) / 1e6:,.1f} MB {verb} removed")
