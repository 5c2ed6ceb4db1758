"""Rows as 8-bit integers, whose products are exact: the same bits on any number of threads.

They say which centroid is nearest, twice as fast as bfloat16 on CPUs with VNNI or AMX. A cosine is
off by some 0.0006, which moves a row between two lists that are as good as equally near, and
never decides about a pair. N rows, C centroids, D width.
"""

from typing import Any

import numpy as np

from curation.neighbors.kernels.threads import side_by_side
from embedder.cpu import multiplies

_ROWS_AT_ONCE = 1 << 13
_PRODUCTS_AT_ONCE = 1 << 18
"""They stay in the cache of a core until the largest is found."""
_LEAST_ROWS = 32
"""Products of fewer rows take another path in the kernels: they are padded."""


def quantize_rows(vectors: np.ndarray) -> np.ndarray:
    """(N, D) int8: every row scaled by itself, so rows compare with centroids, not by length."""
    found = np.empty(vectors.shape, np.int8)
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        rows = vectors[start : start + _ROWS_AT_ONCE].astype(np.float32)
        rows *= 127 / np.abs(rows).max(axis=1, keepdims=True)
        found[start : start + len(rows)] = np.rint(rows, out=rows)
    return found


def quantize_centroids(centroids: np.ndarray, largest: float | None = None) -> np.ndarray:
    """(C, D) int8: all centroids scaled by one number, so that their products rank them.

    largest: what becomes 127; the largest of their own numbers where it is left out.
    """
    largest = largest or largest_of(centroids)
    found = np.empty(centroids.shape, np.int8)
    for start in range(0, len(centroids), _ROWS_AT_ONCE):
        some = centroids[start : start + _ROWS_AT_ONCE].astype(np.float32)
        found[start : start + len(some)] = np.rint(some * np.float32(127 / largest))
    return found


def largest_of(rows: np.ndarray) -> float:
    """The largest number of all, whatever its sign."""
    return max(float(rows.max(initial=1e-30)), -float(rows.min(initial=-1e-30)))


def lengths_of(rows: np.ndarray) -> np.ndarray:
    """(N,) float64: lengths of rows of 8-bit integers, of any number of them."""
    found = np.empty(len(rows))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE]
        found[start : start + len(some)] = np.einsum("nd,nd->n", some, some, dtype=np.int64)
    return np.sqrt(found, out=found)


def pair_products(
    rows: np.ndarray, who: np.ndarray, others: np.ndarray, which: np.ndarray
) -> np.ndarray:
    """(H,) int64: exact products of pairs of a row and another. who, which: (H,) their numbers."""
    found = np.empty(len(who), np.int64)
    for start in range(0, len(who), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        left, right = rows[who[some]], others[which[some]]
        found[some] = np.einsum("nd,nd->n", left, right, dtype=np.int32)
    return found


def integer_products(rows: np.ndarray, centroids: np.ndarray) -> Any:
    """(N, C) int32 tensor: exact products of two blocks of 8-bit integers."""
    import torch

    padded = np.require(rows, requirements=["C", "W"])
    if len(rows) < _LEAST_ROWS:
        padded = np.zeros((_LEAST_ROWS, rows.shape[1]), np.int8)
        padded[: len(rows)] = rows
    left, right = (
        torch.from_numpy(padded),
        torch.from_numpy(np.require(centroids, requirements=["C", "W"])),
    )
    if multiplies("int8"):
        return torch._int_mm(left, right.T)[: len(rows)]
    # sums below 2^24 are exact in float32: 127 * 127 * 1040; wider rows need float64
    kind = torch.float32 if rows.shape[1] <= 1040 else torch.float64
    return (left.to(kind) @ right.to(kind).T)[: len(rows)].to(torch.int32)


def nearest_centroids(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(N,) int32: number of the nearest centroid; of equals the first.

    rows: (N, D) int8; centroids: (C, D) int8.
    """
    found = np.empty(len(rows), np.int32)
    block = max(_LEAST_ROWS, _PRODUCTS_AT_ONCE // max(1, len(centroids)))
    step = block * max(1, _ROWS_AT_ONCE // block)

    def assign(start: int) -> None:
        stop = min(start + step, len(rows))
        for first in range(start, stop, block):
            scores = integer_products(rows[first : min(first + block, stop)], centroids)
            found[first : first + len(scores)] = scores.numpy().argmax(axis=1)

    side_by_side(assign, range(0, len(rows), step))
    return found
