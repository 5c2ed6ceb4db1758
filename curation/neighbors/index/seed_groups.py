"""Groups of alike rows in a sample: where there are some, they make the best lists.

k-means with far fewer centroids than groups bundles strangers, and a centroid that stands for a
dozen groups says little about each. Here neighbors within the sample are found first, by
sketches and coarse lists, so roughly that it costs little; then rows gather around those with
most neighbors. A group's mean lies much nearer to the group's other rows than any of them does.
S sampled rows, D width, E edges.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from curation.neighbors.index.coarse_training import grown_centroids, means_of_groups
from curation.neighbors.kernels.grouping import by_group
from curation.neighbors.kernels.identical import first_identical
from curation.neighbors.kernels.quantized import (
    integer_products,
    lengths_of,
    pair_products,
    quantize_centroids,
    quantize_rows,
)
from curation.neighbors.kernels.selection import columns_near, ranks_within
from curation.neighbors.kernels.sketches import least_cosine, least_product, sketches_of
from curation.neighbors.kernels.threads import in_threads

LEAST_COSINE = 0.5
"""Below it, sketches of strangers look alike too often."""
_ROWS_PER_LIST = 1 << 10
_TRAINED_PER_LIST = 32
_MOST_LISTS = 1 << 15
_FEWEST_MET, _SHARE_MET = 16, 1 / 96
"""Lists that a row meets: that many at least, or that share of them."""
_LONGEST = 1 << 13
"""Rows of a list that others are compared with; the rest of a crowd adds nothing new."""
_MOST_NEIGHBORS, _ENOUGH = 16, 32
"""Of a row in one list, and in all before it looks no further: in a crowd all find the same first
ones."""
_ROUNDS = 32
"""Rounds of lists after which it is seen which rows have found enough."""
_VISITORS = 1 << 9
_ROUTED = 1 << 9

_Edges = tuple[np.ndarray, np.ndarray]
"""(E,) int64 each: rows, and rows alike to them."""


def sample_duplicate_groups(
    rows: np.ndarray, cosine: float, rng: np.random.Generator, threads: int = 1
) -> np.ndarray:
    """(S,) int64: the row that leads the group of each; -1 of those in no group.

    rows: (S, D) int8 in random order. cosine: above which two rows are alike.
    """
    first = first_identical(rows)
    uniques = np.flatnonzero(first == np.arange(len(rows)))
    some = rows[uniques] if len(uniques) < len(rows) else rows
    leaders = _leaders(len(some), *_neighbors(some, cosine, rng, threads))
    groups = np.full(len(rows), -1, np.int64)
    groups[uniques] = np.where(leaders < 0, -1, uniques[leaders])
    groups = groups[first]
    members = np.bincount(groups[groups >= 0], minlength=len(rows))
    groups = np.where(members[groups] > 1, groups, -1)
    return _merged(rows, groups, (1 + cosine) / 2, rng, threads)


def _merged(
    rows: np.ndarray, groups: np.ndarray, cosine: float, rng: np.random.Generator, threads: int
) -> np.ndarray:
    """(S,) int64: groups whose means are alike as one: neighbors found in part split a group."""
    numbers = np.unique(groups[groups >= 0])
    if not len(numbers):
        return groups
    means = quantize_rows(means_of_groups(rows, groups, numbers))
    leaders = _leaders(len(means), *_neighbors(means, cosine, rng, threads))
    merged = np.arange(len(rows))
    merged[numbers] = np.where(leaders < 0, numbers, numbers[leaders])
    return np.where(groups < 0, -1, merged[groups])


def _neighbors(rows: np.ndarray, cosine: float, rng: np.random.Generator, threads: int) -> _Edges:
    """Most pairs of rows that are alike or nearly so, of which one meets the list of the other."""
    homes, visitors, starts = _coarse_lists(rows, rng, threads)
    order, home_starts = by_group(homes, len(starts) - 1)
    compared = _Compared(rows, sketches_of(rows, threads), lengths_of(rows), cosine)
    known, found = np.zeros(len(rows), np.int64), [np.empty(0, np.int64)]

    def of_list(one: int) -> np.ndarray:
        residents = order[home_starts[one] : home_starts[one + 1]][:_LONGEST]
        coming = visitors[starts[one] : starts[one + 1]]
        return compared.pairs(residents, coming[known[coming] < _ENOUGH])

    count = len(starts) - 1
    for first in range(0, count, step := 1 + count // _ROUNDS):
        lists = range(first, min(first + step, count))
        pairs = np.concatenate(list(in_threads(of_list, lists, threads)))
        known += np.bincount(pairs >> 32, minlength=len(rows))
        found.append(pairs)
    pairs = np.concatenate(found)
    left, right = pairs >> 32, pairs & 0xFFFFFFFF
    pairs = np.sort(np.minimum(left, right) << 32 | np.maximum(left, right))
    pairs = pairs[np.diff(pairs, prepend=-1) != 0]
    return pairs >> 32, pairs & 0xFFFFFFFF


def _coarse_lists(
    rows: np.ndarray, rng: np.random.Generator, threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of some lists: that of each row (S,), visitors by list, and where each list's begin."""
    count = int(np.clip(len(rows) // _ROWS_PER_LIST, 1, _MOST_LISTS))
    trained = grown_centroids(rows[: _TRAINED_PER_LIST * count], count, rng, threads)
    found = in_threads(
        partial(_nearest_lists, rows, quantize_centroids(trained)),
        range(0, len(rows), _ROUTED),
        threads,
    )
    homes, visits = (np.concatenate(part) for part in zip(*found, strict=True))
    visits.sort()
    starts = np.searchsorted(visits, np.arange(count + 1, dtype=np.uint64) << np.uint64(32))
    return homes, visits.astype(np.uint32), starts


def _nearest_lists(
    rows: np.ndarray, centroids: np.ndarray, start: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest list of each row of a block; all visits, as 2^32 x list + row."""
    scores = integer_products(rows[start : start + _ROUTED], centroids).numpy()
    met = max(_FEWEST_MET, int(_SHARE_MET * len(centroids)))
    who, lists = np.divmod(columns_near(scores, met), scores.shape[1])
    return scores.argmax(axis=1).astype(np.uint16), (lists << 32 | (who + start)).astype(np.uint64)


@dataclass(frozen=True)
class _Compared:
    """Rows that are compared by their sketches, and exactly where these are alike."""

    rows: np.ndarray
    """(S, D) int8."""
    sketches: np.ndarray
    """(S, 128) int8."""
    lengths: np.ndarray
    """(S,) float64."""
    cosine: float

    def pairs(self, residents: np.ndarray, visitors: np.ndarray) -> np.ndarray:
        """(H,) int64: visitor x 2^32 + resident of those that are nearly alike."""
        found, own = [np.empty(0, np.int64)], self.sketches[residents]
        least = least_product(self.cosine)
        for start in range(0, len(visitors) if len(residents) else 0, _VISITORS):
            some = visitors[start : start + _VISITORS]
            scores = integer_products(self.sketches[some], own).numpy()
            who, which = np.divmod(np.flatnonzero(scores > least), len(residents))
            few = ranks_within(who) <= _MOST_NEIGHBORS  # itself is one
            found.append(self._nearly_alike(some[who[few]], residents[which[few]]))
        return np.concatenate(found)

    def _nearly_alike(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Those whose own cosine is what their sketches' had to be, and not just theirs."""
        products = pair_products(self.rows, left, self.rows, right)
        least = least_cosine(self.cosine) * self.lengths[left] * self.lengths[right]
        good = (products > least) & (left != right)
        return np.asarray(left[good].astype(np.int64) << 32 | right[good].astype(np.int64))


def _leaders(num_rows: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(S,) int64: the leader among each row's neighbors, or itself; -1 without neighbors.

    The row with most neighbors leads them, then of those left the one with most, and so on.
    left, right: (E,) each pair once.
    """
    degrees = np.bincount(left, minlength=num_rows) + np.bincount(right, minlength=num_rows)
    order = np.argsort(-degrees, kind="stable")
    rank = np.empty(num_rows, np.int64)  # the smaller, the sooner it leads
    rank[order] = np.arange(num_rows)
    leader = np.full(num_rows, -1, np.int64)
    left, right = left.astype(np.int32), right.astype(np.int32)  # edges take most of the memory
    a, b = np.concatenate([left, right]), np.concatenate([right, left])
    by_row = np.argsort(a, kind="stable")
    a, b = a[by_row], b[by_row]
    while len(a):
        firsts = np.flatnonzero(np.diff(a, prepend=-1))
        rows = a[firsts]
        leading = rows[rank[rows] < np.minimum.reduceat(rank[b], firsts)]
        leader[leading] = leading
        led = leader[b] == b
        sooner = np.full(num_rows, num_rows, np.int64)
        np.minimum.at(sooner, a[led], rank[b[led]])
        follow = np.flatnonzero((sooner < num_rows) & (leader < 0))
        leader[follow] = order[sooner[follow]]
        left_over = (leader[a] < 0) & (leader[b] < 0)
        a, b = a[left_over], b[left_over]
    return leader
