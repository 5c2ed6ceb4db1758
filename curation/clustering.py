"""k-means over arranged rows: trained on a sample, rows assigned by exact comparison.

The sample is the rows with the smallest hash of (seed, id), in the order of that hash: it does not
depend on shards, workers or engine. N rows, D width, C centroids.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.neighbors.row_files import RowFiles, map_array, write_array
from curation.neighbors.steps import Done, Work, run_steps
from curation.neighbors.vectors import unit_rows
from curation.stage import Engine

_ROWS_AT_ONCE = 1 << 13
_SPREAD_UP_TO = 512
"""Centroids up to which k-means++ chooses the first ones; it costs a pass a centroid."""


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
) -> Centroids:
    """Spherical k-means on a sample of the rows; fewer centroids where there are fewer rows."""
    count = max(1, min(count, files.num_rows))
    train = _Train(files, count, folder, seed, iterations, rows_per_centroid)
    facts = run_steps(engine, train, 1, storage.join(folder, "trained"), "train centroids")
    return Centroids(train.path, facts[0]["count"], files.width)


def assign_exactly(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the nearest centroid of each row, and the cosine: (N,) int64, (N,) float32.

    Products of float32 find it; where two centroids lie within their error, float64 decides
    (ties: smallest number), so that the answer does not depend on how rows are blocked.

    vectors: (N, D) of any length; centroids: (C, D) float32, unit rows.
    """
    nearest, cosines = np.empty(len(vectors), np.int64), np.empty(len(vectors), np.float32)
    unit = unit_rows(centroids)  # (C, D) float64
    band = 2 * (centroids.shape[1] + 8) * 2.0**-24
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        rows = unit_rows(vectors[start : start + _ROWS_AT_ONCE])
        scores = rows.astype(np.float32) @ centroids.T  # (N, C)
        best = scores.argmax(axis=1)
        close = scores >= scores.max(axis=1, keepdims=True) - band
        for row in np.flatnonzero(close.sum(axis=1) > 1):
            some = np.flatnonzero(close[row])
            best[row] = some[(unit[some] @ rows[row]).argmax()]
        stop = start + len(rows)
        nearest[start:stop] = best
        cosines[start:stop] = np.einsum("nd,nd->n", rows, unit[best])
    return nearest, cosines


def hash_ids(ids: np.ndarray, *salts: int | str) -> np.ndarray:
    """(N,) uint64: a hash of (salts, id) for each row; the same on every machine.

    ids: (N, 16) uint8, which are hashes themselves: mixing their halves with the salt is enough.
    """
    import hashlib

    key = hashlib.blake2b(repr(salts).encode(), digest_size=16).digest()
    first, second = np.frombuffer(key, np.uint64)
    halves = np.ascontiguousarray(ids).view(np.uint64).reshape(-1, 2)
    return _mix(_mix(halves[:, 0] ^ first) ^ halves[:, 1] ^ second)


def _mix(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(numbers ^ (numbers >> np.uint64(31)))


def sample_positions(files: RowFiles, size: int, *salts: int | str) -> np.ndarray:
    """(S,) int64: about `size` rows with the smallest hash of (salts, id), in its order."""
    bound = np.uint64(min(1.0, size / max(1, files.num_rows)) * float(2**64 - 2**11))
    hashes, positions = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for partition in range(files.num_partitions):
        found = hash_ids(files.ids(partition), *salts)
        chosen = np.flatnonzero(found <= bound) if size < files.num_rows else np.arange(len(found))
        hashes.append(found[chosen])
        positions.append(chosen + files.starts[partition])
    order = np.argsort(np.concatenate(hashes), kind="stable")
    return np.concatenate(positions)[order]


@dataclass(frozen=True)
class _Train(Work):
    files: RowFiles
    count: int
    folder: str
    seed: int
    iterations: int
    rows_per_centroid: int

    @property
    def path(self) -> str:
        return storage.join(self.folder, "centroids.bin")

    def __call__(self, item: int, opened: Any) -> Done:
        size = self.count * self.rows_per_centroid
        sample = sample_positions(self.files, size, "centroids", self.seed)
        rows = unit_rows(self.files.gather("vectors", sample)).astype(np.float32)
        centroids = spherical_kmeans(rows, min(self.count, len(rows)), self.iterations, self.seed)
        write_array(self.path, centroids)
        return Done([self.path], {"count": len(centroids)})


def spherical_kmeans(rows: np.ndarray, count: int, iterations: int, seed: int) -> np.ndarray:
    """(C, D) float32: unit centroids of unit rows, by Faiss. rows: (N, D) float32."""
    import faiss

    if len(rows) <= count:
        return rows
    trained = faiss.Kmeans(
        rows.shape[1],
        count,
        niter=iterations,
        spherical=True,
        seed=seed % (1 << 31),
        min_points_per_centroid=1,
        max_points_per_centroid=1 << 30,
    )
    start = None
    if count <= _SPREAD_UP_TO:
        start = spread_rows(rows[: 16 * count], count, np.random.default_rng(seed))
    trained.train(np.ascontiguousarray(rows), init_centroids=start)
    return np.asarray(trained.centroids)


def spread_rows(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(C, D): rows far from each other, drawn as k-means++ does: by squared distance.

    rows: (N, D) float32, unit rows, N at least `count`.
    """
    chosen = [int(rng.integers(len(rows)))]
    squared = np.full(len(rows), np.inf)  # (N,) distances to the nearest chosen row
    for _ in range(count - 1):
        squared = np.minimum(squared, np.maximum(0, 2 - 2 * (rows @ rows[chosen[-1]])))
        squared[chosen[-1]] = 0
        total = squared.sum()
        weights = squared / total if total > 0 else np.full(len(rows), 1 / len(rows))
        chosen.append(int(rng.choice(len(rows), p=weights)))
    return np.ascontiguousarray(rows[chosen])
