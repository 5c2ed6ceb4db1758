"""Training the centroids of coarse lists on a sample.

Where rows gather in groups, each group is a list, and k-means makes lists for the rest alone.
S sampled rows, C centroids, D width.
"""

from collections.abc import Iterator

import numpy as np

from curation.neighbors.kernels.grouping import by_group
from curation.neighbors.kernels.k_means import cluster_sums, lloyd, means_of
from curation.neighbors.kernels.quantized import nearest_centroids, quantize_centroids
from curation.neighbors.kernels.threads import in_threads
from embedder.rows import unit_rows

_ROWS_PER_THREAD = (1 << 13, 1 << 15)
"""At least and at most: a few blocks a thread, but fewer sums than rows in each."""
_GROWTH = ((8, 4), (32, 3), (96, 2))
"""Rows a centroid, and passes over them at most, as long as there are twice as many rows."""
_LAST_PASSES = 6
"""Passes over all rows at most."""
_SETTLED = 0.02
"""Share of the rows: when fewer than these change their centroid, training ends."""
FLAT = 1 << 14
"""Up to so many lists k-means has one level."""
_MOST_GROUPS = 1 << 18
"""What every worker holds as 8-bit integers."""
_GROUPS_AT_ONCE = 1 << 10
_FEWEST_LOOSE = 16


def lists_of(
    rows: np.ndarray,
    num_lists: int,
    rng: np.random.Generator,
    threads: int = 1,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Unit centroids, (A, D) of one list for each group and (B, D) of lists for the rest.

    num_lists: how many k-means would make of all rows; the rest gets its share of them.
    rows: (S, D) int8 in random order. groups: (S,) int64, a number for those of the same group,
    -1 for those in none.
    """
    none = np.empty((0, rows.shape[1]), np.float32)
    if groups is None or not (groups >= 0).any():
        return none, _by_kmeans(rows, num_lists, rng, threads)
    numbers, members = np.unique(groups[groups >= 0], return_counts=True)
    largest = numbers[np.argsort(-members, kind="stable")[:_MOST_GROUPS]]
    rest = rows[~np.isin(groups, largest)]
    count = max(_FEWEST_LOOSE, round(num_lists * len(rest) / len(rows)))
    some = rest if len(rest) >= count else rows
    return means_of_groups(rows, groups, largest), _by_kmeans(some, count, rng, threads)


def means_of_groups(rows: np.ndarray, groups: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """(C, D) float32: unit means of some groups. rows: (S, D) int8; groups: (S,); largest: (C,)."""
    place = np.full(len(rows), -1, np.int64)  # of a group's number in the result
    place[largest] = np.arange(len(largest))
    places = np.where(groups >= 0, place[groups], -1)  # (S,)
    order, starts = by_group(places, len(largest))
    means = np.empty((len(largest), rows.shape[1]), np.float32)
    for first in range(0, len(largest), _GROUPS_AT_ONCE):
        some = slice(first, min(first + _GROUPS_AT_ONCE, len(largest)))
        members = order[starts[some.start] : starts[some.stop]]
        unit = unit_rows(rows[members]).astype(np.float32)
        means[some] = unit_rows(np.add.reduceat(unit, starts[some] - starts[some.start], axis=0))
    return means


def _by_kmeans(
    rows: np.ndarray, num_lists: int, rng: np.random.Generator, threads: int
) -> np.ndarray:
    """(L, D) float32: centroids of one level, or of two where they are many."""
    num_lists = min(num_lists, len(rows))
    if num_lists <= FLAT:
        return grown_centroids(rows, num_lists, rng, threads)
    num_groups = max(1, round(np.sqrt(num_lists)))
    groups = grown_centroids(rows, num_groups, rng, threads)
    mine = _nearest(rows, groups, threads)
    counts = _shares(np.bincount(mine, minlength=len(groups)), num_lists)
    seeds = rng.integers(0, 1 << 62, len(groups))

    def inside(group: int) -> np.ndarray:
        own = rows[mine == group]
        if not len(own):
            return np.asarray(groups[group : group + 1])
        own_rng = np.random.default_rng(seeds[group])
        return lloyd(own, int(counts[group]), 6, own_rng)

    return np.concatenate(list(in_threads(inside, range(len(groups)), threads)))


def grown_centroids(
    rows: np.ndarray, count: int, rng: np.random.Generator, threads: int = 1
) -> np.ndarray:
    """(C, D) float32: spherical k-means on a sample that grows while centroids settle.

    A pass over few rows moves centroids as far as one over many, as long as they are far from
    their places; the last passes see all rows, until few of them change their centroid.
    rows: (S, D) int8 in random order.
    """
    centroids = unit_rows(rows[:count]).astype(np.float32)
    for per_centroid, passes in _GROWTH:
        if 2 * per_centroid * count <= len(rows):
            centroids = _moved(rows[: per_centroid * count], centroids, passes, rng, threads)
    return _moved(rows, centroids, _LAST_PASSES, rng, threads)


def chain(rows: np.ndarray) -> np.ndarray:
    """(C,) an order in which each row is followed by the nearest one that is left."""
    scores = np.asarray(rows @ rows.T)
    left = np.ones(len(rows), bool)
    order = [0]
    left[0] = False
    for _ in range(len(rows) - 1):
        following = int(np.where(left, scores[order[-1]], -np.inf).argmax())
        left[following] = False
        order.append(following)
    return np.array(order)


def _moved(
    rows: np.ndarray,
    centroids: np.ndarray,
    passes: int,
    rng: np.random.Generator,
    threads: int,
) -> np.ndarray:
    """(C, D): centroids after some passes over the rows, fewer where they have settled."""
    count, nearest = len(centroids), np.full(len(rows), -1, np.int32)
    for _ in range(passes):
        before, nearest = nearest, _nearest(rows, centroids, threads)
        sums, counts = np.zeros(centroids.shape), np.zeros(count, np.int64)
        for part, members in _sums(rows, nearest, count, threads):
            sums += part
            counts += members
        centroids = means_of(sums, counts, centroids, rng)
        if np.count_nonzero(before != nearest) < _SETTLED * len(rows):
            break
    return centroids


def _sums(
    rows: np.ndarray, nearest: np.ndarray, count: int, threads: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sums and numbers of the members of each centroid, block by block."""

    def of_block(block: slice) -> tuple[np.ndarray, np.ndarray]:
        return cluster_sums(rows[block], nearest[block], count)

    return in_threads(of_block, _blocks(len(rows), count), threads)


def _nearest(rows: np.ndarray, centroids: np.ndarray, threads: int) -> np.ndarray:
    """(S,) int32: the nearest centroid of each row. rows: (S, D) int8."""
    codes = quantize_centroids(centroids)
    blocks = _blocks(len(rows), len(codes))
    found = in_threads(lambda block: nearest_centroids(rows[block], codes), blocks, threads)
    return np.concatenate(list(found))


def _blocks(num_rows: int, count: int) -> list[slice]:
    """Blocks of rows that are to meet so many centroids: the same for any number of threads."""
    size = int(np.clip(2 * count, *_ROWS_PER_THREAD))
    return [slice(start, min(num_rows, start + size)) for start in range(0, max(1, num_rows), size)]


def _shares(members: np.ndarray, total: int) -> np.ndarray:
    """(G,) how many of `total` lists each group gets, in proportion to its members."""
    exact = members * (total / max(1, members.sum()))
    return np.asarray(np.maximum(1, np.rint(exact)), np.int64)
