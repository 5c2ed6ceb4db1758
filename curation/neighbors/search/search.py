"""The k nearest rows of each query, with exact scores (ties: smallest id).

`_FindCandidates` tasks compare the queries of one partition with the rows of another and keep what
may be among the k nearest; `_Rescore` tasks, one a partition of queries, score those exactly and
choose. Q queries, K neighbors, H candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from curation import storage
from curation.neighbors.kernels.products import FLOAT32, Products
from curation.neighbors.kernels.threads import side_by_side
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.rows.vectors import exact_similarities
from curation.neighbors.search.candidates import QueryHits, nearest_in, sort_keys
from curation.stage import Engine

_QUERIES = 1 << 10
"""Queries whose products with a tile of rows are held."""
_PAIRS = 1 << 15
"""Candidates whose vectors are held to be scored exactly."""
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

    @property
    def candidates_folder(self) -> str:
        """Of the files of candidates."""
        return storage.join(self.folder, "candidates")

    def candidates_path(self, item: int) -> str:
        """File of the candidates that one task found."""
        return storage.join(self.candidates_folder, f"{item:06d}.bin")

    def nearest_path(self, partition: int) -> str:
        """File of columns "positions" and "similarities": see `nearest`."""
        return storage.join(self.folder, "nearest", f"{partition:06d}.bin")

    def nearest(self, partition: int) -> tuple[np.ndarray, np.ndarray]:
        """(Q, K) int64 positions, -1 where there are fewer, and (Q, K) float32 cosines."""
        file = ColumnFile.open(self.nearest_path(partition))
        return file["positions"], file["similarities"]


def search_exhaustively(search: Search, engine: Engine) -> None:
    """Compare every query with every row: the exact reference, for small inputs."""
    shape = (search.queries.num_partitions, search.rows.num_partitions)
    pairs = tuple((int(a), int(b)) for a, b in np.ndindex(*shape))
    task = _FindCandidates(search, pairs)
    run_file_tasks(engine, task, len(pairs), search.candidates_folder, "compare with seeds")
    items = np.arange(len(pairs)).reshape(shape)
    rescore(search, items.tolist(), engine)


def rescore(search: Search, items: Sequence[Sequence[int]], engine: Engine) -> None:
    """Choose the nearest of the candidates. items: which tasks found some, by query partition."""
    task = _Rescore(search, tuple(map(tuple, items)))
    run_file_tasks(engine, task, len(items), storage.join(search.folder, "nearest"), "re-score")


@dataclass(frozen=True)
class _FindCandidates(FileTask[None, None]):
    """Candidates for the queries of one partition among the rows of another."""

    search: Search
    pairs: tuple[tuple[int, int], ...]
    """Partitions of queries and of rows that each item compares."""

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        of_queries, of_rows = self.pairs[item]
        search, products = self.search, self.search.products
        queries = products.prepare(search.queries.vectors(of_queries))
        rows = products.prepare(search.rows.vectors(of_rows))
        base, start = search.queries.starts[of_queries], search.rows.starts[of_rows]
        parts = []
        for first in range(0, len(queries), _QUERIES):
            found = nearest_in(products, queries[first : first + _QUERIES], rows, search.k)
            numbers, positions = found.queries + (base + first), found.positions + start
            parts.append(thinned(search, QueryHits(numbers, positions, found.scores)))
        path = search.candidates_path(item)
        QueryHits.joined(parts).write(path, search.queries)
        return TaskResult([path], None)


def thinned(search: Search, found: QueryHits) -> QueryHits:
    """In a crowd of equals: keep exactly the k nearest, so that few candidates remain."""
    _, counts = np.unique(found.queries, return_counts=True)
    crowded = counts.max(initial=0) > 4 * search.k + _CROWD
    return exactly_nearest(search, found) if crowded else found


@dataclass(frozen=True)
class _Rescore(FileTask[None, None]):
    """The k nearest rows of the queries of one partition."""

    search: Search
    items: tuple[tuple[int, ...], ...]
    """Tasks that found candidates of each partition of queries."""

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        search, start = self.search, self.search.queries.starts[item]
        paths = map(search.candidates_path, self.items[item])
        candidates = [QueryHits.read(path, item) for path in paths]
        band = search.products.band(search.rows.width)
        shape = (search.queries.size(item), search.k)
        positions, similarities = np.full(shape, -1, np.int64), np.full(shape, np.nan, np.float32)

        def choose(first: int) -> None:
            some = [part.between(first, first + _QUERIES) for part in candidates]
            best = exactly_nearest(search, QueryHits.joined(some).possible(search.k, band))
            where = best.queries - start, best.ranks()
            positions[where], similarities[where] = best.positions, best.scores

        side_by_side(choose, range(start, start + shape[0], _QUERIES))
        path = search.nearest_path(item)
        write_columns(path, {"positions": positions, "similarities": similarities})
        return TaskResult([path], None)


def exactly_nearest(search: Search, found: QueryHits) -> QueryHits:
    """The k nearest of the candidates, scored exactly, sorted by query and rank."""
    exact = np.empty(len(found.queries), np.float32)

    def score(start: int) -> None:
        some = slice(start, start + _PAIRS)
        queries = search.queries.gather("vectors", found.queries[some])
        rows = search.rows.gather("vectors", found.positions[some])
        exact[some] = exact_similarities(queries, rows)

    side_by_side(score, range(0, len(exact), _PAIRS))
    scored = QueryHits(found.queries, found.positions, exact)
    best = scored.take(_ranked(scored, search.rows))
    return best.take(best.ranks() < search.k)


def _ranked(hits: QueryHits, rows: RowFiles) -> np.ndarray:
    """(H,) int64: an order by query, then by falling score, then by id."""
    keys = sort_keys(hits.queries, hits.scores)
    order = np.argsort(keys, kind="stable")
    same = np.append(np.diff(keys[order]) == 0, False)  # as the one that follows
    tied = np.flatnonzero(same | np.roll(same, 1))
    if len(tied):  # few: only their ids are read
        among = order[tied]
        ids = rows.gather("ids", hits.positions[among]).view(">u8")  # (T, 2)
        order[tied] = among[np.lexsort((ids[:, 1], ids[:, 0], keys[among]))]
    return order
