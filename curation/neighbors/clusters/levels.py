"""Levels of clusters: k-means over rows out of core, evened out by resampling.

A level is trained on a sample, then refined: one iteration is one pass, in which `_Sum` tasks add
up the rows of each cluster and `_Move` makes new centroids of the sums. Resampling then starts
afresh on the few rows nearest to each centroid, which evens out how densely clusters lie (SPEC
A.5). The centroids of a level are rows on files again: those of the level above. Every iteration
is finished by its files. One task holds a level's centroids, never rows times centroids.
N rows, C clusters, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.neighbors.clusters.centroids import Centroids, sample_positions, train_centroids
from curation.neighbors.kernels.centroid_index import FLAT_UP_TO, CentroidIndex
from curation.neighbors.kernels.k_means import cluster_sums, index_centroids, lloyd, means_of
from curation.neighbors.kernels.quantized import quantize_rows
from curation.neighbors.kernels.threads import limit_threads
from curation.neighbors.rows.file_tasks import (
    FileTask,
    TaskResult,
    finished_summaries,
    run_file_tasks,
)
from curation.neighbors.rows.row_files import RowFiles, map_array, write_array
from curation.neighbors.rows.vectors import exact_similarities
from curation.stage import Engine

_MOST_TASKS = 16
"""Tasks of one pass: fixed, since sums are rounded in the order in which they are added."""
_ROWS_AT_ONCE = 1 << 15
_ROWS_ASKED = 4096
"""Sampled rows on which it is measured how many groups of centroids a row must meet."""
_FIRST_ITERATIONS = 20
"""On the sample, where passes over all rows follow."""


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
class Level:
    """One level of clusters."""

    rows: RowFiles
    """Its centroids, unit rows in the order of their numbers."""
    owners_paths: tuple[str, ...] = ()
    """Files of the clusters here of those below, one after the other; none at the lowest level."""

    @property
    def count(self) -> int:
        """Number of clusters."""
        return self.rows.num_rows

    def owners(self) -> np.ndarray:
        """(C below,) int32: in which cluster of this level each cluster of the one below lies."""
        if not self.owners_paths:
            raise AssertionError("the lowest level has none below")
        return np.concatenate(
            [np.frombuffer(storage.read_bytes(path), np.int32) for path in self.owners_paths]
        )


@dataclass(frozen=True)
class IndexedCentroids:
    """Centroids in a file, and their index in another."""

    centroids: Centroids
    path: str
    groups: int
    groups_met: int
    agreement: float
    """Share of sampled rows that get the nearest of all centroids."""

    def load(self) -> CentroidIndex:
        """The index, in memory."""
        shape = (self.centroids.count, self.centroids.width)
        return CentroidIndex.read(self.path, shape, self.groups, self.groups_met)

    def figures(self) -> dict[str, Any]:
        """How rows find their centroid."""
        return {"groups": self.groups, "groups_met": self.groups_met, "agreement": self.agreement}


def find_clusters(
    files: RowFiles, fit: Fit, folder: str, engine: Engine
) -> tuple[IndexedCentroids, dict[str, Any]]:
    """Find the clusters of rows; give their centroids, and figures."""
    iterations = _FIRST_ITERATIONS if fit.passes else fit.iterations
    centroids = train_centroids(
        files,
        fit.count,
        folder,
        engine,
        seed=fit.seed,
        iterations=iterations,
        rows_per_centroid=64 if fit.passes else max(1, files.num_rows),
        sample_bytes=fit.sample_bytes,
    )
    centroids, cosines = refine(files, centroids, fit, folder, engine)
    for number in range(fit.resamplings):
        root = storage.join(folder, f"resampling-{number:03d}")
        centroids = _resample(files, centroids, fit, number, root, engine)
    indexed = index_on_files(files, centroids, fit, storage.join(folder, "last"), engine)
    figures = {"mean_cosine_by_pass": cosines, "assignment": indexed.figures()}
    return indexed, figures


def fits_in_memory(files: RowFiles, sample_bytes: int) -> bool:
    """Whether all rows can be held, as stored and as 8-bit integers."""
    per_row = files.width * (np.dtype(files.dtype).itemsize + 1)
    return files.num_rows * per_row <= sample_bytes


def index_on_files(
    files: RowFiles, centroids: Centroids, fit: Fit, folder: str, engine: Engine
) -> IndexedCentroids:
    """Index centroids so that rows of these files find their nearest."""
    work = _Index(files, centroids, fit, folder)
    fact = run_file_tasks(engine, work, 1, storage.join(folder, "indexed"), "index the centroids")[
        0
    ]
    return IndexedCentroids(centroids, work.path, **fact)


@dataclass(frozen=True)
class _Index(FileTask[None, dict[str, Any]]):
    files: RowFiles
    centroids: Centroids
    fit: Fit
    folder: str

    @property
    def path(self) -> str:
        return storage.join(self.folder, "index.bin")

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        index, agreement = index_centroids(
            np.asarray(self.centroids.load()),
            self._sample(),
            self.fit.agreement,
            np.random.default_rng([self.fit.seed, 1]),
        )
        index.write(self.path)
        facts = {
            "groups": len(index.groups),
            "groups_met": index.groups_met,
            "agreement": round(agreement, 4),
        }
        return TaskResult([self.path], facts)

    def _sample(self) -> np.ndarray:
        """(S, D) int8: rows to be asked, where there is something to ask."""
        if self.centroids.count <= FLAT_UP_TO:
            return np.empty((0, self.files.width), np.int8)
        chosen = sample_positions(self.files, _ROWS_ASKED, "index", self.fit.seed)
        return quantize_rows(self.files.gather("vectors", chosen))


def refine(
    files: RowFiles, start: Centroids, fit: Fit, folder: str, engine: Engine
) -> tuple[Centroids, list[float]]:
    """Lloyd iterations over all rows; give the centroids, and the mean cosine of each pass."""
    centroids, cosines = start, []
    for number in range(fit.passes):
        root = storage.join(folder, f"iteration-{number:03d}")
        move = _pass(files, centroids, fit, root, number, engine)
        fact = run_file_tasks(engine, move, 1, move.folder, "move centroids")[0]
        cosines.append(fact["cosines"] / max(1, files.num_rows))
        centroids = Centroids(move.path, centroids.count, files.width)
        for item in range(move.num_tasks):  # a later run starts from the centroids
            storage.remove(_sums_path(root, item))
    return centroids, cosines


def _pass(
    files: RowFiles, centroids: Centroids, fit: Fit, root: str, number: int, engine: Engine
) -> "_Move":
    """Sum the rows of each cluster, unless the centroids have moved already."""
    num_tasks = min(_MOST_TASKS, files.num_partitions)
    move = _Move(centroids, num_tasks, root, fit.seed + number)
    if finished_summaries(move.folder, 1) is None:
        indexed = index_on_files(files, centroids, fit, root, engine)
        total = _Sum(files, indexed, root, num_tasks, fit.threads)
        run_file_tasks(engine, total, num_tasks, root, f"cluster, pass {number + 1}")
    return move


def _sums_path(folder: str, item: int) -> str:
    return storage.join(folder, f"sums-{item:06d}.bin")


@dataclass(frozen=True)
class _Sum(FileTask[Any, None]):
    """Sums of the unit rows of each cluster, over some partitions."""

    files: RowFiles
    indexed: IndexedCentroids
    folder: str
    num_tasks: int
    threads: int

    def open(self) -> Any:
        limit_threads(self.threads)
        return self.indexed.load()

    def __call__(self, item: int, opened: Any) -> TaskResult[None]:
        count = self.indexed.centroids.count
        sums, counts = np.zeros((count, self.files.width)), np.zeros(count, np.int64)
        for _, rows in blocks_of(self.files, item, self.num_tasks):
            found = cluster_sums(rows, opened.nearest(quantize_rows(rows)), count)
            sums += found[0]
            counts += found[1]
        path = _sums_path(self.folder, item)
        write_array(path, counts, sums)
        return TaskResult([path], None)


def blocks_of(files: RowFiles, item: int, num_tasks: int) -> Iterator[tuple[int, np.ndarray]]:
    """First position and vectors (n, D) of each block of rows that one of some tasks reads."""
    for partition in range(item, files.num_partitions, num_tasks):
        vectors = files.vectors(partition)
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            rows = np.asarray(vectors[start : start + _ROWS_AT_ONCE])
            yield files.starts[partition] + start, rows


@dataclass(frozen=True)
class _Move(FileTask[None, dict[str, Any]]):
    """New centroids from the sums of all partitions."""

    before: Centroids
    num_tasks: int
    root: str
    seed: int

    @property
    def folder(self) -> str:
        return storage.join(self.root, "moved")

    @property
    def path(self) -> str:
        return storage.join(self.root, "centroids.bin")

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        sums, counts = self._total()
        before, rng = self.before.load(), np.random.default_rng(self.seed)
        write_array(self.path, means_of(sums, counts, before, rng))
        # every row's cosine to its centroid, added up: sums meet centroids once a cluster
        cosines = float(np.einsum("cd,cd->", sums, before.astype(np.float64)))
        return TaskResult([self.path], {"empty": int((counts == 0).sum()), "cosines": cosines})

    def _total(self) -> tuple[np.ndarray, np.ndarray]:
        """(C, D) float64 sums and (C,) int64 counts over all partitions."""
        count, width = self.before.count, self.before.width
        sums, counts = np.zeros((count, width)), np.zeros(count, np.int64)
        for item in range(self.num_tasks):
            path = _sums_path(self.root, item)
            counts += map_array(path, "int64", 0, (count,))
            sums += map_array(path, "float64", 8 * count, (count, width))
        return sums, counts


def _resample(
    files: RowFiles, centroids: Centroids, fit: Fit, number: int, folder: str, engine: Engine
) -> Centroids:
    """Start afresh on the rows nearest to each centroid; give the new centroids."""
    draw = _Resample(files, centroids, fit, number, folder)
    if finished_summaries(draw.folder, 1) is None:
        indexed = index_on_files(files, centroids, fit, folder, engine)
        near = _Nearest(files, indexed, fit, folder, draw.num_tasks)
        run_file_tasks(engine, near, draw.num_tasks, folder, f"resample {number + 1}, draw")
    fact = run_file_tasks(engine, draw, 1, draw.folder, f"resample {number + 1}")[0]
    return Centroids(draw.path, fact["count"], files.width)


_DRAWN = np.dtype([("cluster", np.int32), ("cosine", np.float32), ("position", np.int64)])


@dataclass(frozen=True)
class _Nearest(FileTask[Any, None]):
    """Of each cluster the rows nearest to its centroid, among some partitions."""

    files: RowFiles
    indexed: IndexedCentroids
    fit: Fit
    folder: str
    num_tasks: int

    def open(self) -> Any:
        limit_threads(self.fit.threads)
        return self.indexed.load(), np.asarray(self.indexed.centroids.load())

    def __call__(self, item: int, opened: Any) -> TaskResult[None]:
        index, centroids = opened
        drawn = np.empty(0, _DRAWN)
        for first, rows in blocks_of(self.files, item, self.num_tasks):
            found = np.empty(len(rows), _DRAWN)
            found["cluster"] = index.nearest(quantize_rows(rows))
            found["cosine"] = exact_similarities(rows, centroids[found["cluster"]])
            found["position"] = first + np.arange(len(rows))
            drawn = nearest_of_each(np.concatenate([drawn, found]), self.fit.per_cluster)
        path = _drawn_path(self.folder, item)
        write_array(path, drawn)
        return TaskResult([path], None)


def nearest_of_each(drawn: np.ndarray, count: int) -> np.ndarray:
    """Of each cluster the `count` rows nearest to its centroid; of equals the first.

    drawn: (N,) of cluster, cosine, position.
    """
    order = np.lexsort((drawn["position"], -drawn["cosine"], drawn["cluster"]))
    owners = drawn["cluster"][order]
    ranks = np.arange(len(order)) - np.searchsorted(owners, owners)
    return drawn[order[ranks < count]]


def _drawn_path(folder: str, item: int) -> str:
    return storage.join(folder, f"drawn-{item:06d}.bin")


@dataclass(frozen=True)
class _Resample(FileTask[None, dict[str, Any]]):
    """k-means from a fresh start on the rows drawn by all tasks."""

    files: RowFiles
    before: Centroids
    fit: Fit
    number: int
    root: str

    @property
    def num_tasks(self) -> int:
        return min(_MOST_TASKS, self.files.num_partitions)

    @property
    def folder(self) -> str:
        return storage.join(self.root, "resampled")

    @property
    def path(self) -> str:
        return storage.join(self.root, "centroids.bin")

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        positions = self._positions()
        centroids = np.asarray(self.before.load())
        if len(positions) >= self.before.count:  # fewer cannot make as many clusters
            rows = self.files.gather("vectors", positions)
            rng = np.random.default_rng([self.fit.seed, 2, self.number])
            count, iterations = self.before.count, self.fit.iterations
            quantized = quantize_rows(rows)
            centroids, _ = lloyd(rows, quantized, count, iterations, rng, assign=False)
        write_array(self.path, centroids)
        return TaskResult([self.path], {"count": len(centroids)})

    def _positions(self) -> np.ndarray:
        """(M,) int64, ascending: the rows drawn, per_cluster of each cluster at most."""
        drawn = np.empty(0, _DRAWN)
        for item in range(self.num_tasks):
            path = _drawn_path(self.root, item)
            found = np.frombuffer(storage.read_bytes(path), _DRAWN)
            drawn = nearest_of_each(np.concatenate([drawn, found]), self.fit.per_cluster)
        return np.sort(drawn["position"])


def centroid_rows(centroids: Centroids, folder: str, engine: Engine) -> RowFiles:
    """Centroids as rows of files, which can be clustered in turn."""
    bounds = (*range(0, centroids.count, _ROWS_AT_ONCE), centroids.count)
    files = rows_of_level(folder, centroids.width, bounds)
    work = _AsRows(centroids, files)
    run_file_tasks(
        engine, work, files.num_partitions, storage.join(folder, "written"), "write level"
    )
    return files


def rows_of_level(folder: str, width: int, bounds: tuple[int, ...]) -> RowFiles:
    """The files of a level's centroids. bounds: (P + 1,) first number in each, then the count."""
    return RowFiles(folder, width, "float32", bounds, tuple(range(len(bounds))))


def write_level_part(files: RowFiles, item: int, centroids: np.ndarray) -> list[str]:
    """Write one file of a level's centroids; their numbers stand for ids. (n, D) float32."""
    numbers = np.zeros((len(centroids), 2), np.uint64)
    numbers[:, 0] = files.starts[item] + np.arange(len(centroids))
    return [files.write(item, centroids, numbers.view(np.uint8))]


@dataclass(frozen=True)
class _AsRows(FileTask[None, None]):
    centroids: Centroids
    files: RowFiles

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        first, stop = self.files.starts[item : item + 2]
        return TaskResult(
            write_level_part(self.files, item, self.centroids.load()[first:stop]), None
        )


def level_above(
    below: RowFiles, fit: Fit, folder: str, engine: Engine
) -> tuple[Level, dict[str, Any]]:
    """Cluster the centroids of a level; give the level above, and figures."""
    indexed, figures = find_clusters(below, fit, folder, engine)
    own = _Own(below, indexed, folder, fit.threads)
    items = below.num_partitions
    run_file_tasks(engine, own, items, storage.join(folder, "owned"), "assign the centroids")
    rows = centroid_rows(indexed.centroids, storage.join(folder, "rows"), engine)
    return Level(rows, tuple(own.path(item) for item in range(items))), figures


@dataclass(frozen=True)
class _Own(FileTask[Any, None]):
    """The cluster of each row of one partition, in a file: (n,) int32."""

    files: RowFiles
    indexed: IndexedCentroids
    folder: str
    threads: int

    def path(self, item: int) -> str:
        return storage.join(self.folder, f"owners-{item:06d}.bin")

    def open(self) -> Any:
        limit_threads(self.threads)
        return self.indexed.load()

    def __call__(self, item: int, opened: Any) -> TaskResult[None]:
        blocks = blocks_of(self.files, item, self.files.num_partitions)
        owners = [opened.nearest(quantize_rows(rows)) for _, rows in blocks]
        write_array(self.path(item), np.concatenate([np.empty(0, np.int32), *owners]))
        return TaskResult([self.path(item)], None)
