"""A whole run of a recipe: locked, logged and sealed, with what follows the manifest."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from curation import storage
from curation.dataset import Dataset
from curation.digest import digest_of
from curation.errors import ConfigError, LedgerError, StageError, StorageError
from curation.lock import locked
from curation.lost_files import reopen_failed
from curation.stage import Engine, StageFolder
from embedder.errors import one_line
from pipelines.audit.funnel import adds_up, funnel
from pipelines.audit.seal import is_sealed_whole, write_seal
from pipelines.audit.tombstones import folders_of
from pipelines.engines.metered_engine import MeteredEngine
from pipelines.operate.console import ConsoleWatcher
from pipelines.operate.disk_budget import DiskBudget, parse_bytes
from pipelines.operate.events import EventLog, RunObserver
from pipelines.operate.planner import read_plan
from pipelines.run.demo_site import site_of
from pipelines.run.previous_runs import PreviousRuns, absolute
from pipelines.run.recipe import (
    CheckedRecipe,
    EvaluateStep,
    PretrainStep,
    Recipe,
    load_recipe,
)
from pipelines.run.run_record import RUN_FILE, RunRecord, read_run
from pipelines.run.runner import RecipeRun, is_finished

logger = logging.getLogger(__name__)

_STEP_FILE = "_step.json"
Figures = dict[str, JsonValue]
Action = Callable[[], Figures]


@dataclass(frozen=True)
class RunLimits:
    """What a run may take and lose, and what it was planned to take."""

    max_failed_shards: int = 0
    """Shards of each stage that may keep failing."""
    max_disk: str | None = None
    """Size of the work folder, such as 200GB."""
    plan: str | None = None
    """What `curate plan --out` wrote."""


@dataclass(frozen=True)
class Step:
    """What follows the manifest: training, its evaluation, or the report."""

    key: str
    """Digest of what it rests on: the same key, nothing to do."""
    result: Figures
    ran: bool = False
    """Whether this run did it, and not an earlier one."""


@dataclass(frozen=True)
class FinishedRun:
    """A run and what followed it."""

    record: RunRecord
    steps: dict[str, Step]
    worked: bool
    """Whether anything was to do."""


def run_recipe(
    name: str,
    work: str,
    engine: Engine,
    *,
    changes: Sequence[str] = (),
    base: str | None = None,
    limits: RunLimits = RunLimits(),
    quiet: bool = False,
) -> FinishedRun:
    """Run a recipe with everything that follows the manifest.

    base: work folder of an earlier run, whose rows are not taken again.
    """
    work = work.rstrip("/")
    checked = load_recipe(name, {"work": work}, changes)
    previous = None if base is None else PreviousRuns.open(base)
    if previous is not None and absolute(work) in [one.path for one in previous.works]:
        raise ConfigError(f"--base {base}: is --work itself, or rests on it; choose a new folder")
    checked = _without_forgotten(checked, work, previous)
    log, planned = EventLog(work), read_plan(limits.plan) if limits.plan else {}
    watcher = ConsoleWatcher(quiet=quiet, planned=planned)
    with locked(work):
        with _logged(log, checked, planned):
            budget = DiskBudget(work, parse_bytes(limits.max_disk)) if limits.max_disk else None
            observer = RunObserver(log, watcher, engine, planned, budget)
            if storage.exists(storage.join(work, RUN_FILE)):
                # Shards that an earlier run accepted as failed are tried again, if now too many.
                for entry in read_run(work).entries:
                    folder = StageFolder(storage.join(work, entry.folder), entry.stage)
                    reopen_failed(folder, entry.record, limits.max_failed_shards)
            with site_of(checked.recipe.demo_site, work):
                _check_nodes(checked, work, engine, previous)
                metered = MeteredEngine(engine, observer.heard)
                recipe_run = RecipeRun(
                    checked, work, metered, observer, previous, limits.max_failed_shards
                )
                record = recipe_run.run()
            if recipe_run.published:
                write_seal(work, record, whole=False)
            if not adds_up(funnel(record)):
                raise LedgerError(
                    f"{work}: the funnel does not add up; please report this with run.json"
                )
            steps = _run_steps(checked.recipe, record, work, quiet=quiet)
        if not is_sealed_whole(work):
            write_seal(work, record)
    return FinishedRun(record, steps, watcher.num_run > 0 or any(s.ran for s in steps.values()))


def _check_nodes(
    checked: CheckedRecipe, work: str, engine: Engine, previous: PreviousRuns | None
) -> None:
    """Compare the nodes of a cluster before they do anything, as far as that takes seconds.

    Raises:
        StageError: they are not alike, or lack something.
    """
    if engine.is_one_machine or is_finished(checked, work, previous):
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
    checked: CheckedRecipe, work: str, previous: PreviousRuns | None
) -> CheckedRecipe:
    """The recipe with the tombstones of its work folder and of previous ones.

    A finished run has nothing to do: what it was made to forget is out of it.
    """
    works = [work, *(one.path for one in previous.works)] if previous else [work]
    found = [one for one in folders_of(works) if one not in checked.recipe.forgotten]
    if not found or is_finished(checked, work, previous):
        return checked
    forgotten = (*checked.recipe.forgotten, *found)
    return CheckedRecipe(checked.recipe.replace(forgotten=forgotten), checked.where)


@contextlib.contextmanager
def _logged(log: EventLog, checked: CheckedRecipe, planned: dict[str, float]) -> Iterator[None]:
    """Log how a run began and ended."""
    began = time.monotonic()
    log.write("run_started", recipe=checked.recipe.name, file=checked.where, planned=planned)
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(StorageError):  # what ended the run matters more
            log.write("run_failed", error=one_line(error) or type(error).__name__)
        raise
    log.write("run_finished", seconds=round(time.monotonic() - began, 3))


def _run_steps(recipe: Recipe, record: RunRecord, work: str, *, quiet: bool) -> dict[str, Step]:
    """Pretrain, evaluate and report, each only if what it rests on has changed."""
    steps: dict[str, Step] = {}

    def step(name: str, folder: str, parts: Sequence[object], action: Action) -> None:
        key, path = digest_of(name, *parts), storage.join(work, folder, _STEP_FILE)
        if storage.exists(path):
            found = storage.read_json(path)
            if found.get("key") == key:
                steps[name] = Step(key, found["result"])
                return
        if is_sealed_whole(work):  # until the steps are through, the seal speaks of stages alone
            write_seal(work, record, whole=False)
        steps[name] = Step(key, action(), ran=True)
        storage.write_json(path, {"key": key, "result": steps[name].result})

    train, evaluate = recipe.pretrain, recipe.evaluate
    if train is not None and record.packed is not None:
        parts = (train.model_dump_json(), manifest_digest(record, work))
        step("pretrain", "pretrain", parts, lambda: _pretrain(train, record, work, quiet=quiet))
    if evaluate is not None and train is not None:
        parts = (evaluate.model_dump_json(), steps["pretrain"].key)
        step("evaluate", "evaluate", parts, lambda: _evaluate(evaluate, work))
    keys = [one.key for one in steps.values()]
    rests_on = (record.stamp, [entry.record.key for entry in record.pool], keys)
    step("report", storage.join("work", "report"), rests_on, lambda: _report(work))
    return steps


def _pretrain(step: PretrainStep, record: RunRecord, work: str, *, quiet: bool) -> Figures:
    from pipelines.run.training import train
    from pretrain.config import load_config

    packed, out = storage.join(work, str(record.packed)), storage.join(work, "pretrain")
    result = train(load_config(step.config, list(step.set)), packed, out, quiet=quiet)
    if not result["finished"]:
        raise StageError(
            f"{out}: pretraining was stopped after {result['steps']} steps; run the same command "
            "again to go on"
        )
    return result


def _evaluate(step: EvaluateStep, work: str) -> Figures:
    from pipelines.run.training import evaluate_knn

    backbone = storage.join(work, "pretrain", "backbone.safetensors")
    return evaluate_knn(backbone, step.train, step.test, step.k)


def _report(work: str) -> Figures:
    from pipelines.web.report.page import write_page

    return {"page": write_page(work, storage.join(work, "report.html"))}


def manifest_digest(record: RunRecord, work: str) -> str:
    """Content digest of the finished set; empty where the recipe makes none."""
    if record.manifest is None:
        return ""
    return Dataset.open(storage.join(work, record.manifest)).manifest.content_digest
