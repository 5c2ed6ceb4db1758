"""Coarse centroids in two levels: trained on a sample, and searched from the top down.

A row meets the G groups, then the lists of the few groups nearest to it: 600 products instead of
4,000. Lists are numbered so that those of one group, and groups that lie near each other, follow
one another: what a partition's visitors need then lies in few places.
N rows, D width, G groups, L lists, V visits of a row.
"""

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

_ROWS_AT_ONCE = 1 << 14
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
    def trained(cls, rows: np.ndarray, num_lists: int, rng: np.random.Generator) -> "Coarse":
        """Train both levels on a sample. rows: (N, D) float16 or float32, in a fixed order."""
        from curation.clustering import lloyd

        quantized = quantize_rows(rows)
        if num_lists <= _FLAT:
            few = slice(0, max(num_lists, len(rows) // 4))
            lists, _ = lloyd(rows[few], quantized[few], num_lists, 6, rng)
            lists, _ = lloyd(rows, quantized, num_lists, 3, rng, lists)
            lists = lists[_chain(lists)]
            starts = np.array([0, len(lists)])
            return cls(quantize_centroids(lists[:1]), quantize_centroids(lists), starts)
        num_groups = max(1, round(np.sqrt(num_lists)))
        few = slice(0, 256 * num_groups)
        groups, _ = lloyd(rows[few], quantized[few], num_groups, 8, rng)
        groups = groups[_chain(groups)]
        mine = nearest_centroids(quantized, quantize_centroids(groups))
        members = np.bincount(mine, minlength=len(groups))
        counts = _shares(members, num_lists)
        parts = []
        for group, count in enumerate(counts):
            own = np.flatnonzero(mine == group)
            if len(own):
                lists, _ = lloyd(rows[own], quantized[own], int(count), 6, rng)
                parts.append(lists[_chain(lists)])
            else:
                parts.append(groups[group : group + 1])
        starts = np.cumsum([0, *(len(part) for part in parts)])
        return cls(quantize_centroids(groups), quantize_centroids(np.concatenate(parts)), starts)

    @property
    def num_lists(self) -> int:
        """Lists of all groups."""
        return len(self.lists)

    def route(self, vectors: np.ndarray, num_lists: int, num_groups: int) -> np.ndarray:
        """(N, num_lists) int32: nearest lists of each row, nearest first, -1 where there are fewer.

        vectors: (N, D). Only lists of the `num_groups` nearest groups are looked at.
        """
        found = np.full((len(vectors), num_lists), -1, np.int32)
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            rows = quantize_rows(vectors[start : start + _ROWS_AT_ONCE])
            if len(self.groups) == 1:
                some = self._route_flat(rows, num_lists)
            else:
                some = self._route(rows, num_lists, num_groups)
            found[start : start + len(rows), : some.shape[1]] = some
        return found

    def _route_flat(self, rows: np.ndarray, num_lists: int) -> np.ndarray:
        """(N, num_lists) int32: the nearest of all lists."""
        num_lists = min(num_lists, self.num_lists)
        step = max(64, (1 << 21) // self.num_lists)
        parts = [
            integer_products(rows[start : start + step], self.lists).topk(num_lists, dim=1)
            for start in range(0, len(rows), step)
        ]
        return np.concatenate([best.indices.numpy() for best in parts]).astype(np.int32)

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
    threads: int = 0
    """Threads of one worker; 0 leaves torch's own number."""

    @classmethod
    def written(
        cls, path: str, coarse: Coarse, num_visits: int, groups_met: int, threads: int
    ) -> "CoarseRouter":
        """Write centroids to a file, and give the router that reads them."""
        write_array(path, coarse.list_starts.astype(np.int64), coarse.groups, coarse.lists)
        count, width = coarse.groups.shape
        return cls(path, width, count, coarse.num_lists, num_visits, groups_met, threads)

    def open(self) -> Coarse:
        """Load the centroids."""
        limit_threads(self.threads)
        head, size = 8 * (self.num_groups + 1), self.num_groups * self.width
        return Coarse(
            np.asarray(map_array(self.path, "int8", head, (self.num_groups, self.width))),
            np.asarray(map_array(self.path, "int8", head + size, (self.num_lists, self.width))),
            np.asarray(map_array(self.path, "int64", 0, (self.num_groups + 1,))),
        )

    def lists(self, ids: np.ndarray, vectors: np.ndarray, opened: Any) -> np.ndarray:
        """(N, 1 + V) int32: the nearest list, then those visited."""
        found: np.ndarray = opened.route(vectors, 1 + self.num_visits, self.groups_met)
        return found


def limit_threads(count: int) -> None:
    """Let this worker compute on so many threads; 0 leaves the library's own number."""
    import torch

    if count and torch.get_num_threads() != count:
        torch.set_num_threads(count)


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
