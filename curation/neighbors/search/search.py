"""The k nearest rows of each query, with exact scores (ties: smallest id).

`Look` tasks compare the queries of one partition with the rows of another and keep what may be
among the k nearest; `Rank` tasks, one a partition of queries, score those exactly and choose.
Q queries, N rows, D width, K neighbours, H candidates.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.neighbors.kernels.products import FLOAT32, Products
from curation.neighbors.kernels.selection import ranks_within
from curation.neighbors.kernels.threads import side_by_side
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.row_files import RowFiles, map_array, write_array
from curation.neighbors.rows.vectors import exact_similarities
from curation.stage import Engine

_QUERIES = 1 << 10
_TILE = 1 << 13
_PAIRS = 1 << 15
_CROWD = 64
"""Candidates a query, beyond four times k, from which on they are thinned out exactly."""


@dataclass(frozen=True)
class Search:
    """A search of arranged queries in the arranged rows of a pool."""

    rows: RowFiles
    queries: RowFiles
    k: int
    folder: str
    products: Products = FLOAT32

    def looked_path(self, item: int) -> str:
        """File of one `Look` task."""
        return storage.join(self.folder, "looked", f"{item:06d}.bin")

    def ranked_path(self, kind: str, partition: int) -> str:
        """File of one `Rank` task: "positions" or "similarities"."""
        return storage.join(self.folder, "ranked", f"{kind}-{partition:06d}.bin")

    def nearest(self, partition: int) -> tuple[np.ndarray, np.ndarray]:
        """(Q, K) int64 positions, -1 where there are fewer, and (Q, K) float32 cosines."""
        shape = (self.queries.size(partition), self.k)
        positions = map_array(self.ranked_path("positions", partition), "int64", 0, shape)
        path = self.ranked_path("similarities", partition)
        return positions, map_array(path, "float32", 0, shape)


@dataclass(frozen=True)
class Found:
    """Candidates of queries."""

    queries: np.ndarray
    """(H,) int64: position of the query."""
    positions: np.ndarray
    """(H,) int64: position of the row."""
    scores: np.ndarray
    """(H,) float32: cosines."""

    @classmethod
    def joined(cls, parts: list["Found"]) -> "Found":
        """All candidates of some parts."""
        none = np.empty(0, np.int64)
        parts = [cls(none, none, none.astype(np.float32)), *parts]
        names = ("queries", "positions", "scores")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def take(self, which: np.ndarray | slice) -> "Found":
        """Some of the candidates, by mask, number or run."""
        return Found(self.queries[which], self.positions[which], self.scores[which])

    def between(self, first: int, stop: int) -> "Found":
        """Those of some queries, of candidates that are sorted by query."""
        return self.take(slice(*np.searchsorted(self.queries, [first, stop])))

    def ranks(self) -> np.ndarray:
        """(H,) int64: 0, 1, … inside each run of one query."""
        return ranks_within(self.queries)

    def possible(self, k: int, band: float) -> "Found":
        """Those that may be among the k nearest of their query, given the largest error.

        They come sorted by query, nearest first.
        """
        found = self.take(np.argsort(_nearest_first(self.queries, self.scores)))
        floor = found.floors(k, int(found.queries.max(initial=-1)) + 1)
        return found.take(found.scores >= floor[found.queries] - np.float32(2 * band))

    def floors(self, k: int, num_queries: int) -> np.ndarray:
        """(Q,) float32: score of each query's k-th candidate, -inf where there are fewer.

        Of candidates that are sorted by query, nearest first.
        """
        floors = np.full(num_queries, -np.inf, np.float32)
        kth = self.ranks() == k - 1
        floors[self.queries[kth]] = self.scores[kth]
        return floors

    def surely(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries with at least k candidates (Q,) int64, and the score of the k-th (Q,)."""
        order = np.argsort(_nearest_first(self.queries, self.scores))
        kth = order[ranks_within(self.queries[order]) == k - 1]
        return self.queries[kth], self.scores[kth]

    def possible_of_any(self, k: int, band: float) -> "Found":
        """The same, for queries of any number."""
        known, numbered = np.unique(self.queries, return_inverse=True)
        few = Found(numbered, self.positions, self.scores).possible(k, band)
        return Found(known[few.queries], few.positions, few.scores)

    def write(self, path: str, queries: RowFiles) -> None:
        """Write candidates by the partition of their query, with an offset table."""
        found = self.take(np.argsort(self.queries, kind="stable"))
        bounds = np.searchsorted(found.queries, queries.starts).astype(np.int64)  # (P + 1,)
        write_array(path, bounds, found.queries, found.positions, found.scores)

    @classmethod
    def read(cls, path: str, partition: int, queries: RowFiles) -> "Found":
        """Candidates for the queries of one partition."""
        head = 8 * (queries.num_partitions + 1)
        bounds = map_array(path, "int64", 0, (head // 8,))
        start, stop, total = (int(bounds[i]) for i in (partition, partition + 1, -1))
        shape = (stop - start,)
        return cls(
            map_array(path, "int64", head + 8 * start, shape),
            map_array(path, "int64", head + 8 * (total + start), shape),
            map_array(path, "float32", head + 16 * total + 4 * start, shape),
        )


def _nearest_first(queries: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(H,) int64: one number a candidate, in the order of query, then of falling score.

    One number sorts several times as fast as two. queries: (H,) below 2^31; scores: (H,) float32.
    """
    bits = (-scores).view(np.int32)
    ordered = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)  # as the floats are ordered
    return (queries.astype(np.int64) << 32) + ordered


def search_exhaustively(search: Search, engine: Engine) -> None:
    """Compare every query with every row: the exact reference, for small inputs."""
    shape = (search.queries.num_partitions, search.rows.num_partitions)
    pairs = tuple((int(a), int(b)) for a, b in np.ndindex(*shape))
    looked = storage.join(search.folder, "looked")
    run_file_tasks(engine, _Look(search, pairs), len(pairs), looked, "look for neighbours")
    items = tuple(
        tuple(item for item, pair in enumerate(pairs) if pair[0] == partition)
        for partition in range(shape[0])
    )
    finish_search(search, items, engine)


def finish_search(search: Search, items: tuple[tuple[int, ...], ...], engine: Engine) -> None:
    """Choose the nearest of what `Look` tasks found. items: their numbers, by query partition."""
    ranked = storage.join(search.folder, "ranked")
    run_file_tasks(engine, _Rank(search, items), len(items), ranked, "rank neighbours")


@dataclass(frozen=True)
class _Look(FileTask[None, dict[str, Any]]):
    """Candidates for the queries of one partition among the rows of another."""

    search: Search
    pairs: tuple[tuple[int, int], ...]

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        of_queries, of_rows = self.pairs[item]
        search, products = self.search, self.search.products
        queries = products.prepare(search.queries.vectors(of_queries))
        rows = products.prepare(search.rows.vectors(of_rows))
        base, start = search.queries.starts[of_queries], search.rows.starts[of_rows]
        parts = []
        for first in range(0, len(queries), _QUERIES):
            found = nearest_in(products, queries[first : first + _QUERIES], rows, search.k)
            numbers = found.queries + (base + first)
            parts.append(thinned(search, Found(numbers, found.positions + start, found.scores)))
        found = Found.joined(parts)
        path = search.looked_path(item)
        found.write(path, search.queries)
        return TaskResult([path], {"candidates": len(found.queries)})


def nearest_in(
    products: Products,
    queries: Any,
    rows: Any,
    k: int,
    floor: np.ndarray | None = None,
    *,
    roughly: bool = False,
) -> Found:
    """What may be among the k nearest rows of each query; numbers instead of positions.

    queries: (Q, D), rows: (N, D), both prepared. floor: (Q,) float32, what the k-th nearest
    surely reaches, known from other rows, -inf where nothing is known. roughly: as if products
    were exact.
    """
    slack = np.float32(0 if roughly else 2 * products.band(rows.shape[1]))
    found = Found.joined([])
    floor = np.full(len(queries), -np.inf, np.float32) if floor is None else floor.copy()
    for first in range(0, len(rows), _TILE):
        block = rows[first : first + _TILE]
        cosines = products.scores(queries, block)
        unknown = np.flatnonzero(np.isneginf(floor))
        if len(unknown) and len(block) >= k:
            floor[unknown] = products.kth_highest(products.rows(cosines, unknown), k)
        bound = np.nextafter(floor - slack, np.float32(-np.inf))
        a, b, scores = products.higher(cosines, bound)
        part = Found(a, b + first, scores)
        if len(rows) <= _TILE:
            return part
        found = Found.joined([found, part]).possible(k, float(slack) / 2)
        floor = np.maximum(floor, found.floors(k, len(floor)))
    return found


def thinned(search: Search, found: Found) -> Found:
    """In a crowd of equals: keep exactly the k nearest, so that few candidates remain."""
    _, counts = np.unique(found.queries, return_counts=True)
    if counts.max(initial=0) <= 4 * search.k + _CROWD:
        return found
    return exactly_nearest(search, found)


@dataclass(frozen=True)
class _Rank(FileTask[None, None]):
    """The k nearest rows of the queries of one partition."""

    search: Search
    items: tuple[tuple[int, ...], ...]
    """`Look` tasks that met each partition of queries."""

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        search, start = self.search, self.search.queries.starts[item]
        paths = [search.looked_path(one) for one in self.items[item]]
        looked = [Found.read(path, item, search.queries) for path in paths]
        band = search.products.band(search.rows.width)
        shape = (search.queries.size(item), search.k)
        positions, similarities = np.full(shape, -1, np.int64), np.full(shape, np.nan, np.float32)

        def rank(first: int) -> None:
            found = Found.joined([part.between(first, first + _QUERIES) for part in looked])
            found = exactly_nearest(search, found.possible_of_any(search.k, band))
            rows, ranks = found.queries - start, found.ranks()
            positions[rows, ranks] = found.positions
            similarities[rows, ranks] = found.scores

        side_by_side(rank, range(start, start + shape[0], _QUERIES))
        write_array(search.ranked_path("positions", item), positions)
        write_array(search.ranked_path("similarities", item), similarities)
        return TaskResult(
            [search.ranked_path(kind, item) for kind in ("positions", "similarities")], None
        )


def exactly_nearest(search: Search, found: Found) -> Found:
    """The k nearest of the candidates, scored exactly, sorted by query and rank."""
    exact = np.empty(len(found.queries), np.float32)

    def score(start: int) -> None:
        some = slice(start, start + _PAIRS)
        queries = search.queries.gather("vectors", found.queries[some])
        rows = search.rows.gather("vectors", found.positions[some])
        exact[some] = exact_similarities(queries, rows)

    side_by_side(score, range(0, len(exact), _PAIRS))
    scored = Found(found.queries, found.positions, exact)
    best = scored.take(_ranked(scored, search.rows))
    return best.take(best.ranks() < search.k)


def _ranked(found: Found, rows: RowFiles) -> np.ndarray:
    """(H,) int64: an order by query, then by falling score, then by id."""
    keys = _nearest_first(found.queries, found.scores)
    order = np.argsort(keys, kind="stable")
    same = np.append(np.diff(keys[order]) == 0, False)  # as the one that follows
    tied = np.flatnonzero(same | np.roll(same, 1))
    if len(tied):  # few: only their ids are read
        among = order[tied]
        ids = rows.gather("ids", found.positions[among]).view(">u8")  # (T, 2)
        order[tied] = among[np.lexsort((ids[:, 1], ids[:, 0], keys[among]))]
    return order
