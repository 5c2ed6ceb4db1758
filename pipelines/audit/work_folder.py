"""A finished run as auditors read it: its flows, their stages, and where each row lies."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from curation import storage
from curation.dataset import Dataset
from curation.exchange import bucket_of_id
from curation.stage import DECISIONS
from pipelines.run.run_record import POOL, RUN_FILE, RunRecord, StageEntry, read_run

CATALOG_FILE = "_catalog.duckdb"
"""What `curate serve` finds rows by."""


@dataclass(frozen=True)
class FinishedStage:
    """One stage of one flow, and which of its shards hold which flow's rows."""

    flow: str
    entry: StageEntry
    path: str
    """Its folder."""
    ranges: dict[str, tuple[int, int]]
    """Flow -> first shard with its rows, and their number; several in a union."""
    opened: dict[str, Dataset] = field(default_factory=dict, compare=False)
    """Data sets by their path: of many shards, a manifest takes a while to read."""

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.entry.stage

    @property
    def is_union(self) -> bool:
        """Whether the stage saw the sets taken as they are together with the pool."""
        return len(self.ranges) > 1

    @cached_property
    def decisions(self) -> Dataset:
        """Its decisions."""
        return self.output(DECISIONS)

    def output(self, name: str) -> Dataset:
        """One of its outputs, opened once.

        Raises:
            DatasetError: it has no such output.
        """
        return _open_once(storage.join(self.path, name), self.opened)

    @cached_property
    def embeddings(self) -> list[str]:
        """Names of its outputs that are vectors of an embedding space."""
        names = (name for name in self.entry.record.outputs if name != DECISIONS)
        return [name for name in names if "space" in self.output(name).attributes]

    def has(self, name: str) -> bool:
        """Whether the stage wrote an output of that name."""
        return Dataset.is_finished(storage.join(self.path, name))

    def shard_of(self, row_id: str, flow: str | None = None) -> int:
        """Number of the shard that would hold an id of a flow (the stage's own by default)."""
        first, number = self.ranges[flow or self.flow]
        return first + bucket_of_id(row_id, number)


@dataclass(frozen=True)
class WorkFolder:
    """The folder that `curate run` fills."""

    path: str

    @staticmethod
    def is_one(path: str) -> bool:
        """Whether a finished run lies there."""
        return storage.exists(storage.join(path, RUN_FILE))

    @cached_property
    def record(self) -> RunRecord:
        """What the run did.

        Raises:
            DatasetError: no run has finished there.
        """
        return read_run(self.path)

    @property
    def flows(self) -> dict[str, tuple[StageEntry, ...]]:
        """Stages of the pool and of every set, the pool first."""
        return {POOL: self.record.pool, **self.record.sets}

    @cached_property
    def manifest(self) -> Dataset | None:
        """The published manifest, where the recipe makes one."""
        name = self.record.manifest
        return None if name is None else Dataset.open(storage.join(self.path, name))

    @cached_property
    def packed(self) -> Dataset | None:
        """The packed shards, where the recipe makes them."""
        name = self.record.packed
        return None if name is None else Dataset.open(storage.join(self.path, name))

    def stages(self, flow: str) -> list[FinishedStage]:
        """The finished stages of one flow, in order."""
        if flow not in self._known:
            self._known[flow] = list(self._stages(flow))
        return self._known[flow]

    def all_stages(self) -> list[FinishedStage]:
        """The finished stages of all flows, the pool's first."""
        return [stage for flow in self.flows for stage in self.stages(flow)]

    def stage(self, flow: str, name: str) -> FinishedStage | None:
        """The first stage of a name in a flow, if it is there."""
        return next((stage for stage in self.stages(flow) if stage.name == name), None)

    def making(self, flow: str, output: str) -> FinishedStage | None:
        """The last stage of a flow that made an output."""
        having = [s for s in self.stages(flow) if output in s.entry.record.outputs]
        return having[-1] if having else None

    def output(self, flow: str, name: str) -> Dataset | None:
        """An output of a flow, as its last stage that made one left it."""
        stage = self.making(flow, name)
        return stage.output(name) if stage else None

    @property
    def hits(self) -> Dataset | None:
        """What retrieval found, where the recipe retrieves."""
        stage = self.deciding(POOL, "seed_set")
        return stage.output("hits") if stage is not None and stage.has("hits") else None

    def deciding(self, flow: str, column: str) -> FinishedStage | None:
        """The first stage of a flow whose decisions have a column, such as `component`."""
        return next((one for one in self.stages(flow) if column in one.decisions.columns), None)

    @property
    def packing(self) -> FinishedStage | None:
        """The stage that wrote the packed shards."""
        return next((s for s in self.stages(POOL) if "packed" in s.entry.record.figures), None)

    @cached_property
    def benchmarks(self) -> list[str]:
        """Sets that the pool was checked for leaks of."""
        checking = {one.name for one in self.stages(POOL) if one.entry.kind.checks_benchmarks}
        return [name for name, roles in self.record.roles.items() if checking & set(roles)]

    def shards_of(self, flow: str) -> int:
        """How many shards each side-car of a flow has."""
        return self._decisions(self.flows[flow][0]).num_shards

    @cached_property
    def _known(self) -> dict[str, list[FinishedStage]]:
        """Stages by flow: their manifests are read once."""
        return {}

    def _stages(self, flow: str) -> Iterator[FinishedStage]:
        own = {flow: (0, self.shards_of(flow))}
        for entry in self.flows[flow]:
            # a stage of the pool that saw the union has the shards of all its parts
            joins = flow == POOL and bool(self.record.as_is)
            union = joins and self._decisions(entry).num_shards != own[flow][1]
            ranges = self._union_ranges if union else own
            path = storage.join(self.path, entry.folder)
            yield FinishedStage(flow, entry, path, ranges, self._opened)

    def _decisions(self, entry: StageEntry) -> Dataset:
        return _open_once(storage.join(self.path, entry.folder, DECISIONS), self._opened)

    @cached_property
    def _opened(self) -> dict[str, Dataset]:
        return {}

    @cached_property
    def _union_ranges(self) -> dict[str, tuple[int, int]]:
        """Shards of the sets taken as they are come first, then the pool's."""
        ranges, first = {}, 0
        for name in (*self.record.as_is, POOL):
            ranges[name] = (first, self.shards_of(name))
            first += ranges[name][1]
        return ranges


def _open_once(path: str, opened: dict[str, Dataset]) -> Dataset:
    if path not in opened:
        opened[path] = Dataset.open(path)
    return opened[path]
