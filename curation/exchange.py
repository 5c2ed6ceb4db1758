"""A keyed exchange through files: mappers split rows into buckets, reducers take a bucket each.

A mapper writes one Arrow file with one record batch a bucket; a reducer reads its batch from each
file by range. Both halves resume by finished files, so what a killed run did is kept. Nothing
passes through the driver but small results.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from curation import storage
from curation.schema import ids_to_bytes
from curation.stage import Engine, Resources, Task

Item = TypeVar("Item")


class Mapper(ABC, Generic[Item]):
    """Splits the rows of one item into buckets."""

    @abstractmethod
    def __call__(self, item: Item) -> tuple[pa.Table, np.ndarray]:
        """Give the rows and the bucket of each, (N,) integers."""


class Reducer(ABC):
    """Works on all rows of one bucket."""

    @abstractmethod
    def __call__(self, bucket: int, rows: pa.Table) -> Any:
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
        self, engine: Engine, mapper: Mapper[Item], items: Sequence[Item], reducer: Reducer
    ) -> list[Any]:
        """Map every item, reduce every bucket; give the reducers' results in bucket order."""
        numbered = list(enumerate(items))
        mapped = _finished(storage.join(self.folder, "mapped"), ".arrow")
        waiting = [pair for pair in numbered if pair[0] not in mapped]
        for _ in engine.map(_Map(self, mapper), waiting, f"{self._label} (split)"):
            pass
        reduced = _finished(storage.join(self.folder, "reduced"), ".json")
        buckets = [bucket for bucket in range(self.num_buckets) if bucket not in reduced]
        for _ in engine.map(_Reduce(self, reducer, len(items)), buckets, f"{self._label} (join)"):
            pass
        paths = map(self.result_path, range(self.num_buckets))
        return storage.gather(storage.read_json, paths, self.folder)

    @property
    def _label(self) -> str:
        return self.folder.rstrip("/").rpartition("/")[2]

    def mapped_path(self, item: int) -> str:
        """File of one mapped item."""
        return storage.join(self.folder, "mapped", f"{item:06d}.arrow")

    def result_path(self, bucket: int) -> str:
        """File of one bucket's result: the commit of its reduction."""
        return storage.join(self.folder, "reduced", f"{bucket:06d}.json")

    def write(self, item: int, rows: pa.Table, buckets: np.ndarray) -> None:
        """Write one item's rows, a record batch a bucket."""
        order = np.argsort(buckets, kind="stable")
        rows = rows.take(pa.array(order)).combine_chunks()
        bounds = np.searchsorted(buckets[order], np.arange(self.num_buckets + 1))
        path = self.mapped_path(item)
        with storage.open_whole(path) as file, pa.ipc.new_file(file, rows.schema) as writer:
            for start, stop in itertools.pairwise(bounds):
                writer.write_batch(_single_batch(rows.slice(start, stop - start)))

    def read(self, bucket: int, num_items: int) -> pa.Table:
        """Rows of one bucket from all mapped items, in item order."""

        def read_item(item: int) -> pa.RecordBatch:
            with storage.open_read(self.mapped_path(item), by_range=True) as file:
                return pa.ipc.open_file(file).get_batch(bucket)

        return pa.Table.from_batches(storage.gather(read_item, range(num_items), self.folder))

    def batches(self, bucket: int, num_items: int) -> Iterator[pa.RecordBatch]:
        """Rows of one bucket, a batch an item, for buckets that are not held whole."""
        for item in range(num_items):
            with storage.open_read(self.mapped_path(item), by_range=True) as file:
                yield pa.ipc.open_file(file).get_batch(bucket)


@dataclass(frozen=True)
class _Map(Task[tuple[int, Any], int]):
    exchange: Exchange
    mapper: Mapper[Any]

    @property
    def resources(self) -> Resources:  # type: ignore[override]  # a constant elsewhere
        return self.exchange.resources

    def __call__(self, item: tuple[int, Any], opened: Any) -> int:
        rows, buckets = self.mapper(item[1])
        self.exchange.write(item[0], rows, buckets)
        return int(rows.num_rows)


@dataclass(frozen=True)
class _Reduce(Task[int, None]):
    exchange: Exchange
    reducer: Reducer
    num_items: int

    @property
    def resources(self) -> Resources:  # type: ignore[override]  # a constant elsewhere
        return self.exchange.resources

    def __call__(self, item: int, opened: Any) -> None:
        result = self.reducer(item, self.exchange.read(item, self.num_items))
        storage.write_json(self.exchange.result_path(item), result)


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


def _finished(folder: str, suffix: str) -> set[int]:
    names = storage.list_files(folder, suffix)
    return {int(name.removesuffix(suffix)) for name in names if not name.startswith(".")}


def _single_batch(rows: pa.Table) -> pa.RecordBatch:
    batches = rows.combine_chunks().to_batches()
    if batches:
        return batches[0]
    return pa.RecordBatch.from_pylist([], schema=rows.schema)
