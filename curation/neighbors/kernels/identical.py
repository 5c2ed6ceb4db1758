"""Rows with the same bytes, found in linear time: one of them stands for all in comparisons.

N rows, D width, W words of eight bytes.
"""

import numpy as np

_ROWS_AT_ONCE = 1 << 13


def first_identical(vectors: np.ndarray) -> np.ndarray:
    """(N,) int64: the first row with the same bytes, the row itself where it is the first.

    vectors: (N, D) of one partition; identical rows share a list, hence a partition.
    """
    prints = fingerprints(vectors)  # (N, 2)
    numbers = np.arange(len(vectors))
    order = np.lexsort((numbers, prints[:, 1], prints[:, 0]))
    new = np.ones(len(vectors), bool)
    new[1:] = (prints[order[1:]] != prints[order[:-1]]).any(axis=1)
    first = np.empty(len(vectors), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(new, numbers, 0))]
    same = np.flatnonzero(first != numbers)
    for start in range(0, len(same), _ROWS_AT_ONCE):
        some = same[start : start + _ROWS_AT_ONCE]
        differs = (vectors[some] != vectors[first[some]]).any(axis=1)
        first[some[differs]] = some[differs]  # prints collided: rows of their own
    return first


def first_among(first: np.ndarray, active: np.ndarray) -> np.ndarray:
    """(N,) int64: like `first_identical`, but among active rows only; -1 where not active.

    first: (N,) int64; active: (N,) bool.
    """
    rows = np.flatnonzero(active)
    stand_in = np.full(len(first), len(first), np.int64)
    np.minimum.at(stand_in, first[rows], rows)
    found = np.full(len(first), -1, np.int64)
    found[rows] = stand_in[first[rows]]
    return found


def fingerprints(vectors: np.ndarray) -> np.ndarray:
    """(N, 2) uint64: two random linear sums of each row's bytes, modulo 2^64, then mixed."""
    width = vectors.shape[1] * vectors.itemsize
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 1 << 63, (2, -(-width // 8)), np.uint64) * np.uint64(2)
    weights |= np.uint64(1)  # odd: no bit of a word is lost
    found = np.empty((len(vectors), 2), np.uint64)
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        words = _words(vectors[start : start + _ROWS_AT_ONCE], width)  # (N, W)
        for column, one in enumerate(weights):
            found[start : start + len(words), column] = (words * one).sum(axis=1, dtype=np.uint64)
    return _mixed(found)


def _words(vectors: np.ndarray, width: int) -> np.ndarray:
    padded = np.zeros((len(vectors), -(-width // 8) * 8), np.uint8)
    rows = np.ascontiguousarray(vectors)
    padded[:, :width] = rows.view(np.uint8).reshape(len(vectors), width)
    return padded.view(np.uint64)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Spread the low bits upwards: sums modulo 2^64 are weak in none but their lowest bits."""
    numbers ^= numbers >> np.uint64(32)
    numbers *= np.uint64(0xD6E8FEB86659FD93)
    numbers ^= numbers >> np.uint64(32)
    return numbers
