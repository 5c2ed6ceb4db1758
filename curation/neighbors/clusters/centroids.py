"""Centroids in a file, and the index by which rows find their nearest one.

They are trained on a sample of arranged rows, or copied from an earlier `cluster`. The sample is
the rows with the smallest hash of (seed, id), in the order of that hash: it does not depend on
shards, workers or engine. N rows, D width, C centroids, S sampled rows.
"""

from dataclasses import dataclass

import numpy as np

from curation import storage
from curation.dataset import Dataset
from curation.errors import SchemaError, SpaceError
from curation.neighbors.kernels.centroid_index import FLAT_UP_TO, CentroidIndex
from curation.neighbors.kernels.id_hashes import hash_ids, share_bound
from curation.neighbors.kernels.k_means import index_centroids, spherical_kmeans
from curation.neighbors.kernels.quantized import quantize_rows
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.rows.vectors import vectors_of
from curation.stage import Engine

_SAMPLE_BYTES = 2 << 30
"""What a sample may take, as stored and as 8-bit integers."""
_ROWS_ASKED = 4096
"""Sampled rows on which it is measured how many groups of centroids a row must meet."""
_INDEX_COLUMNS = ("centroids", "numbers", "groups", "starts")


@dataclass(frozen=True)
class Centroids:
    """Centroids in a file."""

    path: str
    count: int
    width: int

    @classmethod
    def written(cls, path: str, centroids: np.ndarray) -> "Centroids":
        """Write centroids (C, D) float32, unit rows."""
        write_columns(path, {"centroids": centroids})
        return cls(path, *centroids.shape)

    def load(self) -> np.ndarray:
        """(C, D) float32, unit rows."""
        return ColumnFile.open(self.path)["centroids"]


def train_centroids(
    files: RowFiles,
    count: int,
    folder: str,
    engine: Engine,
    *,
    seed: int,
    iterations: int = 20,
    rows_per_centroid: int = 256,
    sample_bytes: int = _SAMPLE_BYTES,
) -> Centroids:
    """Spherical k-means on a sample of the rows; fewer centroids where there are fewer rows.

    sample_bytes: what the sample may take in memory; it holds two rows a centroid at least.
    """
    count = max(1, min(count, files.num_rows))
    fits = sample_bytes // (files.width * (np.dtype(files.dtype).itemsize + 1))
    size = max(2 * count, min(count * rows_per_centroid, fits))
    task = _Train(files, count, storage.join(folder, "centroids.bin"), seed, iterations, size)
    trained = storage.join(folder, "trained")
    (found,) = run_file_tasks(engine, task, 1, trained, "train centroids")
    return Centroids(task.path, found, files.width)


@dataclass(frozen=True)
class _Train(FileTask[None, int]):
    """k-means on a sample; gives the number of centroids."""

    files: RowFiles
    count: int
    path: str
    seed: int
    iterations: int
    size: int

    def __call__(self, item: int, opened: None) -> TaskResult[int]:
        sample = sample_positions(self.files, self.size, "centroids", self.seed)
        rows = self.files.gather("vectors", sample)
        centroids = spherical_kmeans(rows, self.count, self.iterations, self.seed)
        return TaskResult([self.path], Centroids.written(self.path, centroids).count)


def sample_positions(files: RowFiles, size: int, *salts: int | str) -> np.ndarray:
    """(S,) int64: about `size` rows with the smallest hash of (salts, id), in its order."""
    bound = share_bound(size / max(1, files.num_rows))
    hashes, positions = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for partition in range(files.num_partitions):
        found = hash_ids(files.ids(partition), *salts)
        chosen = np.flatnonzero(found <= bound) if size < files.num_rows else np.arange(len(found))
        hashes.append(found[chosen])
        positions.append(chosen + files.starts[partition])
    order = np.argsort(np.concatenate(hashes), kind="stable")
    return np.concatenate(positions)[order]


def copy_centroids(path: str, width: int, folder: str) -> Centroids:
    """The first level's centroids of an earlier `cluster`, as a file for this run.

    Raises:
        SchemaError: there are none.
        SpaceError: they are of another width.
    """
    rows = _lowest_level(Dataset.open(path), path)
    if rows.shape[1] != width:
        raise SpaceError(
            f"{path}: centroids of width {rows.shape[1]}, but the pool has width {width}; "
            "cluster the embeddings that are searched"
        )
    target = storage.join(folder, "given-centroids.bin")
    return Centroids.written(target, rows.astype(np.float32))


def _lowest_level(dataset: Dataset, path: str) -> np.ndarray:
    """(C, D): centroids of level 1, which come first; a split level fills several shards."""
    parts = []
    for shard in range(dataset.num_shards):
        table = dataset.read_shard(shard, ["level", "embedding"])
        if table.num_rows == 0:
            continue
        if table["level"][0].as_py() > 1:
            break
        parts.append(vectors_of(table["embedding"], path))
    if not parts:
        raise SchemaError(f"{path}: holds no centroids; cluster a pool that has rows")
    return np.concatenate(parts)


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
        file = ColumnFile.open(self.path)
        columns = {name: np.array(file[name]) for name in _INDEX_COLUMNS}
        return CentroidIndex(**columns, groups_met=self.groups_met)

    def figures(self) -> dict[str, float]:
        """How rows find their centroid."""
        return {"groups": self.groups, "groups_met": self.groups_met, "agreement": self.agreement}


def index_for(
    files: RowFiles, centroids: Centroids, agreement: float, seed: int, folder: str, engine: Engine
) -> IndexedCentroids:
    """Index centroids so that this share of the rows of some files finds its nearest."""
    task = _Index(files, centroids, agreement, seed, storage.join(folder, "index.bin"))
    indexed = storage.join(folder, "indexed")
    (found,) = run_file_tasks(engine, task, 1, indexed, "index the centroids")
    groups, groups_met, share = found
    return IndexedCentroids(centroids, task.path, groups, groups_met, share)


@dataclass(frozen=True)
class _Index(FileTask[None, tuple[int, int, float]]):
    """The index of some centroids; gives groups, groups met, and the agreement."""

    files: RowFiles
    centroids: Centroids
    agreement: float
    seed: int
    path: str

    def __call__(self, item: int, opened: None) -> TaskResult[tuple[int, int, float]]:
        rows = np.empty((0, self.files.width), np.int8)
        if self.centroids.count > FLAT_UP_TO:
            chosen = sample_positions(self.files, _ROWS_ASKED, "index", self.seed)
            rows = quantize_rows(self.files.gather("vectors", chosen))
        rng = np.random.default_rng([self.seed, 1])
        index, agreement = index_centroids(self.centroids.load(), rows, self.agreement, rng)
        write_columns(self.path, {name: getattr(index, name) for name in _INDEX_COLUMNS})
        found = (len(index.groups), index.groups_met, round(agreement, 4))
        return TaskResult([self.path], found)
