"""Runs one stage: works out its key, resumes what a killed run left, and commits it."""

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Any, Protocol

from curation import storage
from curation.dataset import Dataset
from curation.digest import digest_of
from curation.errors import ConfigError, EngineError, FailedShardsError, StageError
from curation.image_filter import ImageFilter, measure_in_turn
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
from curation.score_files import ScoreFiles
from curation.stage import (
    DatasetStage,
    Engine,
    Figures,
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
class _FilterShard(Task[int, dict[int, Any], Receipt]):
    """One shard through a filter, and through those behind it as far as they look at pixels.

    What these measure is kept for their own turn; then they decode nothing.
    """

    filters: tuple[ImageFilter, ...]
    pool: Pool
    folder: StageFolder
    shared_scores: str

    @property
    def resources(self) -> Resources:
        return max((one.resources() for one in self.filters), key=lambda one: one.memory)

    def open(self) -> dict[int, Any]:
        """Models by filter, opened with the first shard that is measured here."""
        return {}

    def __call__(self, item: int, opened: dict[int, Any]) -> Receipt:
        stage, *others = (ScoreFiles(one, self.shared_scores) for one in self.filters)
        columns = {name: None for one in self.filters for name in columns_read(one, self.pool)}
        scores = stage.read(item, self.pool.live_ids(item))
        if scores is not None:
            columns = {name: None for name in columns if name not in ("image", "boxes")}
        shard = Shard(self.pool.read(item, [*columns]), item)
        if scores is None:
            for number, one in enumerate(self.filters):
                if number not in opened:
                    opened[number] = one.open()
            pairs = [(one, opened[number]) for number, one in enumerate(self.filters)]
            scores, *further = measure_in_turn(shard, pairs)
            for other, measured in zip(others, further, strict=True):
                other.write(item, shard.ids, measured)
        scores.judge(stage.stage, shard)
        return commit_shard(stage.stage, self.folder, shard)


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
    of_shards = isinstance(stage, ShardStage) and not stage.set_names()
    needed = columns_read(stage, inputs.pool) if of_shards else None
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


@dataclass(frozen=True)
class StageRunner:
    """Runs stages on an engine, and tells a watcher how far they are."""

    engine: Engine
    watcher: Watcher
    max_failed_shards: int = 0
    """Shards of a stage that may keep failing: their rows are dropped, and the run goes on."""

    def run(
        self,
        stage: Stage,
        inputs: StageInputs,
        folder: StageFolder,
        *,
        key: str | None = None,
        set_name: str = "",
    ) -> tuple[StageRecord, dict[str, Dataset]]:
        """Run a stage, or find it finished; give its record and its outputs by name.

        key: what `stage_key` gave for these inputs, where the caller has asked already.
        set_name: the set that passes the stage; empty for the pool.

        Raises:
            LockError: another process writes there.
            StageError: the folder holds another stage, or the same with other settings or inputs.
            EngineError: shards failed; the finished ones are kept.
        """
        key = key or stage_key(stage, inputs)
        step = step_name(set_name, folder.stage)
        with contextlib.ExitStack() as locks:
            for path in (folder.path, *dict(folder.elsewhere).values()):
                locks.enter_context(locked(path))
            record = self._finished_before(folder, key)
            reused = record is not None
            if record is None:
                record = self._finish(stage, inputs, folder, key, step)
            self.watcher.finished(step, record, reused)
            return record, open_outputs(stage, folder)

    def _finished_before(self, folder: StageFolder, key: str) -> StageRecord | None:
        """The record of a stage that is whole, and whose failed shards are accepted still."""
        _check_same(folder, key)
        lost = lost_files(folder)
        if lost.paths:
            logger.warning("%s: %s; made again, and nothing else of it", folder.stage, lost)
            reopen(folder, lost.shards)
        record = read_stage(folder)
        if record is None or reopen_failed(folder, record, self.max_failed_shards):
            return None
        storage.remove(folder.scratch)  # where the run that finished it was killed at that
        return record

    def _finish(
        self, stage: Stage, inputs: StageInputs, folder: StageFolder, key: str, step: str
    ) -> StageRecord:
        """Do what is left of a stage, and commit it."""
        began = time.monotonic()
        key_file = storage.join(folder.path, _KEY_FILE)
        storage.write_json(key_file, {"key": key, "stage": folder.stage})
        figures: Figures = {}
        try:
            if isinstance(stage, ShardStage):
                bound = stage.bound(inputs)
                self._process_shards(bound, inputs, folder, step)
                figures = bound.figures()
            elif isinstance(stage, DatasetStage):
                self.watcher.started(step, 0, 0)
                figures = stage.run(inputs, folder, self.engine)
        except ConfigError:
            if not finished_shards(folder):  # the folder may be used with settings that fit
                storage.remove(folder.scratch)
                storage.remove(key_file)
            raise
        return finish_stage(
            stage,
            folder,
            key,
            finished_shards(folder).values(),
            expected_rows=inputs.pool.num_rows if inputs.pool.has_rows else None,
            figures=figures,
            seconds=time.monotonic() - began,
        )

    def _process_shards(
        self, stage: ShardStage, inputs: StageInputs, folder: StageFolder, step: str
    ) -> None:
        """Commit the shards that have no receipt yet."""
        pool = inputs.pool
        done = {index for index, one in finished_shards(folder).items() if not one.failure}
        waiting = [index for index in range(pool.num_shards) if index not in done]
        self.watcher.started(step, pool.num_shards, len(done))
        if done:
            text = "%s: %d of %d shards were finished"
            logger.info(text, folder.stage, len(done), pool.num_shards)
        task: Task[int, Any, Receipt] = _ProcessShard(stage, pool, folder)
        if isinstance(stage, ImageFilter) and inputs.shared_scores is not None:
            filters = (stage, *(one for one in inputs.followers if isinstance(one, ImageFilter)))
            task = _FilterShard(filters, pool, folder, inputs.shared_scores)
        try:
            for _, receipt in self.engine.map(task, waiting, folder.stage):
                self.watcher.advanced(step, receipt)
        except EngineError as error:
            if not error.failures:
                raise
            if len(error.failures) > self.max_failed_shards:
                raise FailedShardsError(str(error), error.failures) from error
            logger.warning("%s: %s; accepted", folder.stage, error)
            for index, cause in error.failures:
                rows = pool.live_ids(index)
                receipt = commit_failed_shard(stage, folder, index, rows, cause)
                self.watcher.advanced(step, receipt)


def run_stage(
    stage: Stage, inputs: StageInputs, folder: StageFolder, engine: Engine, watcher: Watcher
) -> tuple[StageRecord, dict[str, Dataset]]:
    """Run one stage by itself (see `StageRunner.run`)."""
    return StageRunner(engine, watcher).run(stage, inputs, folder)


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


class Silent:
    """A watcher that says nothing."""

    def started(self, stage: str, total: int, done: int) -> None:
        """Say nothing."""

    def advanced(self, stage: str, receipt: Receipt) -> None:
        """Say nothing."""

    def finished(self, stage: str, record: StageRecord, reused: bool) -> None:
        """Say nothing."""
