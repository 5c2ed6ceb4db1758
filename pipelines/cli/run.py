"""`curate run`: a recipe from its list of URLs to report, checkpoint and evaluation."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation import storage
from curation.dataset import Dataset
from curation.digest import digest_of
from curation.errors import ConfigError, LedgerError, StageError, StorageError
from curation.lock import locked
from curation.lost_files import reopen_failed
from curation.stage import Engine, StageFolder
from pipelines.audit.funnel import adds_up, funnel
from pipelines.audit.seal import is_sealed_whole, write_seal
from pipelines.audit.tombstones import folders_of
from pipelines.operate import console
from pipelines.operate.disk_budget import DiskBudget, parse_bytes
from pipelines.operate.events import EventLog, RunObserver
from pipelines.operate.planner import read_plan
from pipelines.run.demo_site import build_site, serve_site
from pipelines.run.previous_runs import BaseRuns, absolute
from pipelines.run.recipe import CheckedRecipe, Recipe, load_recipe
from pipelines.run.run_record import RUN_FILE, RunRecord, read_run
from pipelines.run.runner import RecipeRun, is_finished

logger = logging.getLogger(__name__)

_STEP_FILE = "_step.json"


@dataclass(frozen=True)
class RunLimits:
    """What a run may take, and what it was planned to take."""

    max_disk: str | None = None
    """Size of the work folder, such as 200GB."""
    plan: str | None = None
    """What `curate plan --out` wrote."""


def run_recipe(
    name: str,
    work: str,
    engine: Engine,
    changes: list[str],
    as_json: bool,
    base: str | None = None,
    limits: RunLimits = RunLimits(),
) -> None:
    """Run a recipe with everything that follows the manifest, and print what became of it.

    base: work folder of an earlier run, whose rows are not taken again.
    """
    began = time.monotonic()
    console.set_up_logging(False)
    work = work.rstrip("/")
    checked = load_recipe(name, {"work": work}, changes)
    earlier = None if base is None else BaseRuns.open(base)
    if earlier is not None and absolute(work) in [one.path for one in earlier.works]:
        raise ConfigError(f"--base {base}: is --work itself, or rests on it; choose a new folder")
    checked = _without_forgotten(checked, work, earlier)
    log = EventLog(work)
    with locked(work):
        with _logged(log, checked, limits) as planned:
            watcher = console.ConsoleWatcher(quiet=as_json, planned=planned)
            check = _disk_check(work, limits.max_disk)
            observer = RunObserver(log, watcher, planned, check)
            _reopen_failed(work, engine.max_failed_shards)
            with demo_site(checked.recipe, work):
                _check_nodes(checked, work, engine, earlier)
                recipe_run = RecipeRun(checked, work, observer.observe(engine), observer, earlier)
                record = recipe_run.run()
            if recipe_run.published:
                write_seal(work, record, whole=False)
            if not adds_up(funnel(record)):
                raise LedgerError(
                    f"{work}: the funnel does not add up; please report this with run.json"
                )
            results = _run_steps(checked, record, work, quiet=as_json)
        if not is_sealed_whole(work):
            write_seal(work, record)
    worked = watcher.num_run > 0 or any(step["ran"] for step in results.values())
    summary = _summary(record, work, results, worked, time.monotonic() - began)
    if as_json:
        console.print_json(summary)
    else:
        _print_summary(summary, record)


def _check_nodes(
    checked: CheckedRecipe, work: str, engine: Engine, earlier: BaseRuns | None
) -> None:
    """Compare the nodes of a cluster before they do anything, as far as that takes seconds.

    Raises:
        StageError: they are not alike, or lack something.
    """
    if engine.is_one_machine or is_finished(checked, work, earlier):
        return
    from pipelines.run.preflight import quick_preflight

    found = quick_preflight(checked, work, engine)
    for line in found.warnings:
        logger.warning("nodes differ: %s", line)
    if found.refusals:
        more = len(found.refusals) - 1
        others = f" (and {more} more: `curate preflight` lists them)" if more else ""
        raise StageError(f"{checked.where}: {found.refusals[0]}{others}")


def _without_forgotten(
    checked: CheckedRecipe, work: str, earlier: BaseRuns | None
) -> CheckedRecipe:
    """The recipe with the tombstones of its work folder and of its bases.

    A finished run has nothing to do: what it was made to forget is out of it.
    """
    works = [work, *(one.path for one in earlier.works)] if earlier else [work]
    found = [one for one in folders_of(works) if one not in checked.recipe.forgotten]
    if not found or is_finished(checked, work, earlier):
        return checked
    forgotten = (*checked.recipe.forgotten, *found)
    return CheckedRecipe(checked.recipe.replace(forgotten=forgotten), checked.where)


@contextlib.contextmanager
def _logged(log: EventLog, checked: CheckedRecipe, limits: RunLimits) -> Iterator[dict[str, float]]:
    """Log how a run began and ended; give the planned seconds of its stages."""
    planned = read_plan(limits.plan) if limits.plan else {}
    began = time.monotonic()
    log.write("run_started", recipe=checked.recipe.name, file=checked.where, planned=planned)
    try:
        yield planned
    except BaseException as error:
        with contextlib.suppress(StorageError):  # what ended the run matters more
            log.write("run_failed", error=" ".join(str(error).split()) or type(error).__name__)
        raise
    log.write("run_finished", seconds=round(time.monotonic() - began, 3))


def _disk_check(work: str, max_disk: str | None) -> Callable[[], object]:
    """What looks at the disk now and then."""
    if max_disk is None:
        return lambda: None
    return DiskBudget(work, parse_bytes(max_disk)).check


def _reopen_failed(work: str, allowed: int) -> None:
    """Let a run that accepted failed shards try them again, where fewer are accepted now."""
    if not storage.exists(storage.join(work, RUN_FILE)):
        return
    record = read_run(work)
    for entry in (*record.pool, *(entry for flow in record.sets.values() for entry in flow)):
        folder = StageFolder(storage.join(work, entry.folder), entry.stage)
        reopen_failed(folder, entry.record, allowed)


@contextlib.contextmanager
def demo_site(recipe: Recipe, work: str) -> Iterator[None]:
    """Serve the demo's site while a recipe that names it runs."""
    if recipe.demo_site is None:
        yield
        return
    folder = Path(work) / "site"
    build_site(recipe.demo_site, folder)
    with serve_site(recipe.demo_site, folder):
        yield


def _run_steps(
    checked: CheckedRecipe, record: RunRecord, work: str, *, quiet: bool
) -> dict[str, dict[str, Any]]:
    """Pretrain, evaluate and report, each only if what it rests on has changed."""
    results: dict[str, dict[str, Any]] = {}
    recipe = checked.recipe

    def open_seal() -> None:
        """Until the steps are through, the seal speaks of stages and sets alone."""
        if is_sealed_whole(work):
            write_seal(work, record, whole=False)

    digest = _manifest_digest(record, work)
    if recipe.pretrain is not None and record.packed is not None:
        results["pretrain"] = _step(
            storage.join(work, "pretrain"),
            digest_of("pretrain", recipe.pretrain.model_dump_json(), digest),
            lambda: _pretrain(recipe, record, work, quiet=quiet),
            open_seal,
        )
    if recipe.evaluate is not None and recipe.pretrain is not None:
        results["evaluate"] = _step(
            storage.join(work, "evaluate"),
            digest_of("evaluate", recipe.evaluate.model_dump_json(), results["pretrain"]["key"]),
            lambda: _evaluate(recipe, work),
            open_seal,
        )
    keys = [step["key"] for step in results.values()]
    results["report"] = _step(
        storage.join(work, "work", "report"),
        digest_of("report", record.stamp, [entry.record.key for entry in record.pool], keys),
        lambda: _report(work),
        open_seal,
    )
    return results


def _step(
    folder: str, key: str, action: Callable[[], Any], before: Callable[[], None]
) -> dict[str, Any]:
    """Run an action unless its result with the same key is there; `before`, where it is run."""
    path = storage.join(folder, _STEP_FILE)
    if storage.exists(path):
        found: dict[str, Any] = storage.read_json(path)
        if found.get("key") == key:
            return {**found, "ran": False}
    before()
    result = {"key": key, "result": action()}
    storage.write_json(path, result)
    return {**result, "ran": True}


def _pretrain(recipe: Recipe, record: RunRecord, work: str, *, quiet: bool) -> dict[str, Any]:
    from pipelines.cli.training import pretrain_on

    assert recipe.pretrain is not None, "called without a pretrain step"
    packed = storage.join(work, str(record.packed))
    out = storage.join(work, "pretrain")
    changes = list(recipe.pretrain.set)
    result = pretrain_on(recipe.pretrain.config, packed, out, changes, quiet=quiet)
    if not result["finished"]:
        raise StageError(
            f"{out}: pretraining was stopped after {result['steps']} steps; run the same command "
            "again to go on"
        )
    return result


def _evaluate(recipe: Recipe, work: str) -> dict[str, Any]:
    from pipelines.cli.training import evaluate_knn

    assert recipe.evaluate is not None, "called without an evaluate step"
    backbone = storage.join(work, "pretrain", "backbone.safetensors")
    step = recipe.evaluate
    return evaluate_knn(backbone, step.train, step.test, step.k)


def _report(work: str) -> dict[str, Any]:
    from pipelines.web.report.page import write_page

    return {"page": write_page(work, storage.join(work, "report.html"))}


def _emptied_by(record: RunRecord) -> str | None:
    """The stage that dropped the last image, where none is left."""
    return next((one.stage for one in record.pool if not one.record.rows_out), None)


def _manifest_digest(record: RunRecord, work: str) -> str:
    if record.manifest is None:
        return ""
    return Dataset.open(storage.join(work, record.manifest)).manifest.content_digest


def _summary(
    record: RunRecord, work: str, results: dict[str, Any], worked: bool, seconds: float
) -> dict[str, Any]:
    marks = None
    truth = Path(work) / "site" / "truth.parquet"
    if truth.exists():
        from pipelines.run.demo_marks import mark

        marks = mark(record, work, truth)
    return {
        "recipe": record.recipe,
        "worked": worked,
        "seconds": round(seconds, 1),
        "funnel": [vars(row) for row in funnel(record)],
        "empty": _emptied_by(record),
        "content_digest": _manifest_digest(record, work),
        "manifest": storage.join(work, record.manifest) if record.manifest else None,
        "packed": storage.join(work, record.packed) if record.packed else None,
        "report": results["report"]["result"]["page"],
        "pretrain": results.get("pretrain", {}).get("result"),
        "evaluate": results.get("evaluate", {}).get("result"),
        "marks": marks,
    }


def _print_summary(summary: dict[str, Any], record: RunRecord) -> None:
    console.print_funnel(funnel(record), title=f"{summary['recipe']}: rows through each stage")
    if summary["marks"] is not None:
        console.print_marks(summary["marks"])
    lines = {
        "manifest": summary["manifest"],
        "content digest": summary["content_digest"],
        "packed shards": summary["packed"],
        "report": summary["report"],
        "checkpoint": (summary["pretrain"] or {}).get("backbone"),
        "k-NN": (summary["evaluate"] or {}).get("text"),
    }
    console.print_pairs({name: value for name, value in lines.items() if value}, title="")
    if summary["empty"]:
        console.print_line(f"no image is left: {summary['empty']} dropped the last of them")
    done = "done" if summary["worked"] else "nothing to do: everything was finished before"
    console.print_line(f"{done}, in {summary['seconds']:.1f} s")
