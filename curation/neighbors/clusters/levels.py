"""Levels of clusters: the centroids of one level are the rows of the next.

A level is trained on a sample, refined by passes over all rows, evened out by fresh starts. Every
step is finished by its files. N rows, C clusters, D width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.neighbors.clusters.assignment import Assignment, FindOwners
from curation.neighbors.clusters.centroids import (
    Centroids,
    IndexedCentroids,
    index_for,
    train_centroids,
)
from curation.neighbors.clusters.passes import Fit, refine, resample
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.row_files import RowFiles
from curation.stage import Engine

_CENTROIDS_PER_FILE = 1 << 15
_FIRST_ITERATIONS, _ROWS_PER_CENTROID = 20, 64
"""On the sample, where passes over all rows follow."""


@dataclass(frozen=True)
class Level:
    """One level of clusters."""

    rows: RowFiles
    """Its centroids, unit rows in the order of their numbers."""
    below: FindOwners | None = None
    """Clusters here of those of the level below; None at the lowest level."""

    @property
    def count(self) -> int:
        """Number of clusters."""
        return self.rows.num_rows

    def owners(self) -> np.ndarray:
        """(C below,) int32: in which cluster of this level each cluster of the one below lies."""
        assert self.below is not None, "the lowest level has none below"
        items = range(self.below.of.files.num_partitions)
        return np.concatenate([self.below.owners(item) for item in items])


def find_clusters(
    files: RowFiles, fit: Fit, folder: str, engine: Engine
) -> tuple[IndexedCentroids, dict[str, Any]]:
    """Find the clusters of rows; give their centroids, and figures."""
    centroids = train_centroids(
        files,
        fit.count,
        folder,
        engine,
        seed=fit.seed,
        iterations=_FIRST_ITERATIONS if fit.passes else fit.iterations,
        rows_per_centroid=_ROWS_PER_CENTROID if fit.passes else max(1, files.num_rows),
        sample_bytes=fit.sample_bytes,
    )
    centroids, cosines = refine(files, centroids, fit, folder, engine)
    for number in range(fit.resamplings):
        root = storage.join(folder, f"resampling-{number:03d}")
        centroids = resample(files, centroids, fit, number, root, engine)
    root = storage.join(folder, "last")
    indexed = index_for(files, centroids, fit.agreement, fit.seed, root, engine)
    return indexed, {"mean_cosine_by_pass": cosines, "assignment": indexed.figures()}


def fits_in_memory(files: RowFiles, sample_bytes: int) -> bool:
    """Whether all rows can be held, as stored and as 8-bit integers."""
    per_row = files.width * (np.dtype(files.dtype).itemsize + 1)
    return files.num_rows * per_row <= sample_bytes


def level_above(
    below: RowFiles, fit: Fit, folder: str, engine: Engine
) -> tuple[Level, dict[str, Any]]:
    """Cluster the centroids of a level; give the level above, and figures."""
    indexed, figures = find_clusters(below, fit, folder, engine)
    owners = FindOwners(Assignment(below, indexed, fit.threads), storage.join(folder, "owned"))
    owners.run(engine, "assign the centroids")
    rows = centroid_rows(indexed.centroids, storage.join(folder, "rows"), engine)
    return Level(rows, owners), figures


def centroid_rows(centroids: Centroids, folder: str, engine: Engine) -> RowFiles:
    """Centroids as rows of files, which can be clustered in turn."""
    bounds = (*range(0, centroids.count, _CENTROIDS_PER_FILE), centroids.count)
    files = rows_of_level(folder, centroids.width, bounds)
    task, written = _WriteRows(centroids, files), storage.join(folder, "written")
    run_file_tasks(engine, task, files.num_partitions, written, "write level")
    return files


def rows_of_level(folder: str, width: int, bounds: tuple[int, ...]) -> RowFiles:
    """The files of a level's centroids. bounds: (P + 1,) first number in each, then the count."""
    return RowFiles(folder, width, "float32", bounds, tuple(range(len(bounds))))


@dataclass(frozen=True)
class _WriteRows(FileTask[None, None]):
    centroids: Centroids
    files: RowFiles

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        first, stop = self.files.starts[item : item + 2]
        rows = self.centroids.load()[first:stop]
        return TaskResult(write_level_part(self.files, item, rows), None)


def write_level_part(files: RowFiles, item: int, centroids: np.ndarray) -> list[str]:
    """Write one file of a level's centroids; their numbers stand for ids. (n, D) float32."""
    numbers = np.zeros((len(centroids), 2), np.uint64)
    numbers[:, 0] = files.starts[item] + np.arange(len(centroids))
    return [files.write(item, centroids, numbers.view(np.uint8))]
