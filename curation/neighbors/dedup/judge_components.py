"""From a threshold graph to a verdict on each member of a component, back in its own shard.

Members travel by component, are judged together, and their verdicts travel on by the pool's
shards. Only labels, one number a row, pass through the driver. M members of a bucket's components.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypedDict, TypeVar

import numpy as np
import pyarrow as pa

from curation import storage
from curation.exchange import Exchange
from curation.neighbors.dedup.component_rules import ComponentRule
from curation.neighbors.dedup.members import GatherMembers, Members
from curation.neighbors.dedup.threshold_graph import ThresholdGraph
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.packed_rows import id_keys, pack_rows
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.rows.shard_batches import BatchExchange
from curation.neighbors.rows.vectors import exact_matrix
from curation.pool import Pool
from curation.stage import Engine

Summary = TypeVar("Summary")

_MOST_BUCKETS = 1 << 12
_BUCKET_ROWS = 1 << 15, 1 << 18
"""Rows of a bucket at least, so that few rows have several buckets and several workers judge
them; and at most, which goes before the number of buckets."""
_TILE = 1 << 12, 1 << 10
"""Members and benchmark images that are compared at once."""
LEAST_ALIKE_SHOWN = 5
"""Components that the report names."""


@dataclass(frozen=True)
class ComponentVerdicts:
    """Verdicts on the members of components, by batch of shards of the pool."""

    verdicts: Exchange
    num_buckets: int

    def read(self, batch: int) -> pa.Table:
        """Verdicts on rows of one batch of shards."""
        return self.verdicts.read(batch, self.num_buckets)

    def dropped(self) -> Iterator[np.ndarray]:
        """Positions of dropped rows, a bucket at a time: (B,) int64."""
        for bucket in range(self.num_buckets):
            yield ColumnFile.open(_dropped_path(self.verdicts, bucket))["position"]


class Judge(ABC, Generic[Summary]):
    """Decides on the members of whole components."""

    first_base: int | None = None
    """Number of the first set of published rows, which come first; they are the last sets."""

    @abstractmethod
    def judge(self, members: Members) -> tuple[pa.Table, Summary]:
        """Verdicts (set, shard, row, position, keep and more) on members, and a summary."""


def judge_components(
    graph: ThresholdGraph, judge: Judge[Summary], folder: str, pool: Pool, engine: Engine
) -> tuple[ComponentVerdicts, list[Summary]]:
    """Bring the members of each component together, judge them, and send verdicts to shards."""
    files = graph.files
    num_buckets = 1 + files.num_rows // int(np.clip(files.num_rows // _MOST_BUCKETS, *_BUCKET_ROWS))
    members = Exchange(storage.join(folder, "members"), num_buckets)
    gather, parts = GatherMembers(graph, members), files.num_partitions
    run_file_tasks(engine, gather, parts, members.folder, "gather components")
    verdicts = BatchExchange.of(pool, storage.join(folder, "verdicts"))
    task = _JudgeBucket(files, judge, members, verdicts)
    summaries = run_file_tasks(engine, task, num_buckets, verdicts.folder, "judge components")
    return ComponentVerdicts(verdicts, num_buckets), summaries


def _dropped_path(verdicts: Exchange, bucket: int) -> str:
    """File of the positions that the judge of one bucket dropped."""
    return storage.join(verdicts.folder, f"dropped-{bucket:06d}.bin")


@dataclass(frozen=True)
class _JudgeBucket(FileTask[None, Summary]):
    """The components of one bucket."""

    files: RowFiles
    judge: Judge[Summary]
    members: Exchange
    verdicts: BatchExchange

    def __call__(self, item: int, opened: None) -> TaskResult[Summary]:
        table = self.members.read(item, self.files.num_partitions)
        members = Members.ordered(table, self.judge.first_base, self.files)
        verdicts, summary = self.judge.judge(members)
        of_pool = verdicts.filter(pa.array(np.asarray(verdicts["set"]) == 0))
        keep = of_pool["keep"].to_numpy(zero_copy_only=False)
        path = _dropped_path(self.verdicts, item)
        write_columns(path, {"position": np.asarray(of_pool["position"])[~keep]})
        self.verdicts.send(item, of_pool.drop_columns(["set", "position"]))
        return TaskResult([path, self.verdicts.mapped_path(item)], summary)


class LeastAlike(TypedDict):
    """A component, and the lowest cosine of a member to its first one."""

    component: str
    size: int
    lowest_similarity: float


@dataclass(frozen=True)
class JudgeDuplicates(Judge[list[LeastAlike]]):
    """Keeps what a rule keeps, and what earlier deliveries have published."""

    rule: ComponentRule
    threshold: float
    first_base: int | None = None

    def judge(self, members: Members) -> tuple[pa.Table, list[LeastAlike]]:
        """Verdicts, and the components whose members are least like their first."""
        firsts, new = members.firsts, np.flatnonzero(~members.published)
        to_first = np.ones(len(members), np.float32)
        to_first[new] = members.similarities(new, firsts[new])
        names = ["set", "shard", "row", "position", "twin", "twin_set", "similarity"]
        columns = {
            **{name: members.table[name] for name in names},
            "keep": members.published | self.rule.keeps(members, self.threshold),
            "component": pack_rows(members.ids[firsts]),
            "component_size": np.repeat(members.sizes, members.sizes).astype(np.int32),
        }
        return pa.table(columns), _least_alike(members, to_first)


@dataclass(frozen=True)
class JudgeLeaks(Judge[int]):
    """Drops every component that holds a benchmark image (a row of set 1 or later)."""

    threshold: float

    def judge(self, members: Members) -> tuple[pa.Table, int]:
        """Verdicts on the members of components with a benchmark image, and how many these are."""
        labels = members["label"]
        members = members.take(np.isin(labels, labels[members["set"] > 0]))
        twin, similarity = self._nearest_images(members)
        columns = {
            **{name: members[name] for name in ("set", "shard", "row", "position")},
            "keep": np.zeros(len(twin), bool),
            "twin": pack_rows(members.ids[twin]),
            "twin_set": members["set"][twin],
            "similarity": similarity,
            "direct": similarity > np.float32(self.threshold),
        }
        return pa.table(columns), len(members.sizes)

    def _nearest_images(self, members: Members) -> tuple[np.ndarray, np.ndarray]:
        """Number of the nearest benchmark image in its component, and its cosine, a member."""
        twin, similarity = np.zeros(len(members), np.int64), np.zeros(len(members), np.float32)
        sets, (first, second) = members["set"], id_keys(members.ids)
        for component in members.components():
            images = component.start + np.flatnonzero(sets[component] > 0)
            images = images[np.lexsort((sets[images], second[images], first[images]))]
            twin[component], similarity[component] = _nearest_of(members, component, images)
        return twin, similarity


def _nearest_of(members: Members, rows: slice, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row the first of the nearest images, and its cosine. images: (I,) members."""
    best = np.zeros(rows.stop - rows.start, np.int64)
    top = np.full(len(best), -np.inf, np.float32)
    for start in range(0, len(images), _TILE[1]):
        some = images[start : start + _TILE[1]]
        right = members.vectors(some)
        for first in range(0, len(best), _TILE[0]):
            tile = slice(first, min(first + _TILE[0], len(best)))
            left = members.vectors(slice(rows.start + tile.start, rows.start + tile.stop))
            scores = exact_matrix(left, right)
            column = scores.argmax(axis=1)
            score = scores[np.arange(len(left)), column]
            better = first + np.flatnonzero(score > top[tile])
            best[better], top[better] = some[column[better - first]], score[better - first]
    return best, top


def _least_alike(members: Members, to_first: np.ndarray) -> list[LeastAlike]:
    if not len(members):
        return []
    starts = members.bounds[:-1]
    lowest = np.minimum.reduceat(to_first, starts)
    return [
        {
            "component": members.ids[starts[one]].tobytes().hex(),
            "size": int(members.sizes[one]),
            "lowest_similarity": float(lowest[one]),
        }
        for one in np.argsort(lowest, kind="stable")[:LEAST_ALIKE_SHOWN]
    ]
