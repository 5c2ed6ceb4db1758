"""A keyed exchange through files: mappers split rows into buckets, reducers take a bucket each.

A mapper writes one file: where each bucket begins, then an Arrow stream for each that has rows; a
reducer reads two numbers and its stream from each file, by range, however many buckets there are.
Both halves are file tasks, so what a killed run did is kept. Nothing passes through the
driver but small results.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa

from curation import storage
from curation.neighbors.kernels.grouping import by_group
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.schema import ids_to_bytes
from curation.stage import Engine, Resources

_NUMBER = np.dtype("<i8")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Mapper(ABC, Generic[Item]):
    """Splits the rows of one item into buckets."""

    @abstractmethod
    def __call__(self, item: Item) -> tuple[pa.Table, np.ndarray]:
        """Give the rows and the bucket of each, (N,) integers."""


class Reducer(ABC, Generic[Result]):
    """Works on all rows of one bucket."""

    @abstractmethod
    def __call__(self, bucket: int, rows: pa.Table) -> Result:
        """Do the work; the result is small and can be written as JSON.

        Rows lie in the order of the items, then in the mapper's order.
        """


@dataclass(frozen=True)
class Exchange:
    """Where an exchange keeps its files, and over how many buckets."""

    folder: str
    num_buckets: int
    resources: Resources = Resources()

    def run(
        self, engine: Engine, mapper: Mapper[Item], items: Sequence[Item], reducer: Reducer[Result]
    ) -> list[Result]:
        """Map every item, reduce every bucket; give the reducers' results in bucket order."""
        label = self.folder.rstrip("/").rpartition("/")[2]
        mapped, reduced = (storage.join(self.folder, name) for name in ("mapped", "reduced"))
        map_items = _Map(self, mapper, tuple(items))
        run_file_tasks(engine, map_items, len(items), mapped, f"{label} (split)")
        reduce = _Reduce(self, reducer, len(items))
        return run_file_tasks(engine, reduce, self.num_buckets, reduced, f"{label} (join)")

    def mapped_path(self, item: int) -> str:
        """File of one mapped item."""
        return storage.join(self.folder, "mapped", f"{item:06d}.bin")

    def write(self, item: int, rows: pa.Table, buckets: np.ndarray) -> None:
        """Write one item's rows, grouped by bucket. buckets: (N,) integers below `num_buckets`."""
        order, bounds = by_group(buckets, self.num_buckets)
        rows = rows.take(pa.array(order)).combine_chunks()
        parts = [rows.slice(start, stop - start) for start, stop in itertools.pairwise(bounds)]
        none = _stream_of(rows.slice(0, 0))
        sizes = [none.size, *(_stream_size(part, none.size) for part in parts)]
        starts = _NUMBER.itemsize * (len(sizes) + 1) + np.cumsum([0, *sizes])
        with storage.open_whole(self.mapped_path(item)) as file:
            file.write(starts.astype(_NUMBER).tobytes())
            file.write(none)
            for part in parts:
                if part.num_rows:
                    file.write(_stream_of(part))

    def read(self, bucket: int, num_items: int) -> pa.Table:
        """Rows of one bucket from all mapped items, in item order."""

        def read_item(item: int) -> pa.Table | None:
            return self._part(item, 1 + bucket)

        found = storage.gather(read_item, range(num_items), self.folder)
        parts = [part for part in found if part is not None]
        return pa.concat_tables(parts or [self._part(0, 0)])

    def parts(self, bucket: int, num_items: int) -> Iterator[pa.Table]:
        """Rows of one bucket, a table for each item that has some: for what is not held whole."""
        for item in range(num_items):
            part = self._part(item, 1 + bucket)
            if part is not None:
                yield part

    def _part(self, item: int, number: int) -> pa.Table | None:
        """Part 0 of a mapped file has no rows, and each bucket has the next; None where empty.

        Raises:
            StorageError: the file is too short.
        """
        path, place = self.mapped_path(item), _NUMBER.itemsize * number
        (head,) = storage.read_ranges([(path, place, place + 2 * _NUMBER.itemsize)])
        start, stop = map(int, np.frombuffer(head, _NUMBER))
        if start == stop:
            return None
        (data,) = storage.read_ranges([(path, start, stop)])
        return pa.ipc.open_stream(data).read_all()


@dataclass(frozen=True)
class _Map(FileTask[None, int], Generic[Item]):
    """The rows of one item, by bucket."""

    exchange: Exchange
    mapper: Mapper[Item]
    items: tuple[Item, ...]

    @property
    def resources(self) -> Resources:
        return self.exchange.resources

    def __call__(self, item: int, opened: None) -> TaskResult[int]:
        rows, buckets = self.mapper(self.items[item])
        self.exchange.write(item, rows, buckets)
        return TaskResult([self.exchange.mapped_path(item)], rows.num_rows)


@dataclass(frozen=True)
class _Reduce(FileTask[None, Result]):
    """What is made of the rows of one bucket."""

    exchange: Exchange
    reducer: Reducer[Result]
    num_items: int

    @property
    def resources(self) -> Resources:
        return self.exchange.resources

    def __call__(self, item: int, opened: None) -> TaskResult[Result]:
        return TaskResult([], self.reducer(item, self.exchange.read(item, self.num_items)))


def bucket_of_ids(ids: pa.Array | pa.ChunkedArray, num_buckets: int) -> np.ndarray:
    """(N,) bucket of each id: equal ranges of the id space, so that buckets are sorted by id."""
    if len(ids) == 0:
        return np.empty(0, np.int64)
    leading = np.ascontiguousarray(ids_to_bytes(ids)[:, :4])  # (N, 4)
    numbers = leading.view(">u4")[:, 0].astype(np.uint64)
    return ((numbers * np.uint64(num_buckets)) >> np.uint64(32)).astype(np.int64)


def bucket_of_id(row_id: str, num_buckets: int) -> int:
    """The same of a single id."""
    return (int(row_id[:8], 16) * num_buckets) >> 32


def _stream_size(rows: pa.Table, head: int) -> int:
    """Bytes of the stream of rows; none for none. head: bytes of one without rows."""
    batches = rows.to_batches()
    return head + sum(map(pa.ipc.get_record_batch_size, batches)) if batches else 0


def _stream_of(rows: pa.Table) -> pa.Buffer:
    """Rows of one batch, or none, with their schema."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue()
