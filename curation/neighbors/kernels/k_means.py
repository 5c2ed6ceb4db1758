"""Spherical k-means in memory, and the nearest of some centroids with its exact cosine.

N rows, D width, C centroids.
"""

from collections.abc import Sequence

import numpy as np

from curation.neighbors.kernels.centroid_index import FLAT_UP_TO, CentroidIndex
from curation.neighbors.kernels.quantized import integer_products, lengths_of, quantize_rows
from curation.neighbors.kernels.threads import side_by_side
from embedder.rows import leveled, unit_rows

_ROWS_AT_ONCE = 1 << 13
_SPREAD_UP_TO = 512
"""Centroids up to which k-means++ chooses the first ones; it costs a pass a centroid."""
_TRAINED_SHARE = 0.9
"""Share of the rows that must meet their nearest centroid while centroids still move."""
_ROWS_ASKED = 2000
"""Rows on which that share is measured."""


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


def spherical_kmeans(rows: np.ndarray, count: int, iterations: int, seed: int) -> np.ndarray:
    """(C, D) float32: unit centroids. rows: (N, D) float32 or float16, of any length."""
    return lloyd(rows, count, iterations, np.random.default_rng(seed))


def lloyd(rows: np.ndarray, count: int, iterations: int, rng: np.random.Generator) -> np.ndarray:
    """(C, D) float32: unit centroids by spherical k-means in memory.

    Rows find their centroid by exact products of 8-bit integers, centroids are means of the rows
    themselves. A centroid without rows is put beside that with most rows, a little to the side.
    It ends early where no row changes its centroid.

    rows: (N, D) of any length; int8 is taken as `quantize_rows` gives it.
    """
    quantized = rows if rows.dtype == np.int8 else quantize_rows(rows)
    if rows.dtype == np.float32:
        rows = leveled(rows)
    centroids, before = first_centroids(rows, count, rng), np.empty(0, np.int32)
    for _ in range(iterations):
        nearest = _nearest(quantized, centroids, rng)
        if np.array_equal(nearest, before):
            break
        sums, counts = cluster_sums(rows, nearest, len(centroids))
        centroids = means_of(sums, counts, centroids, rng)
        before = nearest if counts.all() else np.empty(0, np.int32)
    return centroids


def first_centroids(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(C, D) float32, unit rows: rows far from each other, or any where they are many."""
    count = min(count, len(rows))
    if count <= _SPREAD_UP_TO:
        return spread_rows(unit_rows(rows[: 64 * count]).astype(np.float32), count, rng)
    chosen = np.sort(rng.choice(len(rows), count, replace=False))
    return unit_rows(rows[chosen]).astype(np.float32)


def _nearest(quantized: np.ndarray, centroids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) int32: nearest centroid of each row while they move."""
    sample = quantized[:: max(1, len(quantized) // _ROWS_ASKED)]
    return index_centroids(centroids, sample, _TRAINED_SHARE, rng)[0].nearest(quantized)


def index_centroids(
    centroids: np.ndarray, sample: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[CentroidIndex, float]:
    """Make centroids ready for rows; give the share of the sample that meets its nearest, too.

    centroids: (C, D) float32, unit rows; sample: (S, D) int8; share: the least that is wanted.
    """
    if len(centroids) <= FLAT_UP_TO:
        return CentroidIndex.flat(centroids), 1.0
    groups = lloyd(centroids, round(np.sqrt(len(centroids))), 6, rng)
    return CentroidIndex.grouped(centroids, groups, sample, share)


def cluster_sums(
    rows: np.ndarray, nearest: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the unit rows of each cluster, (C, D) float64, and their number, (C,) int64."""
    from scipy.sparse import csc_matrix

    sums = np.zeros((count, rows.shape[1]))
    block = max(_ROWS_AT_ONCE, count)
    for start in range(0, len(rows), block):
        some = np.asarray(rows[start : start + block], np.float32)
        scales = 1 / np.sqrt(np.einsum("nd,nd->n", some, some))
        owners = nearest[start : start + len(some)]
        columns = np.arange(len(some) + 1)  # one entry a row, in its cluster's line
        sums += csc_matrix((scales, owners, columns), shape=(count, len(some))) @ some
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
    trials, quantized = 2 + int(np.log(count)), quantize_rows(rows)
    lengths = lengths_of(quantized)  # (N,)
    chosen = [int(rng.integers(len(rows)))]
    squared = _squared_distances(quantized, lengths, chosen)[0]  # (N,) to the nearest chosen row
    for _ in range(count - 1):
        total = squared.sum()
        weights = squared / total if total > 0 else None
        tried = rng.choice(len(rows), trials, p=weights)
        after = np.minimum(squared, _squared_distances(quantized, lengths, tried))  # (trials, N)
        best = int(after.sum(axis=1).argmin())
        chosen.append(int(tried[best]))
        squared = after[best]
    return np.ascontiguousarray(rows[chosen])


def _squared_distances(
    quantized: np.ndarray, lengths: np.ndarray, chosen: Sequence[int] | np.ndarray
) -> np.ndarray:
    """(M, N) float64, of chosen rows to all, as unit rows; of integers, so the same anywhere.

    quantized: (N, D) int8; lengths: (N,) of each; chosen: (M,) numbers of rows.
    """
    found, others = np.empty((len(chosen), len(quantized))), quantized[chosen]
    scales = lengths[chosen][:, None]

    def measure(start: int) -> None:
        some = slice(start, start + _ROWS_AT_ONCE)
        products = integer_products(quantized[some], others).numpy().T  # (M, n)
        found[:, some] = np.maximum(0, 2 - 2 * products / (scales * lengths[some]))

    side_by_side(measure, range(0, len(quantized), _ROWS_AT_ONCE))
    return found
