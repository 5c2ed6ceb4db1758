"""k-means over arranged rows: trained on a sample, rows assigned by exact comparison.

The sample is the rows with the smallest hash of (seed, id), in the order of that hash: it does not
depend on shards, workers or engine. N rows, D width, C centroids.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.dataset import Dataset
from curation.errors import SpaceError
from curation.neighbors.quantized import nearest_centroids, quantize_centroids, quantize_rows
from curation.neighbors.row_files import RowFiles, map_array, write_array
from curation.neighbors.steps import Done, Work, run_steps
from curation.neighbors.vectors import unit_rows, vectors_of
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


def copy_centroids(path: str, width: int, folder: str) -> Centroids:
    """The first level's centroids of an earlier `cluster`, as a file for this run.

    Raises:
        SpaceError: they are of another width.
    """
    rows = vectors_of(Dataset.open(path).read_shard(0, ["embedding"])["embedding"], path)
    if rows.shape[1] != width:
        raise SpaceError(
            f"{path}: centroids of width {rows.shape[1]}, but the pool has width {width}; "
            "cluster the embeddings that are searched"
        )
    target = storage.join(folder, "given-centroids.bin")
    write_array(target, rows.astype(np.float32))
    return Centroids(target, len(rows), width)


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
    """(C, D) float32: unit centroids of unit rows. rows: (N, D) float32 or float16."""
    rng = np.random.default_rng(seed)
    return lloyd(rows, quantize_rows(rows), count, iterations, rng)[0]


def lloyd(
    rows: np.ndarray,
    quantized: np.ndarray,
    count: int,
    iterations: int,
    rng: np.random.Generator,
    start: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Spherical k-means in memory: centroids (C, D) float32, and nearest of each row (N,) int32.

    Rows find their centroid by exact products of 8-bit integers, centroids are means of the rows
    themselves. A centroid without rows is put beside that with most rows, a little to the side.

    rows: (N, D) of any length; quantized: the same as (N, D) int8. start: (C, D) float32, the
    centroids to begin with; drawn from the rows where it is None.
    """
    count = min(count, len(rows)) if start is None else len(start)
    if start is not None:
        centroids = start
    elif count <= _SPREAD_UP_TO:
        centroids = spread_rows(unit_rows(rows[: 64 * count]).astype(np.float32), count, rng)
    else:
        chosen = np.sort(rng.choice(len(rows), count, replace=False))
        centroids = unit_rows(rows[chosen]).astype(np.float32)
    nearest = nearest_centroids(quantized, quantize_centroids(centroids))
    for _ in range(iterations):
        sums, counts = cluster_sums(rows, nearest, count)
        centroids = means_of(sums, counts, centroids, rng)
        nearest = nearest_centroids(quantized, quantize_centroids(centroids))
    return centroids, nearest


def cluster_sums(
    rows: np.ndarray, nearest: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the unit rows of each cluster, (C, D) float64, and their number, (C,) int64."""
    import torch

    sums = np.zeros((count, rows.shape[1]))
    block = max(_ROWS_AT_ONCE, count)
    for start in range(0, len(rows), block):
        some = rows[start : start + block].astype(np.float32)
        some /= np.sqrt(np.einsum("nd,nd->n", some, some))[:, None]
        part = torch.zeros(count, rows.shape[1])
        own = torch.from_numpy(nearest[start : start + len(some)].astype(np.int64))
        sums += part.index_add_(0, own, torch.from_numpy(some)).numpy()
    return sums, np.bincount(nearest, minlength=count)


def means_of(
    sums: np.ndarray, counts: np.ndarray, before: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(C, D) float32: unit means; empty clusters take a place beside the largest ones.

    sums: (C, D) float64; counts: (C,); before: (C, D) the centroids so far.
    """
    lengths = np.sqrt(np.einsum("cd,cd->c", sums, sums))
    known = lengths > 0
    centroids = before.astype(np.float64)
    centroids[known] = sums[known] / lengths[known, None]
    empty = np.flatnonzero(counts == 0)
    crowded = np.argsort(-counts, kind="stable")[: len(empty)]
    centroids[empty] = centroids[crowded] + 0.02 * rng.normal(size=(len(empty), sums.shape[1]))
    centroids /= np.sqrt(np.einsum("cd,cd->c", centroids, centroids))[:, None]
    return centroids.astype(np.float32)


def spread_rows(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(C, D): rows far from each other, drawn as k-means++ does: by squared distance.

    Of a few rows drawn at a time, the one that brings all rows nearest is taken.
    rows: (N, D) float32, unit rows, N at least `count`.
    """
    trials = 2 + int(np.log(count))
    chosen = [int(rng.integers(len(rows)))]
    squared = _squared_distances(rows, rows[chosen])[0]  # (N,) to the nearest chosen row
    for _ in range(count - 1):
        total = squared.sum()
        weights = squared / total if total > 0 else None
        tried = rng.choice(len(rows), trials, p=weights)
        after = np.minimum(squared, _squared_distances(rows, rows[tried]))  # (trials, N)
        best = int(after.sum(axis=1).argmin())
        chosen.append(int(tried[best]))
        squared = after[best]
    return np.ascontiguousarray(rows[chosen])


def _squared_distances(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(M, N) float64, between (M, D) and (N, D) unit rows."""
    return np.asarray(np.maximum(0, 2 - 2 * (others @ rows.T)), np.float64)
