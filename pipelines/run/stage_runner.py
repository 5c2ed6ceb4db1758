"""Runs one stage: works out its key, resumes what a killed run left, and commits it."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from curation import storage
from curation.dataset import Dataset
from curation.digest import digest_of
from curation.errors import ConfigError, EngineError, StageError
from curation.ledger import (
    Receipt,
    StageRecord,
    commit_failed_shard,
    commit_shard,
    finish_stage,
    finished_shards,
    open_outputs,
    read_stage,
)
from curation.lock import LOCK_FILE, locked
from curation.lost_files import lost_files, reopen, reopen_failed
from curation.pool import Pool
from curation.stage import (
    DECISIONS,
    DatasetStage,
    Engine,
    Resources,
    Shard,
    ShardStage,
    Stage,
    StageFolder,
    StageInputs,
    Task,
)
from pipelines.operate.forecast import step_name

logger = logging.getLogger(__name__)

_KEY_FILE = "_key.json"


class Watcher(Protocol):
    """Hears of the progress of a stage."""

    def started(self, stage: str, total: int, done: int) -> None:
        """A stage begins with `total` shards, of which `done` were finished before."""

    def advanced(self, stage: str, receipt: Receipt) -> None:
        """One shard is finished."""

    def finished(self, stage: str, record: StageRecord, reused: bool) -> None:
        """A stage is committed, or was found committed."""


@dataclass(frozen=True)
class _ProcessShard(Task[int, Any, Receipt]):
    """One shard through a `ShardStage`."""

    stage: ShardStage
    pool: Pool
    folder: StageFolder

    @property
    def resources(self) -> Resources:
        return self.stage.resources()

    def open(self) -> Any:
        return self.stage.open()

    def __call__(self, item: int, opened: Any) -> Receipt:
        shard = Shard(self.pool.read(item, columns_read(self.stage, self.pool)), item)
        self.stage.process(shard, opened)
        return commit_shard(self.stage, self.folder, shard)


def columns_read(stage: Stage, pool: Pool) -> tuple[str, ...]:
    """Columns that a stage reads from this pool: those it needs, and those it uses if present."""
    present = set(pool.columns)
    return (
        *stage.required_columns(),
        *(name for name in stage.optional_columns() if name in present),
    )


def stage_key(stage: Stage, inputs: StageInputs) -> str:
    """Digest of the stage's version and settings and of the content of its inputs."""
    pools = [inputs.pool, *(inputs.sets[name] for name in sorted(inputs.sets))]
    needed = columns_read(stage, inputs.pool) if isinstance(stage, ShardStage) else None
    contents = [pool.fingerprint(needed) for pool in pools if pool.has_rows]
    contents += [f"base {pool.fingerprint(needed)}" for pool in inputs.base]
    return digest_of(
        stage.name(),
        stage.version,
        stage.model_dump_json(),
        stage.fingerprint(),
        contents,
        inputs.seed,
    )


def run_stage(
    stage: Stage,
    inputs: StageInputs,
    folder: StageFolder,
    engine: Engine,
    watcher: Watcher,
    *,
    key: str | None = None,
) -> tuple[StageRecord, dict[str, Dataset]]:
    """Run a stage, or find it finished; give its record and its outputs by name.

    key: what `stage_key` gave for these inputs, where the caller has asked already.

    Raises:
        LockError: another process writes there.
        StageError: the folder holds another stage, or the same with other settings or inputs.
        EngineError: shards failed; the finished ones are kept.
    """
    key = key or stage_key(stage, inputs)
    with contextlib.ExitStack() as locks:
        for path in (folder.path, *dict(folder.elsewhere).values()):
            locks.enter_context(locked(path))
        return _run_or_find(stage, inputs, folder, engine, watcher, key)


def _run_or_find(
    stage: Stage,
    inputs: StageInputs,
    folder: StageFolder,
    engine: Engine,
    watcher: Watcher,
    key: str,
) -> tuple[StageRecord, dict[str, Dataset]]:
    _check_same(folder, key)
    _reopen_lost(folder)
    record = read_stage(folder)
    reopened = record is not None and reopen_failed(folder, record, engine.max_failed_shards)
    if record is not None and not reopened:
        storage.remove(folder.scratch)  # where the run that finished it was killed at that
        watcher.finished(folder.stage, record, True)
        return record, open_outputs(stage, folder)
    storage.write_json(storage.join(folder.path, _KEY_FILE), {"key": key, "stage": folder.stage})
    try:
        record = _run_anew(stage, inputs, folder, engine, watcher, key)
    except ConfigError:
        _let_go(folder)
        raise
    watcher.finished(folder.stage, record, False)
    return record, open_outputs(stage, folder)


def _reopen_lost(folder: StageFolder) -> None:
    """Have shards made again whose files are no longer there."""
    lost = lost_files(folder)
    if lost.paths:
        logger.warning("%s: %s; made again, and nothing else of it", folder.stage, lost)
        reopen(folder, lost.shards)


def _let_go(folder: StageFolder) -> None:
    """Let a folder be used with other settings: these did not fit, and nothing was finished."""
    if not finished_shards(folder):
        storage.remove(folder.scratch)
        storage.remove(storage.join(folder.path, _KEY_FILE))


def _run_anew(
    stage: Stage,
    inputs: StageInputs,
    folder: StageFolder,
    engine: Engine,
    watcher: Watcher,
    key: str,
) -> StageRecord:
    began = time.monotonic()
    figures: dict[str, Any] = {}
    if isinstance(stage, ShardStage):
        for receipt in _process_shards(stage, inputs.pool, folder, engine, watcher):
            watcher.advanced(folder.stage, receipt)
    elif isinstance(stage, DatasetStage):
        watcher.started(folder.stage, 0, 0)
        figures = stage.run(inputs, folder, engine)
    expected = inputs.pool.num_rows if inputs.pool.has_rows else None
    return finish_stage(
        stage,
        folder,
        key,
        finished_shards(folder).values(),
        expected_rows=expected,
        figures=figures,
        seconds=time.monotonic() - began,
    )


def _process_shards(
    stage: ShardStage, pool: Pool, folder: StageFolder, engine: Engine, watcher: Watcher
) -> Iterator[Receipt]:
    done = {index: one for index, one in finished_shards(folder).items() if not one.failure}
    waiting = [index for index in range(pool.num_shards) if index not in done]
    watcher.started(folder.stage, pool.num_shards, len(done))
    if done:
        logger.info("%s: %d of %d shards were finished", folder.stage, len(done), pool.num_shards)
    task = _ProcessShard(stage, pool, folder)
    try:
        for _, receipt in engine.map(task, waiting, folder.stage):
            yield receipt
    except EngineError as error:
        error.can_be_accepted = bool(error.failures)
        if not 0 < len(error.failures) <= engine.max_failed_shards:
            raise
        logger.warning("%s: %s; accepted", folder.stage, error)
        for index, cause in error.failures:
            yield commit_failed_shard(stage, folder, index, pool.live_ids(index), cause)


def _check_same(folder: StageFolder, key: str) -> None:
    """Refuse to mix two runs in one folder."""
    path = storage.join(folder.path, _KEY_FILE)
    if not storage.exists(path):
        if set(storage.list_files(folder.path)) - {LOCK_FILE}:
            raise StageError(
                f"{folder.path}: holds other files; choose an empty or new folder for the output"
            )
        return
    if storage.read_json(path).get("key") != key:
        raise StageError(
            f"{folder.path}: was written with other settings or inputs; remove it or choose "
            "another folder"
        )


@dataclass(frozen=True)
class OfSet:
    """Tells another watcher of the stages that a set passes, as `SET/STAGE`."""

    watcher: Watcher
    set_name: str

    def started(self, stage: str, total: int, done: int) -> None:
        """Tell of it under the set's name."""
        self.watcher.started(step_name(self.set_name, stage), total, done)

    def advanced(self, stage: str, receipt: Receipt) -> None:
        """Tell of it under the set's name."""
        self.watcher.advanced(step_name(self.set_name, stage), receipt)

    def finished(self, stage: str, record: StageRecord, reused: bool) -> None:
        """Tell of it under the set's name."""
        self.watcher.finished(step_name(self.set_name, stage), record, reused)


class Silent:
    """A watcher that says nothing."""

    def started(self, stage: str, total: int, done: int) -> None:
        """Say nothing."""

    def advanced(self, stage: str, receipt: Receipt) -> None:
        """Say nothing."""

    def finished(self, stage: str, record: StageRecord, reused: bool) -> None:
        """Say nothing."""


__all__ = ["DECISIONS", "OfSet", "Silent", "Watcher", "run_stage", "stage_key"]
