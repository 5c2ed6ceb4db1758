"""Passes over all rows: Lloyd iterations out of core, and fresh starts that even clusters out.

In one iteration `_Sum` tasks add up the rows of each cluster and `_Move` makes new centroids of
the sums. A fresh start (resampling) clusters the few rows nearest to each centroid, which evens out
how densely clusters lie (SPEC A.5). One task holds a level's centroids, never rows times centroids.
N rows, C clusters, D width.
"""

from dataclasses import dataclass

import numpy as np

from curation import storage
from curation.neighbors.clusters.assignment import Assignment
from curation.neighbors.clusters.centroids import Centroids, index_for
from curation.neighbors.kernels.centroid_index import CentroidIndex
from curation.neighbors.kernels.k_means import cluster_sums, lloyd, means_of
from curation.neighbors.kernels.selection import ranks_within
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import (
    FileTask,
    TaskResult,
    finished_summaries,
    run_file_tasks,
)
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.rows.vectors import exact_similarities
from curation.stage import Engine

_MOST_TASKS = 16
"""Tasks of one pass: fixed, since sums are rounded in the order in which they are added."""


@dataclass(frozen=True)
class Fit:
    """How the clusters of one level are found."""

    count: int
    passes: int
    """Over all rows, after training on a sample; none where `iterations` is for all rows."""
    iterations: int
    """Of k-means on rows in memory."""
    resamplings: int
    per_cluster: int
    """Rows of each cluster that resampling draws."""
    agreement: float
    """Share of the rows that get the centroid which exhaustive comparison would give."""
    seed: int
    threads: int
    sample_bytes: int
    """What rows in memory may take."""


@dataclass(frozen=True)
class Pass:
    """One pass over all rows, from some centroids to the next."""

    files: RowFiles
    before: Centroids
    fit: Fit
    folder: str

    @property
    def num_tasks(self) -> int:
        """Tasks that share the partitions."""
        return min(_MOST_TASKS, self.files.num_partitions)

    @property
    def target(self) -> str:
        """File of the next centroids."""
        return storage.join(self.folder, "centroids.bin")

    def path(self, item: int) -> str:
        """File of what one task found."""
        return storage.join(self.folder, f"found-{item:06d}.bin")

    def assignment(self, engine: Engine) -> Assignment:
        """The nearest of the centroids for every row."""
        fit = self.fit
        indexed = index_for(self.files, self.before, fit.agreement, fit.seed, self.folder, engine)
        return Assignment(self.files, indexed, fit.threads)


def refine(
    files: RowFiles, start: Centroids, fit: Fit, folder: str, engine: Engine
) -> tuple[Centroids, list[float]]:
    """Lloyd iterations over all rows; give the centroids, and the mean cosine of each pass."""
    centroids, cosines = start, []
    for number in range(fit.passes):
        one = Pass(files, centroids, fit, storage.join(folder, f"iteration-{number:03d}"))
        moved = storage.join(one.folder, "moved")
        if finished_summaries(moved, 1) is None:
            task = _Sum(one, one.assignment(engine))
            label = f"cluster, pass {number + 1}"
            run_file_tasks(engine, task, one.num_tasks, one.folder, label)
        move = _Move(one, fit.seed + number)
        (cosine,) = run_file_tasks(engine, move, 1, moved, "move centroids")
        cosines.append(cosine / max(1, files.num_rows))
        centroids = Centroids(one.target, centroids.count, files.width)
        for item in range(one.num_tasks):  # a later run starts from the centroids
            storage.remove(one.path(item))
    return centroids, cosines


@dataclass(frozen=True)
class _Sum(FileTask[CentroidIndex, None]):
    """Sums of the unit rows of each cluster, over some partitions."""

    of: Pass
    assignment: Assignment

    def open(self) -> CentroidIndex:
        return self.assignment.open()

    def __call__(self, item: int, opened: CentroidIndex) -> TaskResult[None]:
        count, width = self.of.before.count, self.of.before.width
        sums, counts = np.zeros((count, width)), np.zeros(count, np.int64)
        for _, rows, nearest in self.assignment.blocks(opened, item, self.of.num_tasks):
            found = cluster_sums(rows, nearest, count)
            sums += found[0]
            counts += found[1]
        write_columns(self.of.path(item), {"counts": counts, "sums": sums})
        return TaskResult([self.of.path(item)], None)


@dataclass(frozen=True)
class _Move(FileTask[None, float]):
    """New centroids from the sums of all tasks; gives the sum of the rows' cosines before."""

    of: Pass
    seed: int

    def __call__(self, item: int, opened: None) -> TaskResult[float]:
        before = self.of.before.load()
        sums, counts = np.zeros(before.shape), np.zeros(len(before), np.int64)
        for task in range(self.of.num_tasks):
            file = ColumnFile.open(self.of.path(task))
            counts += file["counts"]
            sums += file["sums"]
        rng = np.random.default_rng(self.seed)
        Centroids.written(self.of.target, means_of(sums, counts, before, rng))
        # every row's cosine to its centroid, added up: sums meet centroids once a cluster
        cosines = float(np.einsum("cd,cd->", sums, before.astype(np.float64)))
        return TaskResult([self.of.target], cosines)


def resample(
    files: RowFiles, centroids: Centroids, fit: Fit, number: int, folder: str, engine: Engine
) -> Centroids:
    """Start afresh on the rows nearest to each centroid; give the new centroids."""
    one = Pass(files, centroids, fit, folder)
    resampled, label = storage.join(folder, "resampled"), f"resample {number + 1}"
    if finished_summaries(resampled, 1) is None:
        draw = _DrawNearest(one, one.assignment(engine))
        run_file_tasks(engine, draw, one.num_tasks, folder, f"{label}, draw")
    (count,) = run_file_tasks(engine, _Resample(one, number), 1, resampled, label)
    return Centroids(one.target, count, files.width)


_Drawn = dict[str, np.ndarray]
"""clusters (M,) int32, cosines (M,) float32, positions (M,) int64."""
_NONE_DRAWN: _Drawn = {
    "clusters": np.empty(0, np.int32),
    "cosines": np.empty(0, np.float32),
    "positions": np.empty(0, np.int64),
}


@dataclass(frozen=True)
class _DrawNearest(FileTask[tuple[CentroidIndex, np.ndarray], None]):
    """Of each cluster the rows nearest to its centroid, among some partitions."""

    of: Pass
    assignment: Assignment

    def open(self) -> tuple[CentroidIndex, np.ndarray]:
        return self.assignment.open(), self.of.before.load()

    def __call__(self, item: int, opened: tuple[CentroidIndex, np.ndarray]) -> TaskResult[None]:
        index, centroids = opened
        drawn = _NONE_DRAWN
        for first, rows, nearest in self.assignment.blocks(index, item, self.of.num_tasks):
            found = {
                "clusters": nearest,
                "cosines": exact_similarities(rows, centroids[nearest]),
                "positions": first + np.arange(len(rows)),
            }
            drawn = nearest_of_each([drawn, found], self.of.fit.per_cluster)
        write_columns(self.of.path(item), drawn)
        return TaskResult([self.of.path(item)], None)


def nearest_of_each(parts: list[_Drawn], count: int) -> _Drawn:
    """Of each cluster the `count` rows nearest to its centroid; of equals the first."""
    drawn = {name: np.concatenate([part[name] for part in parts]) for name in _NONE_DRAWN}
    order = np.lexsort((drawn["positions"], -drawn["cosines"], drawn["clusters"]))
    kept = order[ranks_within(drawn["clusters"][order]) < count]
    return {name: column[kept] for name, column in drawn.items()}


@dataclass(frozen=True)
class _Resample(FileTask[None, int]):
    """k-means from a fresh start on the rows drawn by all tasks; gives the number of centroids."""

    of: Pass
    number: int

    def __call__(self, item: int, opened: None) -> TaskResult[int]:
        fit, drawn = self.of.fit, _NONE_DRAWN
        for task in range(self.of.num_tasks):
            file = ColumnFile.open(self.of.path(task))
            found = {name: file[name] for name in _NONE_DRAWN}
            drawn = nearest_of_each([drawn, found], fit.per_cluster)
        positions, centroids = np.sort(drawn["positions"]), self.of.before.load()
        if len(positions) >= len(centroids):  # fewer cannot make as many clusters
            rows = self.of.files.gather("vectors", positions)
            rng = np.random.default_rng([fit.seed, 2, self.number])
            centroids = lloyd(rows, len(centroids), fit.iterations, rng)
        return TaskResult([self.of.target], Centroids.written(self.of.target, centroids).count)
