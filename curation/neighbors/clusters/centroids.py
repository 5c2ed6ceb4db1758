"""Centroids of arranged rows: trained on a sample of them, or copied from an earlier run.

The sample is the rows with the smallest hash of (seed, id), in the order of that hash: it does not
depend on shards, workers or engine. N rows, D width, C centroids.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.dataset import Dataset
from curation.errors import SchemaError, SpaceError
from curation.neighbors.kernels.id_hashes import hash_ids, share_bound
from curation.neighbors.kernels.k_means import spherical_kmeans
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.row_files import RowFiles, map_array, write_array
from curation.neighbors.rows.vectors import vectors_of
from curation.stage import Engine

_SAMPLE_BYTES = 2 << 30
"""What a sample may take, as stored and as 8-bit integers."""


@dataclass(frozen=True)
class Centroids:
    """Trained centroids in a file."""

    path: str
    count: int
    width: int

    def load(self) -> np.ndarray:
        """(C, D) float32, unit rows."""
        return map_array(self.path, "float32", 0, (self.count, self.width))


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
    train = _Train(files, count, folder, seed, iterations, size)
    facts = run_file_tasks(engine, train, 1, storage.join(folder, "trained"), "train centroids")
    return Centroids(train.path, facts[0]["count"], files.width)


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
    write_array(target, rows.astype(np.float32))
    return Centroids(target, len(rows), width)


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


@dataclass(frozen=True)
class _Train(FileTask[None, dict[str, Any]]):
    files: RowFiles
    count: int
    folder: str
    seed: int
    iterations: int
    size: int

    @property
    def path(self) -> str:
        return storage.join(self.folder, "centroids.bin")

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        sample = sample_positions(self.files, self.size, "centroids", self.seed)
        rows = self.files.gather("vectors", sample)
        centroids = spherical_kmeans(rows, self.count, self.iterations, self.seed)
        write_array(self.path, centroids)
        return TaskResult([self.path], {"count": len(centroids)})
