"""A finished run as auditors read it: its flows, their stages, and where each row lies."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from curation import storage
from curation.dataset import Dataset
from curation.exchange import bucket_of_ids
from curation.stage import DECISIONS
from pipelines.runner import POOL, RUN_FILE, RunRecord, StageEntry, read_run


@dataclass(frozen=True)
class FinishedStage:
    """One stage of one flow, with where its shards begin in a union."""

    flow: str
    entry: StageEntry
    path: str
    """Its folder."""
    first_shard: int = 0
    """Number of the shard with this flow's smallest ids; the shards before are of other flows."""
    own_shards: int = 0
    """How many shards hold this flow's rows."""

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.entry.stage

    @property
    def decisions(self) -> Dataset:
        """Its decisions."""
        return self.output(DECISIONS)

    def output(self, name: str) -> Dataset:
        """One of its outputs.

        Raises:
            DatasetError: it has no such output.
        """
        return Dataset.open(storage.join(self.path, name))

    def has(self, name: str) -> bool:
        """Whether the stage wrote an output of that name."""
        return Dataset.is_finished(storage.join(self.path, name))

    def shard_of(self, row_id: str) -> int:
        """Number of the shard that holds an id, if any does."""
        ids = pa.array([row_id], pa.string())
        return self.first_shard + int(bucket_of_ids(ids, self.own_shards)[0])


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
        return list(self._stages(flow))

    def all_stages(self) -> list[FinishedStage]:
        """The finished stages of all flows, the pool's first."""
        return [stage for flow in self.flows for stage in self._stages(flow)]

    def union_stages(self) -> list[FinishedStage]:
        """The pool's stages that see the sets taken as they are too."""
        return [stage for stage in self._stages(POOL) if stage.first_shard]

    def stage(self, flow: str, name: str) -> FinishedStage | None:
        """The first stage of a name in a flow, if it is there."""
        return next((stage for stage in self._stages(flow) if stage.name == name), None)

    def making(self, flow: str, output: str) -> FinishedStage | None:
        """The last stage of a flow that made an output."""
        having = [s for s in self._stages(flow) if output in s.entry.record.outputs]
        return having[-1] if having else None

    def shards_of(self, flow: str) -> int:
        """How many shards each side-car of a flow has."""
        first = self.flows[flow][0]
        return Dataset.open(storage.join(self.path, first.folder, DECISIONS)).num_shards

    def shards_before(self, flow: str) -> int:
        """In a union the sets taken as they are come first: shards before those of a flow."""
        names = self.record.as_is
        earlier = names[: names.index(flow)] if flow in names else names
        return sum(self.shards_of(name) for name in earlier)

    def _stages(self, flow: str) -> Iterator[FinishedStage]:
        own = self.shards_of(flow)
        before = self.shards_before(flow) if flow == POOL else 0
        for entry in self.flows[flow]:
            path = storage.join(self.path, entry.folder)
            shards = Dataset.open(storage.join(path, DECISIONS)).num_shards
            first = before if shards == own + before else 0
            yield FinishedStage(flow, entry, path, first, own)
