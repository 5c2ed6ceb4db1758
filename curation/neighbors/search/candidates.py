"""Candidates of queries: rows that may be among the k nearest of a query, by fast products.

Q queries, N rows, D width, H candidates, P partitions of queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation.neighbors.kernels.products import Products
from curation.neighbors.kernels.selection import ranks_within
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.row_files import RowFiles

_TILE = 1 << 13
"""Rows that queries meet at a time."""
_COLUMNS = ("queries", "positions", "scores")


@dataclass(frozen=True)
class QueryHits:
    """Pairs of a query and a row."""

    queries: np.ndarray
    """(H,) int64: position of the query."""
    positions: np.ndarray
    """(H,) int64: position of the row."""
    scores: np.ndarray
    """(H,) float32: cosines."""

    @classmethod
    def joined(cls, parts: Sequence["QueryHits"]) -> "QueryHits":
        """All hits of some parts."""
        none = np.empty(0, np.int64)
        parts = [cls(none, none, none.astype(np.float32)), *parts]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS))

    def take(self, which: np.ndarray | slice) -> "QueryHits":
        """Some of the hits, by mask, number or slice."""
        return QueryHits(self.queries[which], self.positions[which], self.scores[which])

    def between(self, first: int, stop: int) -> "QueryHits":
        """Those of some queries, of hits that are sorted by query."""
        return self.take(slice(*np.searchsorted(self.queries, [first, stop])))

    def nearest_first(self) -> "QueryHits":
        """The same, sorted by query, then by falling score."""
        return self.take(np.argsort(sort_keys(self.queries, self.scores)))

    def ranks(self) -> np.ndarray:
        """(H,) int64: 0, 1, … inside each run of one query."""
        return ranks_within(self.queries)

    def kth(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries with at least k hits (Q,) int64, and the score of the k-th (Q,) float32.

        Of hits that are sorted nearest first.
        """
        kth = self.ranks() == k - 1
        return self.queries[kth], self.scores[kth]

    def possible(self, k: int, band: float) -> "QueryHits":
        """Those that may be among the k nearest of their query, sorted nearest first.

        band: the largest error of a score.
        """
        hits = self.nearest_first()
        ranks = hits.ranks()
        runs = np.cumsum(ranks == 0) - 1  # (H,) number of the query among those that have hits
        floors = np.full(len(hits.queries), -np.inf, np.float32)
        kth = ranks == k - 1
        floors[runs[kth]] = hits.scores[kth]
        return hits.take(hits.scores >= floors[runs] - np.float32(2 * band))

    def write(self, path: str, queries: RowFiles) -> None:
        """Write them by the partition of their query."""
        hits = self.take(np.argsort(self.queries, kind="stable"))
        bounds = np.searchsorted(hits.queries, queries.starts)  # (P + 1,)
        columns = {name: getattr(hits, name) for name in _COLUMNS}
        write_columns(path, {"bounds": bounds, **columns})

    @classmethod
    def read(cls, path: str, partition: int) -> "QueryHits":
        """Those of the queries of one partition."""
        file = ColumnFile.open(path)
        start, stop = map(int, file["bounds"][partition : partition + 2])
        return cls(*file.read(_COLUMNS, start, stop))


def sort_keys(queries: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(H,) int64: one number a hit, in the order of query, then of falling score.

    One number sorts several times as fast as two. queries: (H,) below 2^31; scores: (H,) float32.
    """
    bits = (-scores).view(np.int32)
    ordered = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)  # as the floats are ordered
    return (queries.astype(np.int64) << 32) + ordered


def nearest_in(
    products: Products,
    queries: Any,
    rows: Any,
    k: int,
    floor: np.ndarray | None = None,
    *,
    exact: bool = False,
) -> QueryHits:
    """What may be among the k nearest rows of each query; numbers instead of positions.

    queries: (Q, D), rows: (N, D), both prepared. floor: (Q,) float32, the least score of the k-th
    nearest, known from other rows, -inf where nothing is known. exact: take products for exact.
    """
    slack = np.float32(0 if exact else 2 * products.band(rows.shape[1]))
    hits = QueryHits.joined([])
    floor = np.full(len(queries), -np.inf, np.float32) if floor is None else floor.copy()
    for first in range(0, len(rows), _TILE):
        block = rows[first : first + _TILE]
        cosines = products.scores(queries, block)
        unknown = np.flatnonzero(np.isneginf(floor))
        if len(unknown) and len(block) >= k:
            floor[unknown] = products.kth_highest(products.rows(cosines, unknown), k)
        bound = np.nextafter(floor - slack, np.float32(-np.inf))
        numbers, columns, scores = products.higher(cosines, bound)
        part = QueryHits(numbers, columns + first, scores)
        if len(rows) <= _TILE:
            return part
        hits = QueryHits.joined([hits, part]).possible(k, float(slack) / 2)
        reached, kth = hits.kth(k)
        floor[reached] = np.maximum(floor[reached], kth)
    return hits
