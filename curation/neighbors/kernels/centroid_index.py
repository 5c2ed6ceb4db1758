"""Centroids grouped under fewer ones, so that a row meets those of its nearest groups only.

With C centroids in about the root of C groups a row costs G + p C / G products instead of C. How
many groups p a row must meet is measured on sampled rows: so many that the wanted share of them
gets the centroid that all C would give. Up to some thousand centroids all are compared.
N rows, C centroids, G groups, D width.
"""

from dataclasses import dataclass

import numpy as np

from curation.neighbors.kernels.grouping import by_group
from curation.neighbors.kernels.quantized import (
    integer_products,
    nearest_centroids,
    quantize_centroids,
)
from curation.neighbors.kernels.threads import side_by_side

FLAT_UP_TO = 1 << 12
"""Centroids up to which every row is compared with all of them."""
_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class CentroidIndex:
    """Quantized centroids, ready to find the nearest of rows."""

    centroids: np.ndarray
    """(C, D) int8, ordered by group, of equal groups by number."""
    numbers: np.ndarray
    """(C,) int32: the number of each."""
    groups: np.ndarray
    """(G, D) int8."""
    starts: np.ndarray
    """(G + 1,) int64: first centroid of each group, then C."""
    groups_met: int
    """Groups whose centroids a row is compared with."""

    @classmethod
    def flat(cls, centroids: np.ndarray) -> "CentroidIndex":
        """All centroids in one group. centroids: (C, D) float32, unit rows."""
        quantized = quantize_centroids(centroids)
        numbers = np.arange(len(quantized), dtype=np.int32)
        return cls(quantized, numbers, quantized[:1], np.array([0, len(quantized)]), 1)

    @classmethod
    def grouped(
        cls, centroids: np.ndarray, groups: np.ndarray, sample: np.ndarray, share: float
    ) -> tuple["CentroidIndex", float]:
        """Group the centroids; give the share of the sample that gets its nearest, too.

        Where so many groups are needed that nothing is saved, all are in one.

        centroids: (C, D) and groups: (G, D) float32, unit rows; sample: (S, D) int8.
        """
        quantized, above = quantize_centroids(centroids), quantize_centroids(groups)
        owners = nearest_centroids(quantized, above)
        known, owners = np.unique(owners, return_inverse=True)
        above = above[known]  # groups without centroids have nothing to offer
        order, starts = by_group(owners, len(above))
        rank = ranks_of_groups(sample, above, owners[nearest_centroids(sample, quantized)])
        met = 1 + int(np.sort(rank)[max(0, int(np.ceil(share * len(rank))) - 1)])
        if len(above) + met * len(centroids) / len(above) >= 0.6 * len(centroids):
            return cls.flat(centroids), 1.0
        index = cls(quantized[order], order.astype(np.int32), above, starts, met)
        return index, float((rank < met).mean())

    def nearest(self, rows: np.ndarray) -> np.ndarray:
        """(N,) int32: number of the nearest centroid met; of equals the first. rows: (N, D) int8.

        It depends on the row alone, not on those that it is asked with.
        """
        if len(self.groups) == 1:
            return nearest_centroids(rows, self.centroids)
        found = np.empty(len(rows), np.int32)

        def assign(start: int) -> None:
            some = rows[start : start + _ROWS_AT_ONCE]
            found[start : start + len(some)] = self._nearest(some)

        side_by_side(assign, range(0, len(rows), _ROWS_AT_ONCE))
        return found

    def _nearest(self, rows: np.ndarray) -> np.ndarray:
        scores = integer_products(rows, self.groups).numpy()  # (N, G)
        met, count = self.groups_met, len(self.groups)
        near = scores.argpartition(count - met, axis=1)[:, count - met :]  # (N, met)
        near = near.astype(np.uint16 if count <= 1 << 16 else np.int32).reshape(-1)
        visits, bounds = by_group(near, count)
        best = np.full(len(rows), np.iinfo(np.int64).min)
        for group in np.flatnonzero(np.diff(bounds)):
            first, stop = self.starts[group : group + 2]
            who = visits[bounds[group] : bounds[group + 1]] // met
            products = integer_products(rows[who], self.centroids[first:stop]).numpy()
            place = products.argmax(axis=1)
            value = products[np.arange(len(who)), place].astype(np.int64)
            # the larger product, of equals the smaller number, as one number
            key = (value << 32) - self.numbers[first + place]
            best[who] = np.maximum(best[who], key)
        return np.asarray(-best & 0xFFFFFFFF, np.int64).astype(np.int32)


def ranks_of_groups(rows: np.ndarray, groups: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(S,) int64: how many groups are at least as near to each row as the one wanted, but it.

    rows: (S, D) int8; groups: (G, D) int8; wanted: (S,).
    """
    scores = integer_products(rows, groups).numpy()  # (S, G)
    own = scores[np.arange(len(rows)), wanted]
    return np.asarray((scores >= own[:, None]).sum(axis=1) - 1)
