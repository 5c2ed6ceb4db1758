"""Choosing the highest of many numbers, and ranks within runs. N rows, C columns, H numbers."""

import numpy as np

_BLOCKS, _BLOCKS_PER_COLUMN = 64, 4
"""Blocks of columns at least, and for each one that is sought: few of these then share one."""


def columns_near(scores: np.ndarray, count: int) -> np.ndarray:
    """Flat places of at least the `count` highest of each row, and of few more, ascending.

    As many columns reach the count-th highest of the maxima of blocks of columns.
    scores: (N, C) int32.
    """
    columns = scores.shape[1]
    if count >= columns:
        return np.arange(scores.size)
    width = max(1, columns // max(_BLOCKS, _BLOCKS_PER_COLUMN * count))
    blocks = columns // width
    maxima = scores[:, : width * blocks].reshape(len(scores), width, blocks).max(axis=1)
    floors = np.partition(maxima, blocks - count, axis=1)[:, -count]
    return np.flatnonzero(scores >= floors[:, None])


def ranks_within(groups: np.ndarray) -> np.ndarray:
    """(H,) int64: 0, 1, … inside each run of equal numbers. groups: (H,) sorted."""
    numbers = np.arange(len(groups))
    new = np.ones(len(groups), bool)
    new[1:] = groups[1:] != groups[:-1]
    return numbers - np.maximum.accumulate(np.where(new, numbers, 0))
