"""Coarse centroids in two levels: trained on a sample, and searched from the top down.

A row meets the G groups, then the lists of the few groups nearest to it: 600 products instead of
4,000. Lists are numbered so that those of one group, and groups that lie near each other, follow
one another: what a partition's visitors need then lies in few places.
N rows, D width, G groups, L lists, V visits of a row.
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
from curation.neighbors.row_files import map_array, write_array
from curation.neighbors.threads import in_threads
from curation.neighbors.vectors import unit_rows

_ROWS_AT_ONCE = 1 << 13
_ROWS_PER_THREAD = 1 << 15
_BLOCK = 64
_GROWTH = ((8, 4), (32, 3), (96, 2), (0, 12))
"""Rows a centroid (0: all), and passes over them at most."""
_SETTLED = 0.02
"""Share of the rows: when fewer than these change their centroid, training ends."""
_FLAT = 1 << 14
"""Up to so many lists there is one level: two lose neighbours where rows form no large groups."""


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

        if num_lists <= _FLAT:
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

    @property
    def num_lists(self) -> int:
        """Lists of all groups."""
        return len(self.lists)

    def route(
        self, vectors: np.ndarray, num_lists: int, num_groups: int, threads: int = 1
    ) -> np.ndarray:
        """(N, num_lists) int32: nearest lists of each row, nearest first, -1 where there are fewer.

        vectors: (N, D). Only lists of the `num_groups` nearest groups are looked at.
        """

        def of_block(start: int) -> np.ndarray:
            rows = quantize_rows(vectors[start : start + _ROWS_AT_ONCE])
            if len(self.groups) == 1:
                return self._route_flat(rows, num_lists)
            return self._route(rows, num_lists, num_groups)

        found = np.full((len(vectors), num_lists), -1, np.int32)
        starts = range(0, len(vectors), _ROWS_AT_ONCE)
        for start, some in zip(starts, in_threads(of_block, starts, threads), strict=True):
            found[start : start + len(some), : some.shape[1]] = some
        return found

    def _route_flat(self, rows: np.ndarray, num_lists: int) -> np.ndarray:
        """(N, num_lists) int32: the nearest of all lists."""
        num_lists = min(num_lists, self.num_lists)
        step = max(64, (1 << 21) // self.num_lists)
        parts = [
            highest(integer_products(rows[start : start + step], self.lists), num_lists)
            for start in range(0, len(rows), step)
        ]
        return np.concatenate(parts).astype(np.int32)

    def _route(self, rows: np.ndarray, num_lists: int, num_groups: int) -> np.ndarray:
        import torch

        num_groups = min(num_groups, len(self.groups))
        near = integer_products(rows, self.groups).topk(num_groups, dim=1).indices.numpy()
        longest = int(np.diff(self.list_starts).max())
        scores = torch.full((len(rows), num_groups * longest), -(2**31), dtype=torch.int32)
        table = scores.view(len(rows), num_groups, longest)
        for group in range(len(self.groups)):
            first, stop = self.list_starts[group : group + 2]
            who, slot = np.nonzero(near == group)
            if len(who):
                found = integer_products(rows[who], self.lists[first:stop])
                table[torch.from_numpy(who), torch.from_numpy(slot), : stop - first] = found
        best = scores.topk(min(num_lists, scores.shape[1]), dim=1)
        columns, values = best.indices.numpy(), best.values.numpy()
        owner = np.take_along_axis(near, columns // longest, axis=1)
        lists = self.list_starts[owner] + columns % longest
        return np.asarray(np.where(values == -(2**31), -1, lists), np.int32)


@dataclass(frozen=True)
class CoarseRouter(Router):
    """Routes rows by trained coarse centroids in a file."""

    path: str
    width: int
    num_groups: int
    num_lists: int
    num_visits: int
    groups_met: int
    """Groups whose lists a row is compared with."""
    threads: int = 1
    """Threads of one worker."""

    @classmethod
    def written(
        cls, path: str, coarse: Coarse, num_visits: int, groups_met: int, threads: int = 1
    ) -> "CoarseRouter":
        """Write centroids to a file, and give the router that reads them."""
        write_array(path, coarse.list_starts.astype(np.int64), coarse.groups, coarse.lists)
        count, width = coarse.groups.shape
        return cls(path, width, count, coarse.num_lists, num_visits, groups_met, threads)

    def open(self) -> Coarse:
        """Load the centroids."""
        head, size = 8 * (self.num_groups + 1), self.num_groups * self.width
        return Coarse(
            np.asarray(map_array(self.path, "int8", head, (self.num_groups, self.width))),
            np.asarray(map_array(self.path, "int8", head + size, (self.num_lists, self.width))),
            np.asarray(map_array(self.path, "int64", 0, (self.num_groups + 1,))),
        )

    def lists(self, ids: np.ndarray, vectors: np.ndarray, opened: Any) -> np.ndarray:
        """(N, 1 + V) int32: the nearest list, then those visited."""
        found: np.ndarray = opened.route(
            vectors, 1 + self.num_visits, self.groups_met, self.threads
        )
        return found


def grown_centroids(
    rows: np.ndarray, count: int, rng: np.random.Generator, threads: int
) -> np.ndarray:
    """(C, D) float32: spherical k-means on a sample that grows while centroids settle.

    A pass over few rows moves centroids as far as one over many, as long as they are far from
    their places; the last passes see all rows, until few of them change their centroid.
    rows: (N, D) in random order.
    """
    quantized = quantize_rows(rows)
    centroids = unit_rows(rows[:count]).astype(np.float32)
    for per_centroid, passes in _GROWTH:
        some = slice(0, per_centroid * count if per_centroid else len(rows))
        centroids = _moved(rows[some], quantized[some], centroids, passes, rng, threads)
    return centroids


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

    return in_threads(of_block, _blocks(len(rows)), threads)


def _nearest(quantized: np.ndarray, centroids: np.ndarray, threads: int) -> np.ndarray:
    """(N,) int32: the nearest centroid of each row. quantized: (N, D) int8."""
    codes = quantize_centroids(centroids)
    blocks = _blocks(len(quantized))
    found = in_threads(lambda block: nearest_centroids(quantized[block], codes), blocks, threads)
    return np.concatenate(list(found))


def _blocks(num_rows: int) -> list[slice]:
    starts = range(0, max(1, num_rows), _ROWS_PER_THREAD)
    return [slice(start, min(num_rows, start + _ROWS_PER_THREAD)) for start in starts]


def highest(scores: Any, count: int) -> np.ndarray:
    """(N, count) int64: columns of the highest scores of each row, highest first.

    Where there are many columns, only blocks of them whose maximum is among the highest are
    sorted: the others cannot hold one. scores: (N, C) tensor.
    """
    import torch

    blocks = scores.shape[1] // _BLOCK
    if blocks <= 2 * count:
        return np.asarray(scores.topk(count, dim=1).indices)
    whole = scores[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))  # (N, B, 64)
    chosen = whole.amax(dim=2).topk(count, dim=1).indices  # (N, count)
    inside = whole.gather(1, chosen[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    columns = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK)).flatten(1)
    rest = torch.arange(blocks * _BLOCK, scores.shape[1]).expand(len(scores), -1)
    inside = torch.cat([inside, scores[:, blocks * _BLOCK :]], dim=1)
    best = inside.topk(count, dim=1).indices
    return np.asarray(torch.cat([columns, rest], dim=1).gather(1, best))


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
