"""Levels of clusters: k-means over all rows out of core, then k-means over its centroids.

One iteration is one pass: `_Sum` tasks add up the rows of each cluster, a few partitions a task,
and `_Move` makes new centroids of the sums. Every iteration is finished by its files. The upper
levels cluster the centroids below, each followed by resampling: k-means from a fresh start on
the few points nearest to each centroid, which evens out how densely clusters lie (SPEC A.5).
N rows, C clusters, D width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.clustering import Centroids, cluster_sums, lloyd, means_of
from curation.neighbors.quantized import nearest_centroids, quantize_centroids, quantize_rows
from curation.neighbors.row_files import RowFiles, map_array, write_array
from curation.neighbors.steps import Done, Work, run_steps
from curation.neighbors.threads import limit_threads
from curation.stage import Engine

_MOST_TASKS = 16
"""Tasks of one pass: fixed, since sums are rounded in the order in which they are added."""
_ROWS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class Level:
    """One level of clusters."""

    centroids: Centroids
    owners_path: str | None = None
    """File of the clusters here of those below; None at the lowest level."""

    def owners(self) -> np.ndarray:
        """(C below,) int32: in which cluster of this level each cluster of the one below lies."""
        if self.owners_path is None:
            raise AssertionError("the lowest level has none below")
        return np.frombuffer(storage.read_bytes(self.owners_path), np.int32)


def refine(
    files: RowFiles,
    start: Centroids,
    iterations: int,
    folder: str,
    engine: Engine,
    *,
    seed: int,
    threads: int,
) -> tuple[Centroids, list[float]]:
    """Lloyd iterations over all rows; give the centroids, and the mean cosine of each pass."""
    centroids, cosines = start, []
    for iteration in range(iterations):
        root = storage.join(folder, f"iteration-{iteration:03d}")
        total = _Sum(files, centroids, root, threads)
        facts = run_steps(engine, total, total.num_tasks, root, f"cluster, pass {iteration + 1}")
        move = _Move(total, seed + iteration)
        run_steps(engine, move, 1, storage.join(root, "moved"), "move centroids")
        cosines.append(sum(fact["cosines"] for fact in facts) / max(1, files.num_rows))
        centroids = Centroids(move.path, centroids.count, files.width)
        for item in range(total.num_tasks):
            storage.remove(total.path(item))
            storage.write_bytes(total.path(item), b"")
    return centroids, cosines


@dataclass(frozen=True)
class _Sum(Work):
    """Sums of the unit rows of each cluster, over some partitions."""

    files: RowFiles
    centroids: Centroids
    folder: str
    threads: int

    @property
    def num_tasks(self) -> int:
        return min(_MOST_TASKS, self.files.num_partitions)

    def path(self, item: int) -> str:
        return storage.join(self.folder, f"sums-{item:06d}.bin")

    def open(self) -> Any:
        limit_threads(self.threads)
        return quantize_centroids(self.centroids.load())

    def __call__(self, item: int, opened: Any) -> Done:
        count = self.centroids.count
        sums, counts = np.zeros((count, self.files.width)), np.zeros(count, np.int64)
        for partition in range(item, self.files.num_partitions, self.num_tasks):
            vectors = self.files.vectors(partition)
            for start in range(0, len(vectors), _ROWS_AT_ONCE):
                rows = np.asarray(vectors[start : start + _ROWS_AT_ONCE])
                found = cluster_sums(rows, nearest_centroids(quantize_rows(rows), opened), count)
                sums += found[0]
                counts += found[1]
        write_array(self.path(item), counts, sums)
        # every row's cosine to its centroid, added up: sums meet centroids once a cluster
        cosines = float(np.einsum("cd,cd->", sums, self.centroids.load().astype(np.float64)))
        return Done((), {"cosines": cosines})

    def total(self) -> tuple[np.ndarray, np.ndarray]:
        """(C, D) float64 sums and (C,) int64 counts over all partitions."""
        count, width = self.centroids.count, self.files.width
        sums, counts = np.zeros((count, width)), np.zeros(count, np.int64)
        for item in range(self.num_tasks):
            counts += map_array(self.path(item), "int64", 0, (count,))
            sums += map_array(self.path(item), "float64", 8 * count, (count, width))
        return sums, counts


@dataclass(frozen=True)
class _Move(Work):
    """New centroids from the sums of all partitions."""

    sums: _Sum
    seed: int

    @property
    def path(self) -> str:
        return storage.join(self.sums.folder, "centroids.bin")

    def __call__(self, item: int, opened: Any) -> Done:
        sums, counts = self.sums.total()
        rng = np.random.default_rng(self.seed)
        write_array(self.path, means_of(sums, counts, self.sums.centroids.load(), rng))
        return Done([self.path], {"empty": int((counts == 0).sum())})


def level_above(
    below: Centroids,
    count: int,
    folder: str,
    engine: Engine,
    *,
    iterations: int,
    resamplings: int,
    per_cluster: int,
    seed: int,
    threads: int,
) -> Level:
    """Cluster the centroids of a level; give the level above, and the parents of those below."""
    upper = _Upper(below, count, iterations, resamplings, per_cluster, folder, seed, threads)
    fact = run_steps(engine, upper, 1, folder, "cluster the centroids")[0]
    return Level(Centroids(upper.centroids_path, fact["count"], below.width), upper.parents_path)


@dataclass(frozen=True)
class _Upper(Work):
    """The clusters of a level's centroids, evened out by resampling."""

    below: Centroids
    count: int
    iterations: int
    resamplings: int
    per_cluster: int
    folder: str
    seed: int
    threads: int

    def open(self) -> Any:
        limit_threads(self.threads)

    @property
    def centroids_path(self) -> str:
        return storage.join(self.folder, "centroids.bin")

    @property
    def parents_path(self) -> str:
        return storage.join(self.folder, "parents.bin")

    def __call__(self, item: int, opened: Any) -> Done:
        rows, rng = np.asarray(self.below.load()), np.random.default_rng(self.seed)
        quantized = quantize_rows(rows)
        centroids, nearest = lloyd(rows, quantized, self.count, self.iterations, rng)
        for _ in range(self.resamplings):
            some = nearest_of_each(rows, centroids, nearest, self.per_cluster)
            centroids, _ = lloyd(rows[some], quantized[some], self.count, self.iterations, rng)
            nearest = nearest_centroids(quantized, quantize_centroids(centroids))
        write_array(self.centroids_path, centroids)
        write_array(self.parents_path, nearest.astype(np.int32))
        return Done([self.centroids_path, self.parents_path], {"count": len(centroids)})


def nearest_of_each(
    rows: np.ndarray, centroids: np.ndarray, nearest: np.ndarray, count: int
) -> np.ndarray:
    """(M,) int64, ascending: of each cluster the `count` rows nearest to its centroid.

    rows: (N, D) and centroids: (C, D) unit rows; nearest: (N,).
    """
    cosines = np.einsum("nd,nd->n", rows, centroids[nearest])
    order = np.lexsort((-cosines, nearest))
    owners = nearest[order]
    starts = np.searchsorted(owners, np.arange(len(centroids)))
    ranks = np.arange(len(order)) - starts[owners]
    return np.sort(order[ranks < count])
