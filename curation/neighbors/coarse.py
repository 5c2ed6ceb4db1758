"""Coarse lists: which of them a row lives in, and which are nearly as near.

Lists lie in groups. A row meets the centroids of all groups, then the lists of the groups nearest
to it: 10,000 products instead of 200,000. How many groups that must be is measured on rows that
lie near a list. Lists are numbered so that those of one group, and groups that lie near each
other, follow one another: what a partition's visitors need then lies in few places.
N rows, D width, G groups, L lists, H lists met by all rows, T visits of all rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
from curation.neighbors.threads import in_threads

_UNGROUPED = 1 << 12
"""Lists up to which a row meets all of them."""
_LISTS_PER_GROUP = 64
_MOST_GROUPS_MET = 128
_FEWEST_ROWS = 50
_ROWS_AT_ONCE = 1 << 13
_ROWS_GROUPED = 1 << 15
"""So many that each group is met by some hundreds of them: small products cost their call."""
_PRODUCTS = 1 << 18
"""They stay in the cache of a core until those within reach are found."""
_FIRST_GROUPS = 8
"""Nearest groups, in which most rows find their own list."""
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

    @property
    def length(self) -> float:
        """Length of a list's centroid as integers: the same for all, up to rounding."""
        return float(np.sqrt(np.mean((self.lists.astype(np.float32) ** 2).sum(axis=1))))

    def groups_to_meet(self, rows: np.ndarray, cosine: float, share: float) -> int:
        """How many groups rows must meet so that this share of those near a list finds it.

        rows: (N, D), not trained on; those count whose nearest list has this cosine at least.
        """
        if len(self.groups) == 1:
            return 1
        codes = quantize_rows(rows)
        nearest = nearest_centroids(codes, self.lists)
        owners = np.searchsorted(self.list_starts, nearest, "right") - 1
        products = np.einsum("nd,nd->n", codes, self.lists[nearest], dtype=np.int64)
        near = products >= cosine * self.length * lengths_of(codes)
        if np.count_nonzero(near) < _FEWEST_ROWS:
            return min(_MOST_GROUPS_MET, len(self.groups))
        scores = integer_products(codes[near], self.groups).numpy()  # (N, G)
        own = scores[np.arange(len(scores)), owners[near]]
        rank = np.sort((scores > own[:, None]).sum(axis=1))
        wanted = 1 + int(rank[min(len(rank) - 1, int(share * len(rank)))])
        return min(wanted, _MOST_GROUPS_MET, len(self.groups))

    def route(self, vectors: np.ndarray, reach: Reach, threads: int = 1) -> Routes:
        """The list of each row, and those within reach. vectors: (N, D)."""
        length = self.length
        meet, step = self._meet_all, _ROWS_AT_ONCE
        if len(self.groups) > 1:
            meet, step = self._meet_groups, _ROWS_GROUPED

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
        """Lists within reach of those in the nearest groups: first what is highest, then all."""
        best = np.full(len(rows), -(1 << 31), np.int64)

        def raise_best(who: np.ndarray, first: int, scores: np.ndarray) -> None:
            best[who] = np.maximum(best[who], scores.max(axis=1))

        first, every = self._near_groups(rows, (min(_FIRST_GROUPS, reach.groups), reach.groups))
        self._meet_near(rows, first, raise_best)
        done = best >= reach.near * self.length * lengths_of(rows)
        count = len(self.groups)
        looked_at = np.concatenate([first[done[first // count]], every[~done[every // count]]])
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

        def keep_near(who: np.ndarray, first: int, scores: np.ndarray) -> None:
            raise_best(who, first, scores)
            floors = _as_int32(best[who] - allowed[who])
            if reach.gap >= _WIDEST and reach.most + 1 < scores.shape[1]:
                of_group = np.partition(scores, -reach.most - 1, axis=1)[:, -reach.most - 1]
                floors = np.maximum(floors, of_group)
            flat = np.flatnonzero(scores >= floors[:, None])
            row, column = np.divmod(flat, scores.shape[1])
            found.append((who[row], column + first, scores.reshape(-1)[flat]))

        self._meet_near(rows, looked_at, keep_near)
        who, lists, products = (np.concatenate(part) for part in zip(*found, strict=True))
        kept = np.flatnonzero(products >= (best - allowed)[who])
        kept = kept[np.argsort(who[kept] * self.num_lists + lists[kept])]
        who, lists, below = who[kept], lists[kept], best[who[kept]] - products[kept]
        return _at_most(who, lists, below, reach.most)

    def _near_groups(self, rows: np.ndarray, counts: tuple[int, ...]) -> list[np.ndarray]:
        """Pairs of a row and a group near it, as row x G + group: for each of some counts.

        About the so many nearest groups of each row.
        """
        step = max(32, _PRODUCTS // len(self.groups))
        parts: list[list[np.ndarray]] = [[] for _ in counts]
        for start in range(0, len(rows), step):
            scores = integer_products(rows[start : start + step], self.groups).numpy()
            for part, count in zip(parts, counts, strict=True):
                part.append(columns_near(scores, count) + start * len(self.groups))
        return [np.concatenate(part) for part in parts]

    def _meet_near(
        self,
        rows: np.ndarray,
        near: np.ndarray,
        visit: Callable[[np.ndarray, int, np.ndarray], None],
    ) -> None:
        """Give to `visit`, group by group: rows near it, its first list, their products."""
        who, groups = np.divmod(near, len(self.groups))
        order = np.argsort(groups.astype(np.uint16), kind="stable")
        who, bounds = who[order], np.searchsorted(groups[order], np.arange(len(self.groups) + 1))
        for group in np.flatnonzero(np.diff(bounds)):
            first, stop = self.list_starts[group : group + 2]
            some = who[bounds[group] : bounds[group + 1]]
            visit(some, first, integer_products(rows[some], self.lists[first:stop]).numpy())


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


def _as_int32(floors: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(floors, -(1 << 31)), np.int32)


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
    order = some[np.lexsort((below[some], who[some]))]
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
