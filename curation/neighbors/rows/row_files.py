"""Rows of several pools, laid out once in the order of their lists, as files for range reads.

A row's position is its rank by (list, id, set). That order depends on the rows alone, so nothing
that is computed over positions depends on shards, their order, or the number of workers.
N rows, D width, P partitions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation import storage
from curation.errors import StorageError

_GAP_BYTES = 1 << 20
"""What is fetched in vain on an object store at most, rather than with another request."""
_BYTES_AT_ONCE = 1 << 28
"""Of what is fetched, before all but the wanted rows goes."""

_Run = tuple[str, int, int, np.ndarray]
"""A file, the first byte and the end of a part of it, and the rows that are wanted, from there."""


@dataclass(frozen=True)
class RowFiles:
    """The files of an arranged inverted file; small enough to be sent with every task."""

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
        """File of one kind ("vectors", "ids", "rows", "routes") of one partition."""
        return storage.join(self.folder, f"{kind}-{partition:06d}.bin")

    def vectors(self, partition: int) -> np.ndarray:
        """(N, D): vectors of one partition, mapped where the file is local."""
        return self._array("vectors", partition, self.dtype, self.width)

    def ids(self, partition: int) -> np.ndarray:
        """(N, 16) uint8: ids of one partition."""
        return self._array("ids", partition, "uint8", 16)

    def rows(self, partition: int) -> pa.Table:
        """Where the rows came from: set, shard, row, list, first (identical row), attributes."""
        with storage.open_read(self.path("rows", partition)) as file:
            return pa.ipc.open_file(file).read_all()

    def size(self, partition: int) -> int:
        """Rows of one partition."""
        return self.starts[partition + 1] - self.starts[partition]

    def gather(self, kind: str, positions: np.ndarray) -> np.ndarray:
        """(N, D) vectors or (N, 16) ids of any rows, each partition read in file order."""
        return RowReader(self, kind).gather(positions)

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of each position: (N,) int32 both."""
        shards, rows = np.empty(len(positions), np.int32), np.empty(len(positions), np.int32)
        for partition, where in self.by_partition(positions):
            local = pa.array(positions[where] - self.starts[partition])
            table = self.rows(partition).select(["shard", "row"]).take(local)
            shards[where], rows[where] = np.asarray(table["shard"]), np.asarray(table["row"])
        return shards, rows

    def sets(self, positions: np.ndarray) -> np.ndarray:
        """(N,) int16: number of the set that each position belongs to."""
        found = np.empty(len(positions), np.int16)
        for partition, where in self.by_partition(positions):
            numbers = np.asarray(self.rows(partition)["set"])
            found[where] = numbers[positions[where] - self.starts[partition]]
        return found

    def by_partition(self, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Partitions that hold some of the positions, and which of them, in file order."""
        ascending = bool((positions[1:] >= positions[:-1]).all())
        order = np.arange(len(positions)) if ascending else np.argsort(positions, kind="stable")
        bounds = np.searchsorted(positions[order], self.starts)
        for partition in np.flatnonzero(np.diff(bounds)):
            yield int(partition), order[bounds[partition] : bounds[partition + 1]]

    def _array(self, kind: str, partition: int, dtype: str, width: int) -> np.ndarray:
        shape = (self.size(partition), width)
        return map_array(self.path(kind, partition), dtype, 0, shape)


class RowReader:
    """Gathers rows from all partitions.

    Local files are mapped once and stay so. On an object store what is asked for is fetched, with
    what lies between when that costs less than another request.
    """

    def __init__(self, files: RowFiles, kind: str = "vectors") -> None:
        self._files = files
        self._kind = kind
        self._of = files.vectors if kind == "vectors" else files.ids
        self._empty = np.empty((0, files.width), files.dtype)
        if kind == "ids":
            self._empty = np.empty((0, 16), np.uint8)
        self._mapped: dict[int, np.ndarray] = {}

    def gather(self, positions: np.ndarray) -> np.ndarray:
        """(N, D) vectors or (N, 16) ids of any rows; fastest where positions ascend."""
        if not storage.is_local(self._files.folder):
            return self._fetched(positions)
        found = np.empty((len(positions), self._empty.shape[1]), self._empty.dtype)
        for partition, where in self._files.by_partition(positions):
            source = self._partition(partition)
            rows = positions[where] - self._files.starts[partition]
            first, last = int(where[0]), int(where[-1])
            if last - first == len(where) - 1 and bool((where[1:] > where[:-1]).all()):
                run = found[first : last + 1]
                np.take(source, rows, axis=0, out=run, mode="clip")  # clip: without a buffer
            else:
                found[where] = source[rows]
        return found

    def _fetched(self, positions: np.ndarray) -> np.ndarray:
        """(N, W): the rows at some positions, by range reads."""
        known, numbers = np.unique(positions, return_inverse=True)
        parts, num_bytes = [self._empty], 0
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
        row_bytes = self._empty.shape[1] * self._empty.itemsize
        for partition, where in self._files.by_partition(positions):
            path = self._files.path(self._kind, partition)
            rows = positions[where] - self._files.starts[partition]
            far = np.flatnonzero(np.diff(rows) * row_bytes > _GAP_BYTES)
            for run in np.split(rows, far + 1):
                start, stop = int(run[0]) * row_bytes, int(run[-1] + 1) * row_bytes
                yield path, start, stop, run - run[0]

    def _fetch(self, runs: Sequence[_Run]) -> list[np.ndarray]:
        """(M, W) wanted rows of each run."""
        found = storage.read_ranges([run[:3] for run in runs])
        whole = (np.frombuffer(data, self._empty.dtype) for data in found)
        width = self._empty.shape[1]
        return [data.reshape(-1, width)[rows] for data, (*_, rows) in zip(whole, runs, strict=True)]

    def _partition(self, partition: int) -> np.ndarray:
        if partition in self._mapped:
            return self._mapped[partition]
        source = self._of(partition)
        if isinstance(source, np.memmap):
            source = source.view(np.ndarray)  # its own indexing is slow
            self._mapped[partition] = source
        return source


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
