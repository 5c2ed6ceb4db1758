"""What earlier deliveries kept: of a run of a recipe, or of `curate dedup` alone.

A delivery remembers the one that it was compared with, so that a chain of them is followed.
"""

from dataclasses import dataclass
from pathlib import Path

from curation import storage
from curation.config import Settings, parse_settings
from curation.dataset import Dataset, open_foreign
from curation.digest import digest_of
from curation.errors import ConfigError, DatasetError
from curation.pool import Pool, UnionPool
from curation.stage import DECISIONS, Stage
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.run.run_record import POOL

_INPUTS_FILE = "_inputs.json"


@dataclass(frozen=True)
class PreviousRuns:
    """Earlier runs of a recipe, the latest first."""

    works: tuple[WorkFolder, ...]

    @classmethod
    def open(cls, path: str) -> "PreviousRuns":
        """A run and those that it was compared with.

        Raises:
            DatasetError: no finished run there.
        """
        works: list[WorkFolder] = []
        following: str | None = absolute(path)
        while following is not None:
            if any(work.path == following for work in works):
                raise DatasetError(f"{following}: is its own base; name an earlier run")
            works.append(WorkFolder(following))
            following = works[-1].record.base
        return cls(tuple(works))

    @property
    def path(self) -> str:
        """Work folder of the latest."""
        return self.works[0].path

    @property
    def digest(self) -> str:
        """Digest of the content that all of them made."""
        entries = [entry for work in self.works for entry in work.record.pool]
        return digest_of([(entry.stage, sorted(entry.record.outputs.items())) for entry in entries])

    def kept_by(self, stage: Stage) -> tuple[Pool, ...]:
        """The rows that each run kept at a stage, with all side-cars that they had then.

        Raises:
            ConfigError: a run has no such stage.
        """
        if not stage.compares_with_previous:
            return ()
        return tuple(_pool_after(work, stage.name()) for work in self.works)

    def settled(self, stage: Stage) -> Stage:
        """The stage with what it leaves to the machine as the latest run had it."""
        done = self.works[0].stage(POOL, stage.name())
        values = stage.model_dump(mode="json")
        left_open = [name for name, value in values.items() if value == "auto"]
        if done is None or not left_open:
            return stage
        recorded = done.entry.record.settings
        known = {name: recorded[name] for name in left_open if name in recorded}
        return parse_settings(type(stage), {**values, **known}, done.path)


def _pool_after(work: WorkFolder, stage_name: str) -> Pool:
    """The pool of a finished run as it was after the last stage of a name."""
    stages = work.stages(POOL)
    names = [stage.name for stage in stages]
    if stage_name not in names:
        raise ConfigError(
            f"{work.path}: has no stage '{stage_name}' to compare with; name a run of a recipe "
            "with the same stages as the base"
        )
    last = len(names) - 1 - names[::-1].index(stage_name)
    pool = Pool("base", {})
    for stage in stages[: last + 1]:
        if stage.is_union and not isinstance(pool, UnionPool):
            parts = (*(whole_flow(work, name) for name in work.record.as_is), pool)
            pool = UnionPool("base", {}, None, parts)
        pool = _with(pool, stage)
    return pool


def whole_flow(work: WorkFolder, flow: str) -> Pool:
    """The rows of a flow after the last stage of its own, with all that is known of them."""
    pool = Pool(flow, {})
    for stage in work.stages(flow):
        pool = pool if stage.is_union else _with(pool, stage)
    return pool


def _with(pool: Pool, stage: FinishedStage) -> Pool:
    """The pool with the outputs of one more stage that are still there and do not vary."""
    left_out = {DECISIONS, "raw", *stage.entry.built().varying_outputs()}
    names = [name for name in stage.entry.record.outputs if name not in left_out]
    return pool.with_stage({name: stage.output(name) for name in names}, stage.decisions)


class DedupInputs(Settings):
    """What a finished `curate dedup` read."""

    embeddings: str
    """Where they lay."""
    embedding_column: str
    """Column of their vectors."""
    content_digest: str
    """Their digest."""
    base: str | None = None
    """Output of the earlier dedup that it was compared with."""


def record_inputs(out: str, given: str, read: Dataset, column: str, base: str | None) -> None:
    """Write which embeddings a finished `curate dedup` read, so that it can be a base.

    given: as named on the command line. read: the same, or its copy under ids of ours.
    """
    inputs = DedupInputs(
        embeddings=absolute(read.path if Dataset.is_finished(read.path) else given),
        embedding_column=column,
        content_digest=read.manifest.content_digest,
        base=None if base is None else absolute(base),
    )
    storage.write_json(storage.join(out, _INPUTS_FILE), inputs.model_dump(mode="json"))


def kept_by_dedup(
    path: str, embeddings: Dataset | None, layer: str, column: str
) -> tuple[Pool, ...]:
    """The rows that an earlier `curate dedup` kept, and those that it was compared with.

    embeddings: of the rows of `path`, where they no longer lie where it found them. layer, column:
    names under which the vectors are to be found.

    Raises:
        DatasetError: `path` is no output of `curate dedup`, or its embeddings are not to be found
            or are not those that it read.
    """
    pools: list[Pool] = []
    following: str | None = path.rstrip("/")
    while following is not None:
        file, recorded = storage.join(following, _INPUTS_FILE), None
        if storage.exists(file):
            recorded = parse_settings(DedupInputs, storage.read_json(file), file)
        if embeddings is not None:
            _check_moved(following, recorded, embeddings)
            dataset = embeddings
        elif recorded is not None:
            dataset = _recorded_embeddings(following, recorded, column)
        else:
            raise DatasetError(
                f"{following}: does not say which embeddings it is about (no {_INPUTS_FILE}); name "
                "the output of an earlier `curate dedup`, or give --base-embeddings as well"
            )
        pools.append(_kept_rows(following, dataset, layer))
        following, embeddings = recorded.base if recorded else None, None
    return tuple(pools)


def _check_moved(path: str, recorded: DedupInputs | None, embeddings: Dataset) -> None:
    """Refuse other embeddings than those that some decisions are about, as far as digests tell.

    Of foreign files read as they are, only names and sizes are known, which change as they move.
    """
    is_plain = embeddings.attributes.get("foreign") and not embeddings.attributes.get("own_ids")
    told = None if recorded is None or is_plain else recorded.content_digest
    if told not in (None, embeddings.manifest.content_digest):
        raise DatasetError(
            f"{path}: is about other embeddings than {embeddings.path}; give --base-embeddings "
            "those that it read"
        )


def _recorded_embeddings(path: str, recorded: DedupInputs, column: str) -> Dataset:
    """The embeddings that an earlier `curate dedup` read, if they are still what they were."""
    where = recorded.embeddings
    try:
        dataset = open_foreign(where)
    except DatasetError as error:
        raise DatasetError(
            f"{path}: its embeddings are gone from {where}; give --base-embeddings"
        ) from error
    if dataset.manifest.content_digest != recorded.content_digest:
        raise DatasetError(
            f"{path}: its embeddings in {where} have changed since; give --base-embeddings"
        )
    if recorded.embedding_column != column:
        raise ConfigError(
            f"{path}: read its vectors from the column '{recorded.embedding_column}', not from "
            f"'{column}'; write both under one name"
        )
    return dataset


def _kept_rows(path: str, embeddings: Dataset, layer: str) -> Pool:
    decisions = Dataset.open(path)
    if embeddings.num_shards != decisions.num_shards:
        raise DatasetError(
            f"{path}: has {decisions.num_shards} shards, {embeddings.path} has "
            f"{embeddings.num_shards}; give the embeddings that these decisions are about"
        )
    return Pool("base", {layer: embeddings}).with_stage({}, decisions)


def absolute(path: str) -> str:
    """A path as it is found from anywhere; URLs are that already."""
    return str(Path(path).resolve()) if "://" not in path else path
