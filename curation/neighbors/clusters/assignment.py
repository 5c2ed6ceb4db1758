"""The nearest centroid of every row of some files, block by block. n rows of a block, D width."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from curation import storage
from curation.neighbors.clusters.centroids import IndexedCentroids
from curation.neighbors.kernels.centroid_index import CentroidIndex
from curation.neighbors.kernels.quantized import quantize_rows
from curation.neighbors.kernels.threads import limit_threads
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.row_files import RowFiles
from curation.stage import Engine

_ROWS_AT_ONCE = 1 << 15
"""Rows of a block: their sums are rounded block by block, so it is part of the result."""


@dataclass(frozen=True)
class Assignment:
    """Rows, and the centroids among which each finds its nearest."""

    files: RowFiles
    indexed: IndexedCentroids
    threads: int

    def open(self) -> CentroidIndex:
        """The index, for a worker that uses so many threads."""
        limit_threads(self.threads)
        return self.indexed.load()

    def blocks(
        self, index: CentroidIndex, item: int, num_tasks: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """First position, rows (n, D) and their nearest (n,) int32, of what one task reads.

        It reads every `num_tasks`-th partition, from `item` on.
        """
        for partition in range(item, self.files.num_partitions, num_tasks):
            vectors = self.files.vectors(partition)
            for start in range(0, len(vectors), _ROWS_AT_ONCE):
                rows = np.asarray(vectors[start : start + _ROWS_AT_ONCE])
                nearest = index.nearest(quantize_rows(rows))
                yield self.files.starts[partition] + start, rows, nearest


@dataclass(frozen=True)
class FindOwners(FileTask[CentroidIndex, None]):
    """The cluster of each row of one partition, and how many rows each cluster has there."""

    of: Assignment
    folder: str

    def run(self, engine: Engine, label: str) -> None:
        """Find them for all partitions."""
        run_file_tasks(engine, self, self.of.files.num_partitions, self.folder, label)

    def owners(self, item: int) -> np.ndarray:
        """(n,) int32 clusters of the rows of one partition."""
        return ColumnFile.open(self._path(item))["owners"]

    def counts(self) -> np.ndarray:
        """(C,) int64: rows of each cluster in all partitions."""
        counts = np.zeros(self.of.indexed.centroids.count, np.int64)
        for item in range(self.of.files.num_partitions):
            file = ColumnFile.open(self._path(item))
            counts[file["clusters"]] += file["counts"]
        return counts

    def _path(self, item: int) -> str:
        return storage.join(self.folder, f"owners-{item:06d}.bin")

    def open(self) -> CentroidIndex:
        """The index of the centroids."""
        return self.of.open()

    def __call__(self, item: int, opened: CentroidIndex) -> TaskResult[None]:
        """Find the owners of one partition."""
        blocks = self.of.blocks(opened, item, self.of.files.num_partitions)
        owners = np.concatenate([np.empty(0, np.int32), *(nearest for *_, nearest in blocks)])
        clusters, counts = np.unique(owners, return_counts=True)
        columns = {"owners": owners, "clusters": clusters, "counts": counts}
        write_columns(self._path(item), columns)
        return TaskResult([self._path(item)], None)
