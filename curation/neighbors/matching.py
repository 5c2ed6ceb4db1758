"""Giving each seed images of its own: the nearest free ones, closest pairs first.

Q seeds, K candidates of each.
"""

import numpy as np


def assign_free(positions: np.ndarray, similarities: np.ndarray, k: int) -> np.ndarray:
    """(Q, K) bool: which candidates each seed gets, at most k, no image twice.

    Served in the order of similarity, then seed, then candidate. Found in rounds: every seed asks
    for its k best that have not refused it, every image keeps the best that asks. As both sides
    rank pairs by one common order, the result is that of serving the pairs one by one.

    positions: (Q, K) int64 images, best first, -1 for none; seeds in the order of their ids.
    similarities: (Q, K) float32.
    """
    open_ = positions >= 0
    while True:
        asks = open_ & (np.cumsum(open_, axis=1) <= k)
        seeds, ranks = np.nonzero(asks)
        images = positions[seeds, ranks]
        order = np.lexsort((seeds, -similarities[seeds, ranks], images))
        images = images[order]
        again = np.zeros(len(images), bool)
        again[1:] = images[1:] == images[:-1]
        if not again.any():
            return asks
        refused = order[again]
        open_[seeds[refused], ranks[refused]] = False
