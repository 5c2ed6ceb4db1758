"""CoarseQuantizer lists: which of them a row lives in, and which are nearly as near.

Many lists lie in groups. A row meets the centroids of all groups, then the lists of the groups
nearest to it. One that is near none of these looks for such a list in all groups by sketches, and
meets the loose lists: those of rows that are not alike to others. Lists are numbered so that those
of one group, and groups that lie near each other, follow one another: what a partition's visitors
need then lies in few places.
N rows, D width, G groups, L lists, H lists met by all rows, T visits of all rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from curation.neighbors.index.coarse_training import chain, grown_centroids
from curation.neighbors.kernels.centroid_index import ranks_of_groups
from curation.neighbors.kernels.grouping import by_group
from curation.neighbors.kernels.quantized import (
    integer_products,
    largest_of,
    lengths_of,
    nearest_centroids,
    pair_products,
    quantize_centroids,
    quantize_rows,
)
from curation.neighbors.kernels.selection import columns_near, ranks_within
from curation.neighbors.kernels.sketches import least_product, sketches_of
from curation.neighbors.kernels.threads import in_threads
from curation.neighbors.rows.routers import Router
from curation.neighbors.rows.routes import ProbeLimits, Routes, bounds_of
from curation.neighbors.rows.row_files import map_array, write_array

_UNGROUPED = 1 << 14
"""Lists up to which a row meets all of them."""
_LISTS_PER_GROUP = 64
_MOST_GROUPS_MET = 128
_ROWS_AT_ONCE = 1 << 13
_ROWS_GROUPED = 1 << 16
"""So many that each group is met by some hundreds of them: small products cost their call."""
_TILE = (1 << 8, 1 << 11)
"""Rows and lists that are multiplied at a time where all rows meet all lists of a run."""
_ROWS_SKETCHED, _LOOKED_AT = 1 << 6, 64
"""Rows that are sampled, and lists of each that may look near by their sketches."""
_PRODUCTS = 1 << 18
"""They stay in the cache of a core until those within the margin are found."""
_FEWEST_ROWS = 128
"""Fewer that meet all groups would cost as much: groups are prepared anew for every product."""
FIRST_GROUPS = 32
"""Nearest groups, in which most rows that are near a list find it."""
_MORE_GROUPS, _SHARE_OF_GROUPS = 256, 1 / 8
"""Those in which most of the others do; where that is more than a share, all groups cost less."""
_NEARLY = 0.85
"""Of the cosine of a near list: a row with such a list in its groups does not look through all."""
_VISITS_AT_ONCE = 1 << 21
"""Pairs of a row and a group that are held."""
_VERY_FIRST = 2
"""Nearest groups that say how high the others must reach."""
_ROWS_FOR_GAP = 1 << 9
_WIDEST = 8.0
"""No two cosines differ by so much, however they were rounded."""

_Met = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(H,) each: rows in ascending order, lists, and how far their product is below the highest."""
_NO_PAIRS = (np.empty(0, np.int64), np.empty(0, np.int64))
_Visit = Callable[[np.ndarray, int, np.ndarray], None]
"""What is done with some rows, the first of some lists, and their products (N, L)."""


@dataclass(frozen=True)
class CoarseQuantizer:
    """Quantized centroids of lists and of their groups, ready for products."""

    groups: np.ndarray
    """(G, D) int8."""
    lists: np.ndarray
    """(L, D) int8, ordered by group, then the loose ones."""
    list_starts: np.ndarray
    """(G + 1,) int64: first list of each group, then the first loose one."""

    @classmethod
    def of(
        cls,
        of_groups: np.ndarray,
        loose: np.ndarray,
        rng: np.random.Generator,
        threads: int = 1,
    ) -> "CoarseQuantizer":
        """Group lists and put them in order. Both: (L, D) float32, unit rows."""
        if len(of_groups) + len(loose) <= _UNGROUPED or len(loose) > _UNGROUPED:
            of_groups, loose = np.concatenate([of_groups, loose]), loose[:0]
        if len(of_groups) <= _UNGROUPED and not len(loose):
            codes = quantize_centroids(of_groups)
            return cls(codes[:1], codes[chain(of_groups)], np.array([0, len(codes)]))
        rows = quantize_rows(of_groups)
        shuffled = rows[rng.permutation(len(rows))]
        groups = grown_centroids(shuffled, 1 + len(rows) // _LISTS_PER_GROUP, rng, threads)
        groups = quantize_centroids(groups[chain(groups)])
        owners = nearest_centroids(rows, groups)
        known, owners = np.unique(owners, return_inverse=True)
        order, starts = by_group(owners, len(known))
        largest = max(largest_of(of_groups), largest_of(loose))
        last = quantize_centroids(loose[chain(loose)] if len(loose) else loose, largest)
        codes = np.concatenate([quantize_centroids(of_groups, largest)[order], last])
        return cls(groups[known], codes, starts)

    def write(self, path: str) -> None:
        """Write to a file, from which a `QuantizerRouter` reads."""
        write_array(path, self.list_starts.astype(np.int64), self.groups, self.lists)

    @property
    def has_loose(self) -> bool:
        """Whether some lists are in no group: home of rows that are near no other list."""
        return bool(self.list_starts[-1] < len(self.lists))

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

    def groups_to_meet(self, rows: np.ndarray, share: float) -> int:
        """How many groups rows must meet so that this share of them finds the nearest list.

        rows: (N, D), not trained on.
        """
        if len(self.groups) == 1:
            return 1
        codes = quantize_rows(rows)
        owners = np.searchsorted(self.list_starts, nearest_centroids(codes, self.lists), "right")
        own = np.minimum(owners, len(self.groups)) - 1
        rank = np.sort(ranks_of_groups(codes, self.groups, own))
        return min(1 + int(rank[int(share * (len(rank) - 1))]), _MOST_GROUPS_MET)

    def least_of_sketches(self, rows: np.ndarray) -> int:
        """A bound for products of sketches that rows exceed with few of the lists on average.

        Where space has a favored direction, strangers look alike, and what is gained by sketches
        would be lost by looking closer. rows: (N, D), not trained on.
        """
        sketches = sketches_of(quantize_rows(rows[:_ROWS_SKETCHED]))
        scores = integer_products(sketches, self.sketches).numpy().reshape(-1)
        most = _LOOKED_AT * len(sketches)
        return int(np.partition(scores, -most)[-most]) if most < len(scores) else -(1 << 31)

    def route(self, vectors: np.ndarray, limits: ProbeLimits, threads: int = 1) -> Routes:
        """The list of each row, and those within the margin. vectors: (N, D)."""
        length = self.length  # known before threads ask for it
        meet, step = self._meet_all, _ROWS_AT_ONCE
        if len(self.groups) > 1:
            step = _even_step(len(vectors), threads)
            by_sketches = np.isfinite(limits.near) and self.has_loose
            meet = self._meet_alike if by_sketches else self._meet_groups

        def of_block(start: int) -> Routes:
            rows = quantize_rows(vectors[start : start + step])
            lengths = lengths_of(rows) * length
            return _routes(meet(rows, lengths, limits), lengths, limits)

        return Routes.joined(list(in_threads(of_block, range(0, len(vectors), step), threads)))

    def margin_of_probes(
        self, vectors: np.ndarray, mean: float, limits: ProbeLimits, threads: int = 1
    ) -> float:
        """The margin within which rows visit so many of the lists within the margin on average."""
        vectors = vectors[:_ROWS_FOR_GAP]
        return self.route(vectors, limits, threads).margin_at(int(mean * len(vectors)))

    def _meet_all(self, rows: np.ndarray, lengths: np.ndarray, limits: ProbeLimits) -> _Met:
        """Lists within the margin of all, block by block.

        rows: (N, D) int8; lengths: (N,), a product divided by which is a cosine.
        """
        allowed = _allowed(lengths, limits)
        step, parts = max(32, _PRODUCTS // self.num_lists), []
        for start in range(0, len(rows), step):
            scores = integer_products(rows[start : start + step], self.lists).numpy()
            who, lists, below = _within(scores, allowed[start : start + step], limits.most)
            parts.append((who + start, lists, below))
        who, lists, below = (np.concatenate(part) for part in zip(*parts, strict=True))
        return who, lists, below

    def _meet_groups(self, rows: np.ndarray, lengths: np.ndarray, limits: ProbeLimits) -> _Met:
        """Lists within the margin in the nearest groups: what is highest first, then all."""
        met = _Highest(lengths, limits)
        first, every = self._near_groups(rows, np.arange(len(rows)), (_VERY_FIRST, limits.groups))
        self._meet_near(rows, self.lists, first, met.raise_to)
        self._meet_near(rows, self.lists, every, met.keep)
        return met.chosen(self.num_lists)

    def _meet_alike(self, rows: np.ndarray, lengths: np.ndarray, limits: ProbeLimits) -> _Met:
        """Near lists, by their sketches; rows that have none within the margin meet loose ones."""
        met, sketches, grouped = _Highest(lengths, limits), sketches_of(rows), self.list_starts[-1]
        near = _Near(max(limits.least, least_product(limits.near)))
        enough = limits.near * lengths
        for count in self._groups_in_turn(limits):
            lost = np.flatnonzero(met.best < enough)
            for start in range(0, len(lost), step := _VISITS_AT_ONCE // count):
                (nearest,) = self._near_groups(rows, lost[start : start + step], (count,))
                self._meet_near(sketches, self.sketches, nearest, near.keep)
                met.take(rows, self.lists, *near.taken())
        lost = np.flatnonzero(met.best < _NEARLY * enough)
        _meet_run(sketches, lost, self.sketches, range(grouped), near.keep)
        met.take(rows, self.lists, *near.taken())
        lost = np.flatnonzero(met.best < enough)
        _meet_run(rows, lost, self.lists, range(grouped, self.num_lists), met.keep)
        return met.chosen(self.num_lists)

    def _groups_in_turn(self, limits: ProbeLimits) -> tuple[int, ...]:
        """How many nearest groups rows meet, then those that are near none of their lists."""
        more = min(_MORE_GROUPS, int(_SHARE_OF_GROUPS * len(self.groups)))
        return (limits.groups, more) if more >= 2 * limits.groups else (limits.groups,)

    def _near_groups(
        self, rows: np.ndarray, who: np.ndarray, counts: tuple[int, ...]
    ) -> list[np.ndarray]:
        """Pairs of some rows and one of their so many nearest groups: row x G + group, ascending.

        who: (M,) ascending, which rows.
        """
        num_groups = len(self.groups)
        step = max(_FEWEST_ROWS, _PRODUCTS // num_groups)
        parts: list[list[np.ndarray]] = [[] for _ in counts]
        for start in range(0, len(who), step):
            some = who[start : start + step]
            scores = integer_products(rows[some], self.groups).numpy()
            for part, count in zip(parts, counts, strict=True):
                row, group = np.divmod(columns_near(scores, count), num_groups)
                part.append(some[row] * num_groups + group)
        return [np.concatenate([_NO_PAIRS[0], *part]) for part in parts]

    def _meet_near(
        self, rows: np.ndarray, lists: np.ndarray, near: np.ndarray, visit: _Visit
    ) -> None:
        """Give to `visit`, group by group: rows near it, its first list, their products.

        rows: (N, W) int8, and lists: (L, W) int8: whole or as sketches.
        """
        who, groups = np.divmod(near, len(self.groups))
        order, bounds = by_group(groups.astype(np.uint16), len(self.groups))
        who = who[order]
        for group in np.flatnonzero(np.diff(bounds)):
            first, stop = self.list_starts[group : group + 2]
            some = who[bounds[group] : bounds[group + 1]]
            visit(some, first, integer_products(rows[some], lists[first:stop]).numpy())


@dataclass(frozen=True)
class QuantizerRouter(Router):
    """Routes rows by trained coarse centroids in a file."""

    path: str
    width: int
    num_groups: int
    num_lists: int
    limits: ProbeLimits
    threads: int = 1
    """Threads of one worker."""

    def open(self) -> CoarseQuantizer:
        """Load the centroids."""
        head, size = 8 * (self.num_groups + 1), self.num_groups * self.width
        return CoarseQuantizer(  # copies: torch would copy what is mapped for every product
            np.array(map_array(self.path, "int8", head, (self.num_groups, self.width))),
            np.array(map_array(self.path, "int8", head + size, (self.num_lists, self.width))),
            np.array(map_array(self.path, "int64", 0, (self.num_groups + 1,))),
        )

    def route(self, ids: np.ndarray, vectors: np.ndarray, opened: Any) -> Routes:
        """The nearest list, and those within the margin."""
        routes: Routes = opened.route(vectors, self.limits, self.threads)
        return routes


def _meet_run(
    rows: np.ndarray, who: np.ndarray, lists: np.ndarray, run: range, visit: _Visit
) -> None:
    """Give to `visit`, block by block, some rows, and their products with a run of lists."""
    for start in range(0, len(who), _TILE[0]):
        some = who[start : start + _TILE[0]]
        for first in run[:: _TILE[1]]:
            stop = min(first + _TILE[1], run.stop)
            visit(some, first, integer_products(rows[some], lists[first:stop]).numpy())


class _Near:
    """Takes products of sketches, and keeps whose are above a bound."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._found = [_NO_PAIRS]

    def keep(self, who: np.ndarray, first: int, scores: np.ndarray) -> None:
        """Keep those that are high. who: (M,) rows; scores: (M, C) with C lists from `first`."""
        row, column = np.divmod(np.flatnonzero(scores > self._least), scores.shape[1])
        self._found.append((who[row], column + first))

    def taken(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows (H,) and lists (H,) that were kept, no longer."""
        who, lists = (np.concatenate(side) for side in zip(*self._found, strict=True))
        self._found = [_NO_PAIRS]
        return who, lists


class _Highest:
    """Takes products of rows and lists; keeps what may be within the margin of the highest."""

    def __init__(self, lengths: np.ndarray, limits: ProbeLimits) -> None:
        self.best = np.full(len(lengths), -(1 << 31), np.int64)
        """(N,): the highest so far."""
        self._allowed = _allowed(lengths, limits)
        self._reach = limits
        self._found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def raise_to(self, who: np.ndarray, first: int, scores: np.ndarray) -> None:
        """Know of some products without keeping them."""
        self.best[who] = np.maximum(self.best[who], scores.max(axis=1))

    def take(self, rows: np.ndarray, lists: np.ndarray, who: np.ndarray, which: np.ndarray) -> None:
        """Keep what the products are of pairs of a row and a list. who, which: (H,)."""
        products = pair_products(rows, who, lists, which)
        np.maximum.at(self.best, who, products)
        self._found.append((who, which, products))

    def keep(self, who: np.ndarray, first: int, scores: np.ndarray) -> None:
        """Keep those that are high. who: (M,) rows; scores: (M, C) with C lists from `first`."""
        self.raise_to(who, first, scores)
        floors, most = _as_int32(self.best[who] - self._allowed[who]), self._reach.most
        if self._reach.margin >= _WIDEST and most + 1 < scores.shape[1]:
            of_these = np.partition(scores, -most - 1, axis=1)[:, -most - 1]
            floors = np.maximum(floors, of_these)
        flat = np.flatnonzero(scores >= floors[:, None])
        row, column = np.divmod(flat, scores.shape[1])
        self._found.append((who[row], column + first, scores.reshape(-1)[flat]))

    def chosen(self, num_lists: int) -> _Met:
        """Those within the margin of the row's highest, each once."""
        who, lists, products = (np.concatenate(part) for part in zip(*self._found, strict=True))
        kept = np.flatnonzero(products >= (self.best - self._allowed)[who])
        keys = who[kept] * num_lists + lists[kept]
        order = np.argsort(keys)
        kept = kept[order[np.diff(keys[order], prepend=-1) != 0]]
        who, lists, below = who[kept], lists[kept], self.best[who[kept]] - products[kept]
        return _at_most(who, lists, below, self._reach.most)


def _limit(limits: ProbeLimits) -> np.float16:
    return np.float16(min(limits.margin, _WIDEST))


def _allowed(lengths: np.ndarray, limits: ProbeLimits) -> np.ndarray:
    """(N,) int64: how far below the highest product those within the margin may be."""
    limit = np.nextafter(_limit(limits), np.float16(np.inf))
    return np.asarray(limit * lengths).astype(np.int64)


def _even_step(num_rows: int, threads: int) -> int:
    """Rows of a block, so that all threads get as many, and few blocks."""
    rounds = -(-num_rows // (_ROWS_GROUPED * threads))
    return max(1, -(-num_rows // max(1, rounds * threads)))


def _as_int32(floors: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(floors, -(1 << 31), (1 << 31) - 1), np.int32)


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


def _routes(met: _Met, lengths: np.ndarray, limits: ProbeLimits) -> Routes:
    """The nearest list of each row, of equals the first, and visits to the others."""
    who, lists, below = met
    nearest = np.flatnonzero(below == 0)
    _, firsts = np.unique(who[nearest], return_index=True)
    homes = nearest[firsts]  # (N,)
    margins = (below / lengths[who]).astype(np.float16)
    visits = margins <= _limit(limits)  # as it will be asked, and not as it was computed
    visits[homes] = False
    counts = np.bincount(who[visits], minlength=len(lengths))
    return Routes(
        lists[homes].astype(np.int32),
        bounds_of(counts),
        lists[visits].astype(np.int32),
        margins[visits],
    )
