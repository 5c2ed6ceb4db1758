"""Rows of several pools, laid out once in the order of their lists, as files for range reads.

A row's position is its rank by (list, id, set). That order depends on the rows alone, so nothing
that is computed over positions depends on shards, their order, or the number of workers.
N rows, D width, P partitions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from curation import storage
from curation.errors import StorageError
from curation.neighbors.rows.column_file import ColumnFile, TypeAndShape, write_columns

_GAP_BYTES = 1 << 20
"""What is fetched in vain on an object store at most, rather than with another request."""
_BYTES_AT_ONCE = 1 << 28
"""Of what is fetched, before all but the wanted rows goes."""

_Run = tuple[str, int, int, np.ndarray]
"""A file, the first byte and the end of a part of it, and the rows that are wanted, from there."""

PLACE_TYPES = {
    "set": "int16",
    "shard": "int32",
    "row": "int32",
    "list": "int32",
    "first": "int64",
    "pixels": "int64",
    "num_bytes": "int64",
}
"""Columns beside ids and vectors: where a row came from, its list, and the first row of its
partition that is identical; pixels of the original and bytes of the file, 0 where unknown."""


@dataclass(frozen=True)
class RowFiles:
    """The files of arranged rows, one a partition; small enough to be sent with every task."""

    folder: str
    width: int
    dtype: str
    """Of the vectors as stored: float16 or float32."""
    starts: tuple[int, ...]
    """(P + 1,): first position of each partition, then the number of rows."""
    list_starts: tuple[int, ...]
    """(P + 1,): first list of each partition, then the number of lists."""

    @property
    def num_partitions(self) -> int:
        """Number of partitions."""
        return len(self.starts) - 1

    @property
    def num_rows(self) -> int:
        """Rows of all partitions."""
        return self.starts[-1]

    def path(self, kind: str, partition: int) -> str:
        """File of one kind ("rows", "routes") of one partition."""
        return storage.join(self.folder, f"{kind}-{partition:06d}.bin")

    def write(
        self,
        partition: int,
        vectors: np.ndarray,
        ids: np.ndarray,
        places: Mapping[str, np.ndarray] | None = None,
    ) -> str:
        """Write the rows of one partition; give the path.

        vectors: (N, D); ids: (N, 16) uint8; places: those of `PLACE_TYPES` that are known.
        """
        columns = {
            name: np.asarray((places or {}).get(name, np.zeros(len(ids))), kind)
            for name, kind in PLACE_TYPES.items()
        }
        columns |= {"ids": ids, "vectors": vectors.astype(self.dtype, copy=False)}
        write_columns(self.path("rows", partition), columns)
        return self.path("rows", partition)

    def rows(self, partition: int) -> ColumnFile:
        """The columns of one partition: ids, vectors, and those of `PLACE_TYPES`."""
        path = self.path("rows", partition)
        return ColumnFile.open(path) if storage.is_local(path) else self._expected(path, partition)

    def _expected(self, path: str, partition: int) -> ColumnFile:
        """The same without a request for its header."""
        count = self.size(partition)
        shapes: dict[str, TypeAndShape] = {k: (v, (count,)) for k, v in PLACE_TYPES.items()}
        shapes |= {"ids": ("uint8", (count, 16)), "vectors": (self.dtype, (count, self.width))}
        return ColumnFile.expect(path, shapes)

    def vectors(self, partition: int) -> np.ndarray:
        """(N, D): vectors of one partition, mapped where the file is local."""
        return self.rows(partition)["vectors"]

    def ids(self, partition: int) -> np.ndarray:
        """(N, 16) uint8: ids of one partition."""
        return self.rows(partition)["ids"]

    def size(self, partition: int) -> int:
        """Rows of one partition."""
        return self.starts[partition + 1] - self.starts[partition]

    def gather(self, column: str, positions: np.ndarray) -> np.ndarray:
        """(N, D) vectors, (N, 16) ids or another column of any rows, partitions in file order."""
        return RowReader(self, column).gather(positions)

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of each position: (N,) int32 both."""
        return self.gather("shard", positions), self.gather("row", positions)

    def by_partition(self, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Partitions that hold some of the positions, and which of them, in file order."""
        ascending = bool((positions[1:] >= positions[:-1]).all())
        order = np.arange(len(positions)) if ascending else np.argsort(positions, kind="stable")
        bounds = np.searchsorted(positions[order], self.starts)
        for partition in np.flatnonzero(np.diff(bounds)):
            yield int(partition), order[bounds[partition] : bounds[partition + 1]]


@dataclass(frozen=True)
class RowReader:
    """Gathers one column of rows from all partitions.

    Local files are mapped once and stay so. On an object store what is asked for is fetched, with
    what lies between when that costs less than another request.
    """

    files: RowFiles
    column: str = "vectors"
    _mapped: dict[int, np.ndarray] = field(default_factory=dict)

    def gather(self, positions: np.ndarray) -> np.ndarray:
        """(N, ...): the column at any positions; fastest where these ascend."""
        if not storage.is_local(self.files.folder):
            return self._fetched(positions)
        found = self._empty(len(positions))
        for partition, where in self.files.by_partition(positions):
            source = self._partition(partition)
            rows = positions[where] - self.files.starts[partition]
            first, last = int(where[0]), int(where[-1])
            if last - first == len(where) - 1 and bool((where[1:] > where[:-1]).all()):
                run = found[first : last + 1]
                np.take(source, rows, axis=0, out=run, mode="clip")  # clip: without a buffer
            else:
                found[where] = source[rows]
        return found

    def _empty(self, count: int) -> np.ndarray:
        if self.column in PLACE_TYPES:
            return np.empty(count, PLACE_TYPES[self.column])
        if self.column == "ids":
            return np.empty((count, 16), np.uint8)
        return np.empty((count, self.files.width), self.files.dtype)

    def _partition(self, partition: int) -> np.ndarray:
        if partition not in self._mapped:
            rows = self.files.rows(partition)[self.column]
            if len(rows) != self.files.size(partition):
                path = self.files.path("rows", partition)
                raise StorageError(f"{path}: has {len(rows)} rows; remove it and run again")
            self._mapped[partition] = rows
        return self._mapped[partition]

    def _fetched(self, positions: np.ndarray) -> np.ndarray:
        """(N, ...): the column at some positions, by range reads."""
        known, numbers = np.unique(positions, return_inverse=True)
        parts, num_bytes = [self._empty(0)], 0
        waiting: list[_Run] = []
        for run in self._runs(known):
            waiting.append(run)
            num_bytes += run[2] - run[1]
            if num_bytes >= _BYTES_AT_ONCE:
                parts += self._fetch(waiting)
                waiting, num_bytes = [], 0
        parts += self._fetch(waiting)
        return np.concatenate(parts)[numbers]

    def _runs(self, positions: np.ndarray) -> Iterator[_Run]:
        """Rows that lie near each other in one file. positions: ascending."""
        for partition, where in self.files.by_partition(positions):
            file = self.files.rows(partition)
            column = file.columns[self.column]
            rows = positions[where] - self.files.starts[partition]
            far = np.flatnonzero(np.diff(rows) * column.row_bytes > _GAP_BYTES)
            for run in np.split(rows, far + 1):
                yield (file.path, *column.span(int(run[0]), int(run[-1]) + 1), run - run[0])

    def _fetch(self, runs: Sequence[_Run]) -> list[np.ndarray]:
        """(M, ...) wanted rows of each run."""
        found, empty = storage.read_ranges([run[:3] for run in runs]), self._empty(0)
        whole = (np.frombuffer(data, empty.dtype).reshape(-1, *empty.shape[1:]) for data in found)
        return [data[rows] for data, (*_, rows) in zip(whole, runs, strict=True)]


def write_array(path: str, *arrays: np.ndarray) -> None:
    """Write arrays one after the other, as raw bytes, whole or not at all."""
    with storage.open_whole(path) as file:
        for array in arrays:
            file.write(
                np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""
            )


def map_array(path: str, dtype: str, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """Part of a raw file as an array: mapped where local, else read by range.

    Raises:
        StorageError: the file is missing or too short.
    """
    kind = np.dtype(dtype)
    count = int(np.prod(shape))
    if count == 0:
        return np.empty(shape, kind)
    if storage.is_local(path):
        try:
            return np.memmap(path.removeprefix("file://"), kind, "r", offset, shape)
        except (OSError, ValueError) as error:
            raise StorageError(f"{path}: cannot be read: {error}; run the stage again") from error
    (data,) = storage.read_ranges([(path, offset, offset + count * kind.itemsize)])
    return np.frombuffer(data, kind).reshape(shape)
