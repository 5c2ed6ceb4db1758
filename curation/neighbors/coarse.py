"""Coarse lists: which of them a row lives in, and which are nearly as near.

Many lists lie in groups. A row meets the centroids of all groups, then the lists of the groups
nearest to it. One that is near none of these looks for such a list in all groups that are not far
from it, by sketches. That makes 10,000 products instead of 200,000. Lists are numbered so that
those of one group, and groups that lie near each other, follow one another: what a partition's
visitors need then lies in few places.
N rows, D width, G groups, L lists, H lists met by all rows, T visits of all rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from curation.neighbors.coarse_training import chain, grown_centroids
from curation.neighbors.partition import Router
from curation.neighbors.quantized import (
    integer_products,
    lengths_of,
    nearest_centroids,
    quantize_centroids,
    quantize_rows,
)
from curation.neighbors.routes import Reach, Routes, bounds_of
from curation.neighbors.row_files import map_array, write_array
from curation.neighbors.selection import columns_near, ranks_within
from curation.neighbors.sketches import least_product, sketches_of
from curation.neighbors.threads import in_threads

_UNGROUPED = 1 << 14
"""Lists up to which a row meets all of them."""
_LISTS_PER_GROUP = 64
_MOST_GROUPS_MET = 128
_FEWEST_ROWS = 50
"""Rows near a list that say how far the groups of such lists may be."""
_ROWS_AT_ONCE = 1 << 13
_ROWS_GROUPED = 1 << 15
"""So many that each group is met by some hundreds of them: small products cost their call."""
_PRODUCTS = 1 << 18
"""They stay in the cache of a core until those within reach are found."""
_FIRST_GROUPS = 8
"""Nearest groups, in which most rows that are near a list find it."""
_VERY_FIRST = 2
"""Nearest groups that say how high the others must reach."""
_ROWS_FOR_GAP = 1 << 9
_WIDEST = 8.0
"""No two cosines differ by so much, however they were rounded."""

_Met = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(H,) each: rows in ascending order, lists, and how far their product is below the highest."""


@dataclass(frozen=True)
class Coarse:
    """Quantised centroids of lists and of their groups, ready for products."""

    groups: np.ndarray
    """(G, D) int8."""
    lists: np.ndarray
    """(L, D) int8, ordered by group."""
    list_starts: np.ndarray
    """(G + 1,) int64: first list of each group, then the number of lists."""

    @classmethod
    def of(cls, lists: np.ndarray, rng: np.random.Generator, threads: int = 1) -> "Coarse":
        """Group lists and put them in order. lists: (L, D) float32, unit rows."""
        codes, count = quantize_centroids(lists), len(lists) // _LISTS_PER_GROUP
        if len(lists) <= _UNGROUPED:
            order = chain(lists)
            return cls(codes[:1], codes[order], np.array([0, len(lists)]))
        shuffled = quantize_rows(lists[rng.permutation(len(lists))])
        groups = grown_centroids(shuffled, count, rng, threads)
        groups = quantize_centroids(groups[chain(groups)])
        owners = nearest_centroids(quantize_rows(lists), groups)
        known, owners = np.unique(owners, return_inverse=True)
        order = np.argsort(owners, kind="stable")
        starts = np.searchsorted(owners[order], np.arange(len(known) + 1))
        return cls(groups[known], codes[order], starts)

    def write(self, path: str) -> None:
        """Write to a file, from which a `CoarseRouter` reads."""
        write_array(path, self.list_starts.astype(np.int64), self.groups, self.lists)

    @property
    def num_lists(self) -> int:
        """Lists of all groups."""
        return len(self.lists)

    @cached_property
    def length(self) -> float:
        """Length of a list's centroid as integers: the same for all, up to rounding."""
        return float(np.sqrt(np.mean(lengths_of(self.lists) ** 2)))

    @cached_property
    def sketches(self) -> np.ndarray:
        """(L, 128) int8: sketches of the lists' centroids."""
        return sketches_of(self.lists)

    def reach(self, rows: np.ndarray, near: float, share: float, most: int) -> Reach:
        """How far to look for lists, so that this share of the rows finds the nearest one.

        near: where finite, only rows count whose nearest list has this cosine at least.
        rows: (N, D), not trained on. most: visits of a row.
        """
        if len(self.groups) == 1:
            return Reach(np.inf, most)
        codes = quantize_rows(rows)
        nearest = nearest_centroids(codes, self.lists)
        owners = np.searchsorted(self.list_starts, nearest, "right") - 1
        scores = integer_products(codes, self.groups).numpy()  # (N, G)
        own = scores[np.arange(len(scores)), owners]
        if np.isinf(near):
            rank = np.sort((scores > own[:, None]).sum(axis=1))
            wanted = 1 + int(rank[int(share * (len(rank) - 1))])
            return Reach(np.inf, most, min(wanted, _MOST_GROUPS_MET))
        products = np.einsum("nd,nd->n", codes, self.lists[nearest], dtype=np.int64)
        there = products >= near * self.length * lengths_of(codes)
        if np.count_nonzero(there) < _FEWEST_ROWS:
            return Reach(np.inf, most, _FIRST_GROUPS)
        cosines = np.sort(own[there] / (lengths_of(codes[there]) * self._length_of_groups))
        floor = float(cosines[int((1 - share) * len(cosines))])
        return Reach(np.inf, most, _FIRST_GROUPS, near, floor)

    def route(self, vectors: np.ndarray, reach: Reach, threads: int = 1) -> Routes:
        """The list of each row, and those within reach. vectors: (N, D)."""
        length = self.length
        meet, step = self._meet_all, _ROWS_AT_ONCE
        if len(self.groups) > 1:
            meet, step = self._meet_groups, _even_step(len(vectors), threads)

        def of_block(start: int) -> Routes:
            rows = quantize_rows(vectors[start : start + step])
            return _routes(rows, meet(rows, _allowed(rows, reach, length), reach), reach, length)

        return Routes.joined(list(in_threads(of_block, range(0, len(vectors), step), threads)))

    def gap_of_visits(
        self, vectors: np.ndarray, mean: float, reach: Reach, threads: int = 1
    ) -> float:
        """The gap within which rows visit so many of the lists within reach on average."""
        vectors = vectors[:_ROWS_FOR_GAP]
        return self.route(vectors, reach, threads).gap_at(int(mean * len(vectors)))

    def _meet_all(self, rows: np.ndarray, allowed: np.ndarray, reach: Reach) -> _Met:
        """Lists within reach of all, block by block. rows: (N, D) int8; allowed: (N,)."""
        step, parts = max(32, _PRODUCTS // self.num_lists), []
        for start in range(0, len(rows), step):
            scores = integer_products(rows[start : start + step], self.lists).numpy()
            who, lists, below = _within(scores, allowed[start : start + step], reach.most)
            parts.append((who + start, lists, below))
        who, lists, below = (np.concatenate(part) for part in zip(*parts, strict=True))
        return who, lists, below

    def _meet_groups(self, rows: np.ndarray, allowed: np.ndarray, reach: Reach) -> _Met:
        """Lists within reach of those in the nearest groups, and others that are near."""
        best = np.full(len(rows), -(1 << 31), np.int64)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

        def raise_best(who: np.ndarray, first: int, scores: np.ndarray) -> None:
            best[who] = np.maximum(best[who], scores.max(axis=1))

        def keep(who: np.ndarray, first: int, scores: np.ndarray) -> None:
            raise_best(who, first, scores)
            floors = _as_int32(best[who] - allowed[who])
            if reach.gap >= _WIDEST and reach.most + 1 < scores.shape[1]:
                of_group = np.partition(scores, -reach.most - 1, axis=1)[:, -reach.most - 1]
                floors = np.maximum(floors, of_group)
            flat = np.flatnonzero(scores >= floors[:, None])
            row, column = np.divmod(flat, scores.shape[1])
            found.append((who[row], column + first, scores.reshape(-1)[flat]))

        first, every, farther = self._near_groups(rows, reach)
        self._meet_near(rows, self.lists, first, raise_best)
        self._meet_near(rows, self.lists, every, keep)
        if np.isfinite(reach.near):
            lost = best < reach.near * self.length * lengths_of(rows)
            farther = farther[lost[farther // len(self.groups)]]
            who, lists = self._look_alike(rows, farther, least_product(reach.near))
            products = _products(rows, self.lists, who, lists)
            np.maximum.at(best, who, products)
            found.append((who, lists, products))
        return self._chosen(best, found, allowed, reach)

    def _look_alike(
        self, rows: np.ndarray, near: np.ndarray, least: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows (H,) and lists (H,) whose sketches say that they are near each other."""
        found = [(np.empty(0, np.int64), np.empty(0, np.int64))]

        def keep(who: np.ndarray, first: int, scores: np.ndarray) -> None:
            row, column = np.divmod(np.flatnonzero(scores > least), scores.shape[1])
            found.append((who[row], column + first))

        self._meet_near(sketches_of(rows), self.sketches, near, keep)
        who, lists = (np.concatenate(side) for side in zip(*found, strict=True))
        return who, lists

    def _chosen(
        self,
        best: np.ndarray,
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
        allowed: np.ndarray,
        reach: Reach,
    ) -> _Met:
        """Of all rows, lists and products found, those within reach of the row's best."""
        who, lists, products = (np.concatenate(part) for part in zip(*found, strict=True))
        kept = np.flatnonzero(products >= (best - allowed)[who])
        keys = who[kept] * self.num_lists + lists[kept]
        order = np.argsort(keys)
        order = order[np.diff(keys[order], prepend=-1) != 0]  # of those found twice, one
        kept = kept[order]
        who, lists, below = who[kept], lists[kept], best[who[kept]] - products[kept]
        return _at_most(who, lists, below, reach.most)

    def _near_groups(
        self, rows: np.ndarray, reach: Reach
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs of a row and a group near it, as row x G + group, ascending.

        Of a few nearest groups, of all that are met, and of those where near lists may be.
        """
        count, step = len(self.groups), max(32, _PRODUCTS // len(self.groups))
        floors = _as_int32(reach.floor * self._length_of_groups * lengths_of(rows))
        parts: tuple[list[np.ndarray], ...] = ([], [], [])
        for start in range(0, len(rows), step):
            scores = integer_products(rows[start : start + step], self.groups).numpy()
            chosen = [columns_near(scores, n) for n in (_VERY_FIRST, reach.groups)]
            chosen.append(np.flatnonzero(scores >= floors[start : start + step, None]))
            for part, some in zip(parts, chosen, strict=True):
                part.append(some + start * count)
        few, every, farther = (np.concatenate(part) for part in parts)
        return few, every, farther

    def _meet_near(
        self,
        rows: np.ndarray,
        lists: np.ndarray,
        near: np.ndarray,
        visit: Callable[[np.ndarray, int, np.ndarray], None],
    ) -> None:
        """Give to `visit`, group by group: rows near it, its first list, their products.

        rows: (N, W) int8, and lists: (L, W) int8: whole or as sketches.
        """
        who, groups = np.divmod(near, len(self.groups))
        order = np.argsort(groups.astype(np.uint16), kind="stable")
        who, bounds = who[order], np.searchsorted(groups[order], np.arange(len(self.groups) + 1))
        for group in np.flatnonzero(np.diff(bounds)):
            first, stop = self.list_starts[group : group + 2]
            some = who[bounds[group] : bounds[group + 1]]
            visit(some, first, integer_products(rows[some], lists[first:stop]).numpy())

    @cached_property
    def _length_of_groups(self) -> float:
        return float(np.sqrt(np.mean(lengths_of(self.groups) ** 2)))


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


def _limit(reach: Reach) -> np.float16:
    return np.float16(min(reach.gap, _WIDEST))


def _allowed(rows: np.ndarray, reach: Reach, length: float) -> np.ndarray:
    """(N,) int64: how far below the highest product those within reach may be."""
    limit = np.nextafter(_limit(reach), np.float16(np.inf))
    return np.asarray(limit * (lengths_of(rows) * length)).astype(np.int64)


def _even_step(num_rows: int, threads: int) -> int:
    """Rows of a block, so that all threads get as many, and few blocks."""
    rounds = -(-num_rows // (_ROWS_GROUPED * threads))
    return max(1, -(-num_rows // max(1, rounds * threads)))


def _as_int32(floors: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(floors, -(1 << 31), (1 << 31) - 1), np.int32)


def _products(
    rows: np.ndarray, lists: np.ndarray, who: np.ndarray, which: np.ndarray
) -> np.ndarray:
    """(H,) int64: products of pairs of a row and a list."""
    found = np.empty(len(who), np.int64)
    for start in range(0, len(who), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        left, right = rows[who[some]].astype(np.int32), lists[which[some]]
        found[some] = np.einsum("nd,nd->n", left, right)
    return found


def _within(
    scores: np.ndarray, allowed: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns, and how far below their row's highest score they are: (T,) int64 each.

    scores: (N, C) int32; allowed: (N,) int64, how far that may be; most: columns a row beside the
    highest, and those equal to the last of them.
    """
    best = scores.max(axis=1).astype(np.int64)
    near = scores >= _as_int32(best - allowed)[:, None]
    crowded = np.flatnonzero(np.count_nonzero(near, axis=1) > most + 1)
    if len(crowded):
        last = np.partition(scores[crowded], -most - 1, axis=1)[:, -most - 1]
        near[crowded] = scores[crowded] >= last[:, None]
    flat = np.flatnonzero(near)
    rows, columns = np.divmod(flat, scores.shape[1])
    return rows, columns, best[rows] - scores.reshape(-1)[flat]


def _at_most(who: np.ndarray, lists: np.ndarray, below: np.ndarray, most: int) -> _Met:
    """Of each row the nearest list, `most` more, and those equal to the last of them.

    who: (H,) ascending.
    """
    crowded = np.flatnonzero(np.bincount(who) > most + 1)
    if not len(crowded):
        return who, lists, below
    limits = np.full(who[-1] + 1, np.iinfo(np.int64).max)
    limits[crowded] = 0
    some = np.flatnonzero(limits[who] == 0)
    order = some[np.argsort(who[some] << 32 | below[some])]
    last = order[ranks_within(who[order]) == most]
    limits[who[last]] = below[last]
    kept = below <= limits[who]
    return who[kept], lists[kept], below[kept]


def _routes(rows: np.ndarray, met: _Met, reach: Reach, length: float) -> Routes:
    """The nearest list of each row, of equals the first, and visits to the others."""
    who, lists, below = met
    nearest = np.flatnonzero(below == 0)
    _, firsts = np.unique(who[nearest], return_index=True)
    homes = nearest[firsts]  # (N,)
    gaps = (below / (lengths_of(rows) * length)[who]).astype(np.float16)
    visits = gaps <= _limit(reach)  # as it will be asked, and not as it was computed
    visits[homes] = False
    counts = np.bincount(who[visits], minlength=len(rows))
    return Routes(
        lists[homes].astype(np.int32),
        bounds_of(counts),
        lists[visits].astype(np.int32),
        gaps[visits],
    )
