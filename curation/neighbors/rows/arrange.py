"""Arranging rows into partitions: one pass over the shards, one over the partitions.

The first pass finds the list of every row, and those that it probes, and writes its rows grouped
by partition; the second sorts each partition by list and id. Rows are thus rewritten twice, and
the copies of the first pass go once the second has finished. N rows, D width, P partitions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa

from curation import storage
from curation.exchange import Exchange
from curation.neighbors.kernels.identical import first_identical
from curation.neighbors.kernels.threads import in_threads
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import (
    FileTask,
    TaskResult,
    finished_summaries,
    run_file_tasks,
)
from curation.neighbors.rows.packed_rows import id_keys, one_chunk, pack_rows, unpack_rows
from curation.neighbors.rows.routers import Router
from curation.neighbors.rows.routes import Routes
from curation.neighbors.rows.row_files import PLACE_TYPES, RowFiles
from curation.neighbors.rows.unique_ids import check_unique_ids
from curation.neighbors.rows.vectors import VectorSource, bad_rows, check_widths, storage_dtype
from curation.stage import Engine, Resources

_TASKS = 16, 1 << 12
"""Tasks of a pass at least, where rows suffice, for even load; and at most, where memory does."""
_TASK_ROWS = 1 << 13, 1 << 16
"""Rows of a task at least and at most, as long as both numbers of tasks allow."""
_COPIES = 6
"""What a worker holds of each of its rows."""


class ShardRun(NamedTuple):
    """Shards of one source that follow each other, which one task reads."""

    source: int
    first: int
    end: int


@dataclass(frozen=True)
class WorkerBudget:
    """What one worker may use of its machine."""

    threads: int = 1
    memory: int = 1 << 30
    """In bytes."""


@dataclass(frozen=True)
class ArrangePlan:
    """How the rows of some sources are to be arranged."""

    sources: tuple[VectorSource, ...]
    """The pool first, then the sets, in the order of their numbers."""
    router: Router
    list_starts: tuple[int, ...]
    """(P + 1,): first list of each partition, then the number of lists."""
    folder: str
    budget: WorkerBudget = WorkerBudget()

    @property
    def num_partitions(self) -> int:
        """Number of partitions."""
        return len(self.list_starts) - 1

    @property
    def split(self) -> Exchange:
        """Files of the first pass."""
        return Exchange(storage.join(self.folder, "split"), self.num_partitions)

    def row_files(self, width: int, starts: Sequence[int] = ()) -> RowFiles:
        """What the second pass leaves."""
        folder = storage.join(self.folder, "arranged")
        return RowFiles(folder, width, storage_dtype(self.sources), (*starts,), self.list_starts)


def arrange(
    sources: Sequence[VectorSource],
    router: Router,
    list_starts: Sequence[int],
    folder: str,
    engine: Engine,
    budget: WorkerBudget = WorkerBudget(),
) -> RowFiles:
    """Lay the rows of all sources out as files, in the order of their lists.

    Raises:
        DatasetError: an id that occurs twice in one source; names it.
        SpaceError: vectors of different widths.
    """
    starts = tuple(int(first) for first in list_starts)
    plan = ArrangePlan(tuple(sources), router, starts, folder, budget)
    runs = shard_runs(sources, budget.memory)
    sorted_rows: list[_Sorted] | None = finished_summaries(
        plan.row_files(0).folder, plan.num_partitions
    )
    if sorted_rows is None or not all(map(storage.exists, _bad_paths(folder, runs))):
        sorted_rows = _rewrite(plan, runs, engine)
    counts = [done["rows"] for done in sorted_rows]
    return plan.row_files(sorted_rows[0]["width"], np.cumsum([0, *counts]).tolist())


class _Sorted(TypedDict):
    """What is known of a partition."""

    rows: int
    width: int


def _rewrite(plan: ArrangePlan, runs: list[ShardRun], engine: Engine) -> list[_Sorted]:
    """Both passes; the copies of the first go when the second has finished."""
    for number, source in enumerate(plan.sources):
        own = [range(run.first, run.end) for run in runs if run.source == number]
        check_unique_ids(source, own, storage.join(plan.folder, f"ids-{number:03d}"), engine)
    split = _SplitByPartition(plan, tuple(runs))
    found = run_file_tasks(engine, split, len(runs), plan.split.folder, "find the lists")
    width = check_widths([(place, width) for place, width in found])
    task, folder = _SortPartition(plan, width, len(runs)), plan.row_files(0).folder
    done = run_file_tasks(engine, task, plan.num_partitions, folder, "sort the lists")
    storage.remove(plan.split.folder)
    return done


def _bad_path(folder: str, source: int, shard: int) -> str:
    """File of the bad rows of one shard."""
    return storage.join(folder, "bad", f"{source:03d}-{shard:06d}.bin")


def _bad_paths(folder: str, runs: list[ShardRun]) -> Iterator[str]:
    for run in runs:
        yield from (_bad_path(folder, run.source, shard) for shard in range(run.first, run.end))


def read_bad_rows(folder: str, source: int, shard: int) -> np.ndarray:
    """(B,) int64: rows of a shard that have no direction."""
    return ColumnFile.open(_bad_path(folder, source, shard))["row"]


def shard_runs(sources: Sequence[VectorSource], memory: int) -> list[ShardRun]:
    """What each task of the first pass reads. memory: bytes that a worker may hold."""
    least, found = _rows_of_run(sources, memory), []
    for number, source in enumerate(sources):
        ends = np.cumsum(source.pool.shard_rows())
        first = 0
        while first < len(ends):  # up to the shard with which there are enough rows, or the last
            before = int(ends[first - 1]) if first else 0
            end = min(int(np.searchsorted(ends, before + least)) + 1, len(ends))
            found.append(ShardRun(number, first, end))
            first = end
    return found


def _rows_of_run(sources: Sequence[VectorSource], memory: int) -> int:
    rows = sum(source.pool.num_rows for source in sources)
    return rows_per_task(rows, _row_bytes(sources), memory)


def _row_bytes(sources: Sequence[VectorSource]) -> float:
    return max(source.row_bytes for source in sources)


def rows_per_task(num_rows: int, row_bytes: float, memory: int) -> int:
    """Rows of a task of the first pass, or of a partition: more in a larger pool.

    Each partition reads a part of what each task wrote, so 65,536 rows in each would be 335 million
    reads for 1.2 billion rows; 293,000 are 17 million. memory: bytes that a worker may hold.
    """
    few = int(np.clip(num_rows // _TASKS[0], *_TASK_ROWS))
    fits = max(1, int(memory / (_COPIES * max(1.0, row_bytes))))
    return min(max(num_rows // _TASKS[1], few), fits)


@dataclass(frozen=True)
class _SplitByPartition(FileTask[Any, tuple[str, int]]):
    """First pass: rows of some shards, grouped by partition; gives a path, and their width."""

    plan: ArrangePlan
    runs: tuple[ShardRun, ...]

    @property
    def resources(self) -> Resources:
        sources = self.plan.sources
        held = _COPIES * _rows_of_run(sources, self.plan.budget.memory) * _row_bytes(sources)
        return Resources(memory=(1 << 30) + max(1 << 29, int(held)))

    def open(self) -> Any:
        return self.plan.router.open()

    def __call__(self, item: int, opened: Any) -> TaskResult[tuple[str, int]]:
        run, plan = self.runs[item], self.plan
        shards = range(run.first, run.end)
        found = in_threads(lambda shard: self._read(run.source, shard), shards, plan.budget.threads)
        tables, paths, widths = [], [], []
        for shard, (table, bad, width) in zip(shards, found, strict=True):
            paths.append(_bad_path(plan.folder, run.source, shard))
            write_columns(paths[-1], {"row": bad})
            tables.append(table)
            widths.append((plan.sources[run.source].where(shard), width))
        width = check_widths(widths)
        filled = [table for table in tables if table.num_rows]  # an empty one knows no width
        rows, homes = self._routed(pa.concat_tables(filled) if filled else tables[0], opened)
        plan.split.write(item, rows, np.searchsorted(plan.list_starts[1:], homes, "right"))
        return TaskResult([*paths, plan.split.mapped_path(item)], (widths[0][0], width))

    def _routed(self, rows: pa.Table, opened: Any) -> tuple[pa.Table, np.ndarray]:
        """The rows with their routes, all found at once: the more, the less each costs."""
        routes = Routes.at_home(np.empty(0, np.int32))
        if rows.num_rows:
            vectors = unpack_rows(rows["vector"], storage_dtype(self.plan.sources))
            routes = self.plan.router.route(unpack_rows(rows["id"]), vectors, opened)
        columns = {
            "list": pa.array(routes.home),
            "probes": _as_lists(routes.bounds, routes.probes),
            "margins": _as_lists(routes.bounds, routes.margins),
        }
        for name, column in columns.items():
            rows = rows.append_column(name, column)
        return rows, routes.home

    def _read(self, number: int, shard: int) -> tuple[pa.Table, np.ndarray, int]:
        """Good rows of one shard as a table, the numbers of the bad ones, and the width."""
        source = self.plan.sources[number]
        ids, vectors = source.read(shard)
        bad = bad_rows(vectors) if len(ids) else np.empty(0, bool)
        good = np.flatnonzero(~bad)
        columns = {
            "id": pack_rows(ids[good]),
            "set": np.full(len(good), number, np.int16),
            "shard": np.full(len(good), shard, np.int32),
            "row": good.astype(np.int32),
            "vector": pack_rows(vectors[good].astype(storage_dtype(self.plan.sources))),
            **{name: values[good] for name, values in source.sizes(shard).items()},
        }
        return pa.table(columns), np.flatnonzero(bad), vectors.shape[1] if len(good) else 0


@dataclass(frozen=True)
class _SortPartition(FileTask[None, _Sorted]):
    """Second pass: one partition's rows sorted by list, id and set."""

    plan: ArrangePlan
    width: int
    num_runs: int

    @property
    def resources(self) -> Resources:
        rows = sum(source.pool.num_rows for source in self.plan.sources)
        held = 8 * self.width * np.dtype(storage_dtype(self.plan.sources)).itemsize * rows
        return Resources(memory=max(1 << 30, held // self.plan.num_partitions))

    def __call__(self, item: int, opened: None) -> TaskResult[_Sorted]:
        rows = self.plan.split.read(item, self.num_runs)
        keys = id_keys(unpack_rows(rows["id"]))
        order = np.lexsort((np.asarray(rows["set"]), *keys[::-1], np.asarray(rows["list"])))
        rows = rows.take(pa.array(order)).combine_chunks()
        files = self.plan.row_files(self.width)
        vectors = unpack_rows(rows["vector"], files.dtype)  # (N, D)
        places = {name: np.asarray(rows[name]) for name in PLACE_TYPES if name != "first"}
        places["first"] = first_identical(vectors)
        path = files.write(item, vectors, unpack_rows(rows["id"]), places)
        routes = _routes_of(rows)
        routes.write(files.path("routes", item))
        done = _Sorted(rows=rows.num_rows, width=self.width)
        return TaskResult([path, files.path("routes", item)], done)


def _as_lists(bounds: np.ndarray, values: np.ndarray) -> pa.Array:
    """N lists of numbers, of any lengths. bounds: (N + 1,) of each in the values."""
    return pa.LargeListArray.from_arrays(pa.array(bounds, pa.int64()), pa.array(values))


def _routes_of(rows: pa.Table) -> Routes:
    """What `_as_lists` packed."""
    probes, margins = (one_chunk(rows[name]) for name in ("probes", "margins"))
    offsets = np.asarray(probes.offsets)
    return Routes(
        np.asarray(rows["list"]),
        offsets - offsets[0],
        np.asarray(probes.flatten()),
        np.asarray(margins.flatten()),
    )
