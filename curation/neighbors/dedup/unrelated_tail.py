"""How many unrelated rows a row has above a threshold, from the tail of a sample's cosines.

Unlike images are seldom alike, but a pool of N rows has N^2 / 2 pairs of them: a threshold that is
right for thousands joins strangers among millions. Legend: M sampled rows, P pairs, D width.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import gammaln

SAMPLE_ROWS = 8192
"""33 million pairs: shares down to 1e-6 are counted, and the join of as many rows costs more."""
MIN_ROWS = 300
"""Fewer have too few pairs for a tail."""
DUBIOUS = 0.01
"""Unrelated rows a row above which a threshold is doubtful."""
WANTED = 0.001
"""Unrelated rows a row at the threshold that is proposed instead."""
_MOST_FITTED = 4000
"""Cosines, the largest of those below the threshold."""
_MAX_SHARE = 0.01
"""Of all pairs, that are fitted at most: the tail is no part of the bulk."""
_DENSE = 1e-3
"""Share of pairs above the threshold from which on it lies in the bulk: duplicates are few there,
so that what lies above it is fitted, too."""
_PASSED_OVER = 30
"""Largest cosines, whatever the threshold: duplicates that it misses may be among them."""
_GROUPS = 8
"""Of rows that are left out in turn, for the error."""
_UPPER_SIGMAS = 1.645
"""A one-sided bound of 95 %."""
_MAX_COMPONENT = 1_000_000
"""Largest component that is looked for below the percolation threshold."""


@dataclass(frozen=True)
class Tail:
    """Share of unrelated pairs above a cosine: log-linear with a curvature that only steepens.

    `share` exp(-slope x - curvature x^2), with x the cosine less `start`.
    """

    start: float
    share: float
    """Of the pairs that lie above `start`."""
    slope: float
    curvature: float

    def share_above(self, threshold: float) -> float:
        """Share of pairs above a cosine; below `start`, at least that much."""
        x = max(0.0, threshold - self.start)
        return float(self.share * np.exp(-self.slope * x - self.curvature * x * x))

    def cosine_at(self, share: float) -> float:
        """Cosine above which a share of the pairs lies, at most 1."""
        depth = np.log(self.share / share)
        if depth <= 0:
            return self.start
        # the positive root of curvature x^2 + slope x = depth, safe where curvature is 0
        root = np.sqrt(self.slope**2 + 4 * self.curvature * depth)
        return float(min(1.0, self.start + 2 * depth / (self.slope + root)))


@dataclass(frozen=True)
class UnrelatedTail:
    """A fitted tail, and those fitted without each group of rows, which tell its error."""

    tail: Tail
    without: tuple[Tail, ...]

    def share_above(self, threshold: float) -> float:
        """Share of unrelated pairs above a cosine."""
        return self.tail.share_above(threshold)

    def upper_share_above(self, threshold: float) -> float:
        """Bound that this share stays below in 95 % of samples."""
        logs = np.log([max(t.share_above(threshold), 1e-300) for t in self.without])
        sigma = np.sqrt((len(logs) - 1) * np.mean((logs - logs.mean()) ** 2))
        return float(min(1.0, self.share_above(threshold) * np.exp(_UPPER_SIGMAS * sigma)))

    def upper_cosine_at(self, share: float) -> float:
        """Cosine above which less than a share of the pairs lies in 95 % of samples."""
        cosines = np.array([tail.cosine_at(share) for tail in self.without])
        sigma = np.sqrt((len(cosines) - 1) * np.mean((cosines - cosines.mean()) ** 2))
        return float(min(1.0, self.tail.cosine_at(share) + _UPPER_SIGMAS * sigma))

    def expected(self, threshold: float, num_rows: int) -> float:
        """Unrelated rows that a row of a pool has above a threshold."""
        return self.share_above(threshold) * max(0, num_rows - 1)

    def threshold_for(self, expected: float, num_rows: int) -> float:
        """Threshold above which a row of a pool has so many unrelated rows, rounded up."""
        cosine = self.tail.cosine_at(expected / max(1, num_rows - 1))
        return float(min(1.0, np.ceil(1000 * cosine) / 1000))


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows, as (P,) arrays."""

    one: NDArray[np.int64]
    other: NDArray[np.int64]
    cosines: NDArray[np.float32]


def fit_unrelated_tail(rows: NDArray[np.floating], threshold: float) -> UnrelatedTail | None:
    """Fit the tail of the cosines of a sample; None where too few rows are left.

    Only pairs below the threshold are fitted, since duplicates are among those above it. Rows that
    are surely copies of an earlier one, with a cosine halfway between the threshold and 1, are left
    out first, so that a crowd of copies counts once.

    rows: (M, D) unit rows in random order. threshold: of duplicates.
    """
    rows = _without_copies(rows.astype(np.float32), threshold)
    if len(rows) < MIN_ROWS:
        return None
    return fit_pairs(_most_alike(rows, threshold), len(rows))


def fit_pairs(pairs: Pairs, num_rows: int) -> UnrelatedTail:
    """Fit the tail of pairs of so many rows, of which the least alike may be left out."""
    group = np.arange(num_rows) % _GROUPS
    whole = _fit(pairs.cosines, num_rows, None)
    without = []
    for left_out in range(_GROUPS):
        kept = (group[pairs.one] != left_out) & (group[pairs.other] != left_out)
        without.append(_fit(pairs.cosines[kept], int((group != left_out).sum()), whole))
    return UnrelatedTail(whole, tuple(without))


def largest_random_component(num_rows: int, expected: float) -> int:
    """Rows in the largest component of a random graph whose rows have so many neighbors each.

    Below one neighbor a row, the largest size of which one tree is expected (Erdős and Rényi
    1960); above, the giant component. Real likenesses cluster, so components can be larger.
    """
    if expected <= 0 or num_rows < 2:
        return min(1, num_rows)
    sizes = np.arange(1, min(num_rows, _MAX_COMPONENT) + 1)
    trees = (  # log of the expected number of trees of each size
        np.log(num_rows)
        + (sizes - 2) * np.log(sizes)
        + (sizes - 1) * np.log(expected)
        - expected * sizes
        - gammaln(sizes + 1)
    )
    at_least = np.cumsum(np.exp(trees)[::-1])[::-1]
    largest = max(1, int(np.count_nonzero(at_least >= 1)))
    return max(largest, round(_giant_share(expected) * num_rows))


def _giant_share(degree: float) -> float:
    """Share of rows in the giant component: the root of s = 1 - exp(-degree s)."""
    share = 1.0 if degree > 1 else 0.0
    for _ in range(1000):
        share = float(-np.expm1(-degree * share))
    return share


def _without_copies(rows: NDArray[np.float32], threshold: float) -> NDArray[np.float32]:
    """Rows less copies of earlier ones; in a dense pool only closer ones are sure to be copies."""
    kept, level = rows[:0], threshold
    for _ in range(4):
        level = (1 + level) / 2
        kept = rows[_first_of_its_copies(rows, level)]
        if len(kept) >= min(MIN_ROWS, len(rows)):
            break
    return kept


def _first_of_its_copies(rows: NDArray[np.floating], level: float) -> NDArray[np.bool_]:
    """(M,) bool: rows without an earlier one within a level that is not left out itself."""
    kept = np.ones(len(rows), bool)
    for start in range(0, len(rows), 1024):
        block = rows[start : start + 1024].astype(np.float32)
        alike = block @ rows[: start + len(block)].astype(np.float32).T >= level
        for offset in np.flatnonzero(alike.sum(1) > 1):
            earlier = alike[offset, : start + offset]
            kept[start + offset] = not (earlier & kept[: start + offset]).any()
    return kept


def _most_alike(rows: NDArray[np.float32], threshold: float) -> Pairs:
    """Pairs below a threshold, and above what the first rows say will be enough of them."""
    first = (rows[:512] @ rows.T)[~np.eye(min(512, len(rows)), len(rows), dtype=bool)]
    above = float((first > threshold).mean())
    if above > _DENSE:
        above, threshold = 0.0, 2.0
    share = min(1.0, above + 2 * _num_fitted(len(rows)) / _num_pairs(len(rows)))
    floor = np.quantile(first, 1 - share)
    parts = []
    for start in range(0, len(rows), 512):
        cosines = rows[start : start + 512] @ rows[start:].T
        one, other = np.nonzero((cosines > floor) & (cosines <= threshold))
        one, other = one[other > one], other[other > one]
        parts.append((one + start, other + start, cosines[one, other]))
    return Pairs(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _num_pairs(num_rows: int) -> int:
    return num_rows * (num_rows - 1) // 2


def _num_fitted(num_rows: int) -> int:
    return min(_MOST_FITTED, int(_MAX_SHARE * _num_pairs(num_rows)))


def _fit(cosines: NDArray[np.float32], num_rows: int, near: Tail | None) -> Tail:
    """Fit the largest cosines of so many rows by maximum likelihood, cut off at both ends."""
    number = min(_num_fitted(num_rows), len(cosines) - 1)
    largest = np.sort(np.partition(cosines, -number - 1)[-number - 1 :]).astype(float)
    start, end = largest[0], largest[-_PASSED_OVER]
    x = largest[1:-_PASSED_OVER] - start
    unit, width = x.mean(), end - start

    def rates(log_rates: NDArray[np.float64]) -> tuple[float, float]:
        slope, curvature = np.exp(log_rates)
        return slope / unit, curvature / unit**2

    def loss(log_rates: NDArray[np.float64]) -> float:
        slope, curvature = rates(log_rates)
        whole = slope * width + curvature * width**2
        density = np.log(slope + 2 * curvature * x) - slope * x - curvature * x * x
        return float(len(x) * np.log(-np.expm1(-whole)) - density.sum())

    starts = [(-0.5, -1.0), (-2.0, -0.5), (0.0, -6.0)]
    if near is not None:
        starts = [(np.log(near.slope * unit), np.log(near.curvature * unit**2))]
    options = {"xatol": 1e-3, "fatol": 1e-3}
    fits = [minimize(loss, one, method="Nelder-Mead", options=options) for one in starts]
    slope, curvature = rates(min(fits, key=lambda fit: float(fit.fun)).x)
    inside = -np.expm1(-slope * width - curvature * width**2)
    return Tail(float(start), len(x) / inside / _num_pairs(num_rows), slope, curvature)
