"""Coarse centroids in two levels: trained on a sample, and searched from the top down.

A row meets the G groups, then the lists of the few groups nearest to it: 600 products instead of
4,000. Lists are numbered so that those of one group, and groups that lie near each other, follow
one another: what a partition's visitors need then lies in few places.
N rows, D width, G groups, L lists, T visits of all rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation.neighbors.partition import Router
from curation.neighbors.quantized import (
    integer_products,
    nearest_centroids,
    quantize_centroids,
    quantize_rows,
)
from curation.neighbors.routes import Reach, Routes, bounds_of
from curation.neighbors.row_files import map_array, write_array
from curation.neighbors.threads import in_threads
from curation.neighbors.vectors import unit_rows

_ROWS_AT_ONCE = 1 << 13
_ROWS_PER_THREAD = (1 << 13, 1 << 15)
"""At least and at most: a few blocks a thread, but fewer sums than rows in each."""
_PRODUCTS = 1 << 18
"""They stay in the cache of a core until those within reach are found."""
_NOWHERE = -(2**31)
_WIDEST = 8.0
"""No two cosines differ by so much, however they were rounded."""
_GROWTH = ((8, 4), (32, 3), (96, 2))
"""Rows a centroid, and passes over them at most, as long as there are twice as many rows."""
_LAST_PASSES = 6
"""Passes over all rows at most."""
_SETTLED = 0.02
"""Share of the rows: when fewer than these change their centroid, training ends."""
FLAT = 1 << 14
"""Up to so many lists there is one level."""


@dataclass(frozen=True)
class Coarse:
    """Quantised centroids of both levels, ready for products."""

    groups: np.ndarray
    """(G, D) int8."""
    lists: np.ndarray
    """(L, D) int8, ordered by group."""
    list_starts: np.ndarray
    """(G + 1,) int64: first list of each group, then the number of lists."""

    @classmethod
    def trained(
        cls, rows: np.ndarray, num_lists: int, rng: np.random.Generator, threads: int = 1
    ) -> "Coarse":
        """Train both levels on a sample. rows: (N, D) float16 or float32, in a fixed order."""
        from curation.clustering import lloyd

        if num_lists <= FLAT:
            lists = grown_centroids(rows, num_lists, rng, threads)
            lists = lists[_chain(lists)]
            starts = np.array([0, len(lists)])
            return cls(quantize_centroids(lists[:1]), quantize_centroids(lists), starts)
        num_groups = max(1, round(np.sqrt(num_lists)))
        groups = grown_centroids(rows, num_groups, rng, threads)
        groups = groups[_chain(groups)]
        quantized = quantize_rows(rows)
        mine = _nearest(quantized, groups, threads)
        counts = _shares(np.bincount(mine, minlength=len(groups)), num_lists)
        seeds = rng.integers(0, 1 << 62, len(groups))

        def inside(group: int) -> np.ndarray:
            own = np.flatnonzero(mine == group)
            if not len(own):
                return np.asarray(groups[group : group + 1])
            own_rng = np.random.default_rng(seeds[group])
            lists, _ = lloyd(rows[own], quantized[own], int(counts[group]), 6, own_rng)
            return np.asarray(lists[_chain(lists)])

        parts = list(in_threads(inside, range(len(groups)), threads))
        starts = np.cumsum([0, *(len(part) for part in parts)])
        return cls(quantize_centroids(groups), quantize_centroids(np.concatenate(parts)), starts)

    def write(self, path: str) -> None:
        """Write to a file, from which a `CoarseRouter` reads."""
        write_array(path, self.list_starts.astype(np.int64), self.groups, self.lists)

    @property
    def num_lists(self) -> int:
        """Lists of all groups."""
        return len(self.lists)

    @property
    def length(self) -> float:
        """Length of a list's centroid as integers: the same for all, up to rounding."""
        return float(np.sqrt(np.mean((self.lists.astype(np.float32) ** 2).sum(axis=1))))

    def route(self, vectors: np.ndarray, reach: Reach, threads: int = 1) -> Routes:
        """The list of each row, and those within reach. vectors: (N, D)."""
        length = self.length

        def of_block(start: int) -> Routes:
            rows = quantize_rows(vectors[start : start + _ROWS_AT_ONCE])
            step = len(rows) if len(self.groups) > 1 else max(32, _PRODUCTS // self.num_lists)
            blocks = (rows[first : first + step] for first in range(0, len(rows), step))
            return Routes.joined([self._route(block, reach, length) for block in blocks])

        starts = range(0, len(vectors), _ROWS_AT_ONCE)
        return Routes.joined(list(in_threads(of_block, starts, threads)))

    def gap_of_visits(self, vectors: np.ndarray, mean: float, reach: Reach) -> float:
        """The gap within which rows visit so many of the lists within reach on average."""
        return self.route(vectors, reach).gap_at(int(mean * len(vectors)))

    def _route(self, rows: np.ndarray, reach: Reach, length: float) -> Routes:
        """Routes of rows of 8-bit integers: (N, D)."""
        lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.int64)) * length  # (N,)
        scores, owner = self._scores(rows, reach.groups)
        limit = np.float16(min(reach.gap, _WIDEST))
        allowed = (np.nextafter(limit, np.float16(np.inf)) * lengths).astype(np.int64)
        who, columns, below = _within(scores, allowed, reach.most)
        lists = columns
        if owner is not None:
            slot, inside = np.divmod(columns, scores.shape[1] // owner.shape[1])
            lists = self.list_starts[owner[who, slot]] + inside
        nearest = np.flatnonzero(below == 0)
        _, firsts = np.unique(who[nearest], return_index=True)
        homes = nearest[firsts]  # (N,)
        gaps = (below / lengths[who]).astype(np.float16)
        visits = gaps <= limit  # as it will be asked, and not as it was computed
        visits[homes] = False
        counts = np.bincount(who[visits], minlength=len(rows))
        return Routes(
            lists[homes].astype(np.int32),
            bounds_of(counts),
            lists[visits].astype(np.int32),
            gaps[visits],
        )

    def _scores(self, rows: np.ndarray, num_groups: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(N, C) int32 products of rows with lists; whose lists they are.

        One level: all lists, and None. Two: those of the nearest groups, (N, G) int64, as many
        columns a group as the longest has; `_NOWHERE` where a group has fewer lists.
        """
        import torch

        if len(self.groups) == 1:
            return integer_products(rows, self.lists).numpy(), None
        num_groups = min(num_groups, len(self.groups))
        near = integer_products(rows, self.groups).topk(num_groups, dim=1).indices.numpy()
        longest = int(np.diff(self.list_starts).max())
        scores = torch.full((len(rows), num_groups, longest), _NOWHERE, dtype=torch.int32)
        for group in range(len(self.groups)):
            first, stop = self.list_starts[group : group + 2]
            who, slot = np.nonzero(near == group)
            if len(who):
                found = integer_products(rows[who], self.lists[first:stop])
                scores[torch.from_numpy(who), torch.from_numpy(slot), : stop - first] = found
        return scores.flatten(1).numpy(), near


@dataclass(frozen=True)
class CoarseRouter(Router):
    """Routes rows by trained coarse centroids in a file."""

    path: str
    width: int
    num_groups: int
    num_lists: int
    reach: Reach
    threads: int = 1
    """Threads of one worker."""

    def open(self) -> Coarse:
        """Load the centroids."""
        head, size = 8 * (self.num_groups + 1), self.num_groups * self.width
        return Coarse(  # copies: torch would copy what is mapped for every product
            np.array(map_array(self.path, "int8", head, (self.num_groups, self.width))),
            np.array(map_array(self.path, "int8", head + size, (self.num_lists, self.width))),
            np.array(map_array(self.path, "int64", 0, (self.num_groups + 1,))),
        )

    def route(self, ids: np.ndarray, vectors: np.ndarray, opened: Any) -> Routes:
        """The nearest list, and those within reach."""
        routes: Routes = opened.route(vectors, self.reach, self.threads)
        return routes


def grown_centroids(
    rows: np.ndarray, count: int, rng: np.random.Generator, threads: int
) -> np.ndarray:
    """(C, D) float32: spherical k-means on a sample that grows while centroids settle.

    A pass over few rows moves centroids as far as one over many, as long as they are far from
    their places; the last passes see all rows, until few of them change their centroid.
    rows: (N, D) in random order.
    """
    blocks = _blocks(len(rows), count)
    parts = in_threads(lambda block: quantize_rows(rows[block]), blocks, threads)
    quantized = np.concatenate(list(parts))
    centroids = unit_rows(rows[:count]).astype(np.float32)
    for per_centroid, passes in _GROWTH:
        some = slice(0, per_centroid * count)
        if 2 * per_centroid * count <= len(rows):
            centroids = _moved(rows[some], quantized[some], centroids, passes, rng, threads)
    return _moved(rows, quantized, centroids, _LAST_PASSES, rng, threads)


def _moved(
    rows: np.ndarray,
    quantized: np.ndarray,
    centroids: np.ndarray,
    passes: int,
    rng: np.random.Generator,
    threads: int,
) -> np.ndarray:
    """(C, D): centroids after some passes over the rows, fewer where they have settled."""
    from curation.clustering import means_of

    count, nearest = len(centroids), np.full(len(rows), -1, np.int32)
    for _ in range(passes):
        before, nearest = nearest, _nearest(quantized, centroids, threads)
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
    from curation.clustering import cluster_sums

    def of_block(block: slice) -> tuple[np.ndarray, np.ndarray]:
        return cluster_sums(rows[block], nearest[block], count)

    return in_threads(of_block, _blocks(len(rows), count), threads)


def _nearest(quantized: np.ndarray, centroids: np.ndarray, threads: int) -> np.ndarray:
    """(N,) int32: the nearest centroid of each row. quantized: (N, D) int8."""
    codes = quantize_centroids(centroids)
    blocks = _blocks(len(quantized), len(codes))
    found = in_threads(lambda block: nearest_centroids(quantized[block], codes), blocks, threads)
    return np.concatenate(list(found))


def _blocks(num_rows: int, count: int) -> list[slice]:
    """Blocks of rows that are to meet so many centroids: the same for any number of threads."""
    size = int(np.clip(2 * count, *_ROWS_PER_THREAD))
    return [slice(start, min(num_rows, start + size)) for start in range(0, max(1, num_rows), size)]


def _within(
    scores: np.ndarray, allowed: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns, and how far below their row's highest score they are: (T,) int64 each.

    scores: (N, C) int32; allowed: (N,) int64, how far that may be; most: columns a row beside the
    highest, and those equal to the last of them.
    """
    best = scores.max(axis=1).astype(np.int64)
    near = scores >= np.maximum(best - allowed, _NOWHERE + 1).astype(np.int32)[:, None]
    crowded = np.flatnonzero(np.count_nonzero(near, axis=1) > most + 1)
    if len(crowded):
        last = np.partition(scores[crowded], -most - 1, axis=1)[:, -most - 1]
        near[crowded] = scores[crowded] >= last[:, None]
    flat = np.flatnonzero(near)
    rows, columns = np.divmod(flat, scores.shape[1])
    return rows, columns, best[rows] - scores.reshape(-1)[flat]


def _shares(members: np.ndarray, total: int) -> np.ndarray:
    """(G,) how many of `total` lists each group gets, in proportion to its members."""
    exact = members * (total / max(1, members.sum()))
    return np.asarray(np.maximum(1, np.rint(exact)), np.int64)


def _chain(rows: np.ndarray) -> np.ndarray:
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
