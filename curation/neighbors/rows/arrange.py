"""Arranging rows into partitions: one pass over the shards, one over the partitions.

The first pass (`Split`) finds the list of every row, and the lists that it probes, and writes its
rows grouped by partition; the second (`Arrange`) sorts each partition by list and id. Rows are
thus rewritten twice, and the copies of the first pass may go once the second has finished.
N rows, D width, P partitions.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation import storage
from curation.errors import DatasetError
from curation.exchange import Exchange, Mapper, Reducer, bucket_of_ids
from curation.neighbors.index.routes import Routes
from curation.neighbors.kernels.identical import fingerprints, first_identical
from curation.neighbors.kernels.threads import in_threads
from curation.neighbors.rows.file_tasks import (
    FileTask,
    TaskResult,
    finished_summaries,
    run_file_tasks,
)
from curation.neighbors.rows.row_files import RowFiles, write_array
from curation.neighbors.rows.vectors import VectorSource, bad_rows, check_widths, storage_dtype
from curation.stage import Engine, Resources

_ROWS_TOGETHER = 1 << 16
_FEWEST_TOGETHER = 1 << 13
_TASKS = 16
"""So many at least, where rows suffice: what a few workers need to be busy alike."""
_MOST_TASKS = 1 << 12
"""So many at most, as long as memory suffices."""
_COPIES = 6
"""What a worker holds of each of its rows."""

_ATTRIBUTES = ("original_width", "original_height", "num_bytes")


class Router(ABC):
    """Says in which list a row lives and which lists it probes."""

    num_lists: int

    def open(self) -> Any:
        """Load what the router needs, once a worker."""
        return None

    @abstractmethod
    def route(self, ids: np.ndarray, vectors: np.ndarray, opened: Any) -> Routes:
        """Where rows live and which lists they probe. ids: (N, 16) uint8, vectors: (N, D)."""


@dataclass(frozen=True)
class Scattered(Router):
    """Lists by a hash of the vector: for exhaustive comparison, where all lists meet all.

    Identical rows still share a list, which keeps their pairs linear.
    """

    num_lists: int

    def route(self, ids: np.ndarray, vectors: np.ndarray, opened: Any) -> Routes:
        """Which range the upper half of the fingerprint falls into."""
        upper = fingerprints(vectors)[:, 0] >> np.uint64(32)
        return Routes.at_home((upper * np.uint64(self.num_lists)) >> np.uint64(32))


@dataclass(frozen=True)
class IdRanges(Router):
    """Lists of equal ranges of the id space: positions then lie in the order of ids."""

    num_lists: int

    def route(self, ids: np.ndarray, vectors: np.ndarray, opened: Any) -> Routes:
        """Which range the first four bytes of the id fall into."""
        leading = np.ascontiguousarray(ids[:, :4]).view(">u4")[:, 0].astype(np.uint64)
        return Routes.at_home((leading * np.uint64(self.num_lists)) >> np.uint64(32))


@dataclass(frozen=True)
class Share:
    """What one worker may use of its machine."""

    threads: int = 1
    memory: int = 1 << 30
    """In bytes."""


@dataclass(frozen=True)
class Plan:
    """How the rows of some sources are to be arranged."""

    sources: tuple[VectorSource, ...]
    """The pool first, then the sets, in the order of their numbers."""
    router: Router
    list_starts: tuple[int, ...]
    """(P + 1,): first list of each partition, then the number of lists."""
    folder: str
    dtype: str = "float16"
    groups: tuple[tuple[int, int, int], ...] = field(default=())
    """(set, first shard, end): what each task of the first pass reads."""
    share: Share = Share()

    @property
    def num_partitions(self) -> int:
        """Number of partitions."""
        return len(self.list_starts) - 1

    @property
    def split(self) -> Exchange:
        """Files of the first pass."""
        return Exchange(storage.join(self.folder, "split"), self.num_partitions)

    def bad_path(self, set_number: int, shard: int) -> str:
        """File of the bad rows of one shard: (rows,) int64 row numbers."""
        return storage.join(self.folder, "bad", f"{set_number:03d}-{shard:06d}.bin")

    def bad_paths(self) -> Iterator[str]:
        """Files of the bad rows of all shards."""
        for number, first, end in self.groups:
            yield from (self.bad_path(number, shard) for shard in range(first, end))


def rows_together(num_rows: int, row_bytes: float, memory: int) -> int:
    """Rows of a task of the first pass, or of a partition: more in a larger pool.

    Each partition reads a part of what each task wrote, so 65,536 rows in each would be 335 million
    reads for 1.2 billion rows; 293,000 are 17 million. memory: bytes that a worker may hold.
    """
    few = int(np.clip(num_rows // _TASKS, _FEWEST_TOGETHER, _ROWS_TOGETHER))
    fits = max(1, int(memory / (_COPIES * max(1.0, row_bytes))))
    return min(max(num_rows // _MOST_TASKS, few), fits)


def arrange(
    sources: Sequence[VectorSource],
    router: Router,
    list_starts: Sequence[int],
    folder: str,
    engine: Engine,
    share: Share = Share(),
) -> RowFiles:
    """Lay the rows of all sources out as files, in the order of their lists.

    Raises:
        DatasetError: an id that occurs twice in one source; names it.
        SpaceError: vectors of different widths.
    """
    plan = Plan(
        sources=tuple(sources),
        router=router,
        list_starts=tuple(int(first) for first in list_starts),
        folder=folder,
        dtype=storage_dtype(sources),
        groups=groups_of_shards(sources, share.memory),
        share=share,
    )
    arranged = _Arrange(plan, 0).folder
    facts = finished_summaries(arranged, plan.num_partitions)
    if facts is None or not all(storage.exists(path) for path in plan.bad_paths()):
        facts = _rewrite(plan, engine)
    starts = np.cumsum([0, *(fact["rows"] for fact in facts)])
    return _Arrange(plan, facts[0]["width"]).row_files(starts)


def _rewrite(plan: Plan, engine: Engine) -> list[dict[str, Any]]:
    """Both passes; the copies of the first go when the second has finished."""
    _check_ids(plan, engine)
    split = storage.join(plan.folder, "split")
    found = run_file_tasks(engine, _Split(plan), len(plan.groups), split, "find the lists")
    width = check_widths([(fact["where"], fact["width"]) for fact in found])
    work = _Arrange(plan, width)
    facts = run_file_tasks(engine, work, plan.num_partitions, work.folder, "sort the lists")
    storage.remove(split)
    return facts


def read_bad_rows(folder: str, set_number: int, shard: int) -> np.ndarray:
    """(B,) int64: rows of a shard that have no direction."""
    path = storage.join(folder, "bad", f"{set_number:03d}-{shard:06d}.bin")
    return np.frombuffer(storage.read_bytes(path), np.int64)


def groups_of_shards(
    sources: Sequence[VectorSource], memory: int
) -> tuple[tuple[int, int, int], ...]:
    """(set, first shard, end): runs of shards that one task reads. memory: bytes it may hold."""
    least = _rows_of_group(sources, memory)
    return tuple(
        group for number, one in enumerate(sources) for group in _groups(number, one, least)
    )


def _rows_of_group(sources: Sequence[VectorSource], memory: int) -> int:
    rows = sum(source.pool.num_rows for source in sources)
    return rows_together(rows, _row_bytes(sources), memory)


def _row_bytes(sources: Sequence[VectorSource]) -> float:
    return max(source.row_bytes for source in sources)


def _groups(number: int, source: VectorSource, least: int) -> list[tuple[int, int, int]]:
    """Runs of shards that hold at least so many rows together, the last one fewer."""
    groups, first, held = [], 0, 0
    rows = source.pool.shard_rows()
    for shard, count in enumerate(rows):
        held += int(count)
        if held >= least or shard == len(rows) - 1:
            groups.append((number, first, shard + 1))
            first, held = shard + 1, 0
    return groups


@dataclass(frozen=True)
class _Split(FileTask[Any, dict[str, Any]]):
    """First pass: rows of some shards, grouped by partition."""

    plan: Plan

    @property
    def resources(self) -> Resources:
        sources = self.plan.sources
        held = _COPIES * _rows_of_group(sources, self.plan.share.memory) * _row_bytes(sources)
        return Resources(memory=(1 << 30) + max(1 << 29, int(held)))

    def open(self) -> Any:
        return self.plan.router.open()

    def __call__(self, item: int, opened: Any) -> TaskResult[dict[str, Any]]:
        number, first, end = self.plan.groups[item]
        tables, files, widths = [], [], []
        shards = range(first, end)
        found = in_threads(lambda shard: self._read(number, shard), shards, self.plan.share.threads)
        for shard, (table, bad, width) in zip(shards, found, strict=True):
            write_array(self.plan.bad_path(number, shard), bad)
            files.append(self.plan.bad_path(number, shard))
            tables.append(table)
            widths.append((self.plan.sources[number].where(shard), width))
        width = check_widths(widths)
        rows = _concatenated([table for table in tables if table.num_rows], tables)
        rows, lists = self._routed(rows, opened)
        self.plan.split.write(
            item, rows, np.searchsorted(self.plan.list_starts[1:], lists, "right")
        )
        files.append(self.plan.split.mapped_path(item))
        return TaskResult(files, {"width": width, "where": widths[0][0], "rows": rows.num_rows})

    def _routed(self, rows: pa.Table, opened: Any) -> tuple[pa.Table, np.ndarray]:
        """The rows with their routes, all found at once: the more, the less each costs."""
        routes = Routes.at_home(np.empty(0, np.int32))
        if rows.num_rows:
            ids, vectors = (
                _from_binary(rows["id"], "uint8"),
                _from_binary(rows["vector"], self.plan.dtype),
            )
            routes = self.plan.router.route(ids, vectors, opened)
        found = {
            "list": pa.array(routes.home),
            "probes": _as_lists(routes.bounds, routes.probes),
            "margins": _as_lists(routes.bounds, routes.margins),
        }
        for name, column in found.items():
            rows = rows.append_column(name, column)
        return rows, routes.home

    def _read(self, number: int, shard: int) -> tuple[pa.Table, np.ndarray, int]:
        """Good rows of one shard as a table, the numbers of the bad ones, and the width."""
        source = self.plan.sources[number]
        ids, vectors = source.read(shard)
        bad = bad_rows(vectors) if len(ids) else np.empty(0, bool)
        good = np.flatnonzero(~bad)
        width = vectors.shape[1] if len(good) else 0
        vectors = vectors[good].astype(self.plan.dtype)
        columns = {
            "id": _as_binary(ids[good]),
            "set": np.full(len(good), number, np.int16),
            "shard": np.full(len(good), shard, np.int32),
            "row": good.astype(np.int32),
            "vector": _as_binary(vectors),
            **self._attributes(source, shard, good),
        }
        return pa.table(columns), np.flatnonzero(bad).astype(np.int64), width

    def _attributes(
        self, source: VectorSource, shard: int, good: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Pixels of the original and bytes of the file, 0 where unknown."""
        having = [name for name in _ATTRIBUTES if name in source.pool.columns]
        found = dict.fromkeys(_ATTRIBUTES, np.zeros(len(good), np.int64))
        table = source.pool.read(shard, having)
        for name in having:
            found[name] = np.asarray(table[name].fill_null(0)).astype(np.int64)[good]
        pixels = found["original_width"] * found["original_height"]
        return {"pixels": pixels, "num_bytes": found["num_bytes"]}


@dataclass(frozen=True)
class _Arrange(FileTask[None, dict[str, Any]]):
    """Second pass: one partition's rows sorted by list, id and set."""

    plan: Plan
    width: int

    @property
    def resources(self) -> Resources:
        rows = sum(source.pool.num_rows for source in self.plan.sources)
        held = 8 * self.width * np.dtype(self.plan.dtype).itemsize * rows
        return Resources(memory=max(1 << 30, held // self.plan.num_partitions))

    @property
    def folder(self) -> str:
        return storage.join(self.plan.folder, "arranged")

    def row_files(self, starts: np.ndarray) -> RowFiles:
        return RowFiles(
            self.folder,
            self.width,
            self.plan.dtype,
            tuple(int(start) for start in starts),
            self.plan.list_starts,
        )

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        rows = self._gathered(item)
        vectors = _from_binary(rows["vector"], self.plan.dtype)  # (N, D)
        ids = _from_binary(rows["id"], "uint8")  # (N, 16)
        files = self.row_files(np.zeros(self.plan.num_partitions + 1, np.int64))
        kept = rows.select(["set", "shard", "row", "list", "pixels", "num_bytes"])
        kept = kept.append_column("first", pa.array(first_identical(vectors)))
        write_array(files.path("vectors", item), vectors)
        write_array(files.path("ids", item), ids)
        _routes_of(rows).write(files.path("routes", item))
        _write_arrow(files.path("rows", item), kept)
        paths = [files.path(kind, item) for kind in ("vectors", "ids", "routes", "rows")]
        return TaskResult(paths, {"rows": rows.num_rows, "width": self.width})

    def _gathered(self, item: int) -> pa.Table:
        """Rows of one partition from all files of the first pass, sorted."""
        rows = self.plan.split.read(item, len(self.plan.groups))
        order = np.lexsort(
            (np.asarray(rows["set"]), *_id_keys(rows["id"])[::-1], np.asarray(rows["list"]))
        )
        return rows.take(pa.array(order)).combine_chunks()


def _check_ids(plan: Plan, engine: Engine) -> None:
    for number, source in enumerate(plan.sources):
        buckets = 1 + source.pool.num_rows // (1 << 20)
        exchange = Exchange(storage.join(plan.folder, f"ids-{number:03d}"), buckets)
        runs = [shards for one, *shards in plan.groups if one == number]
        twice: list[Any] = exchange.run(engine, _IdsOf(source, buckets), runs, _FindTwice())
        found = [name for name in twice if name]
        if found:
            raise DatasetError(
                f"{source.dataset.path}: id {source.describe(found[0])} occurs twice; ids must be "
                "unique: drop one of the rows, or give each its own id"
            )


@dataclass(frozen=True)
class _IdsOf(Mapper[list[int]]):
    """Ids of the shards from one to before another, by bucket."""

    source: VectorSource
    num_buckets: int

    def __call__(self, item: list[int]) -> tuple[pa.Table, np.ndarray]:
        parts = [self.source.live_ids(shard) for shard in range(*item)]
        chunks = [chunk for part in parts for chunk in part.chunks]
        ids = pa.chunked_array(chunks, parts[0].type)
        return pa.table({"id": ids}), bucket_of_ids(ids, self.num_buckets)


class _FindTwice(Reducer[str | None]):
    """Finds an id that occurs twice in its bucket."""

    def __call__(self, bucket: int, rows: pa.Table) -> str | None:
        counts = rows["id"].value_counts()
        many = counts.filter(pc.greater(counts.field("counts"), 1))
        return min(many.field("values").to_pylist()) if len(many) else None


def _as_lists(bounds: np.ndarray, values: np.ndarray) -> pa.Array:
    """N lists of numbers, of any lengths. bounds: (N + 1,) of each in the values."""
    return pa.LargeListArray.from_arrays(pa.array(bounds, pa.int64()), pa.array(values))


def _routes_of(rows: pa.Table) -> Routes:
    """What `_as_lists` packed."""
    probes, margins = (_one_chunk(rows[name]) for name in ("probes", "margins"))
    offsets = np.asarray(probes.offsets)
    return Routes(
        np.asarray(rows["list"]),
        offsets - offsets[0],
        np.asarray(probes.flatten()),
        np.asarray(margins.flatten()),
    )


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def _as_binary(rows: np.ndarray) -> pa.Array:
    """(N, W) of any number type as N binaries of equal size, without copying."""
    rows = np.ascontiguousarray(rows)
    size = rows.shape[1] * rows.itemsize
    if size == 0:
        return pa.array([b""] * len(rows), pa.binary(0))
    buffer = pa.py_buffer(rows) if rows.size else pa.py_buffer(b"")
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(rows), [None, buffer])


def _from_binary(column: pa.ChunkedArray, dtype: str) -> np.ndarray:
    """(N, W): what `_as_binary` packed."""
    array = _one_chunk(column)
    size = array.type.byte_width
    if size == 0 or len(array) == 0:
        return np.empty((len(array), size // np.dtype(dtype).itemsize), dtype)
    data = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * size :][: len(array) * size]
    return data.view(dtype).reshape(len(array), -1)


def _id_keys(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Ids as two big-endian numbers each, most significant first."""
    numbers = np.ascontiguousarray(_from_binary(column, "uint8")).view(">u8")  # (N, 2)
    return [numbers[:, 0].astype(np.uint64), numbers[:, 1].astype(np.uint64)]


def _concatenated(parts: list[pa.Table], otherwise: list[pa.Table]) -> pa.Table:
    """The parts that have rows; an empty part may not know its width."""
    return pa.concat_tables(parts) if parts else otherwise[0]


def _write_arrow(path: str, table: pa.Table) -> None:
    with storage.open_whole(path) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
