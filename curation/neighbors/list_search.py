"""The search by lists: every query meets the rows of the lists nearest to it.

`_Route` finds the lists of the queries, `_Sample` and `_Needed` measure on some queries how many
of them the recall needs, `_LookInLists` tasks go through the lists of one partition of the pool.
Q queries, N rows, K neighbours, V lists of a query, H candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.clustering import hash_ids
from curation.neighbors.coarse import CoarseRouter
from curation.neighbors.row_files import map_array, write_array
from curation.neighbors.search import Found, Search, exactly_nearest, finish_search, nearest_in
from curation.neighbors.steps import Done, Work, run_steps
from curation.neighbors.threads import limit_threads
from curation.neighbors.visits import Visits
from curation.stage import Engine

_MOST_LISTS = 64
_ROWS_HELD = 1 << 15
_SAMPLED = 256


@dataclass(frozen=True)
class ListSearch:
    """A search in rows that are arranged by lists."""

    search: Search
    router: CoarseRouter
    recall: float
    seed: int
    threads: int

    def routes_path(self, partition: int) -> str:
        """File of the lists of the queries of one partition."""
        return storage.join(self.search.folder, "routes", f"{partition:06d}.bin")

    def routes(self, partition: int) -> np.ndarray:
        """(Q, V) int32: lists of each query, nearest first, -1 for none."""
        shape = (self.search.queries.size(partition), min(_MOST_LISTS, self.router.num_lists))
        return map_array(self.routes_path(partition), "int32", 0, shape)

    def run(self, engine: Engine) -> dict[str, Any]:
        """Search; give the figures of the report."""
        search = self.search
        partitions = search.queries.num_partitions
        routes = storage.join(search.folder, "routes")
        run_steps(engine, _Route(self), partitions, routes, "find the lists of queries")
        num_lists, figures = self._lists_needed(engine)
        visits = Visits(search.rows, storage.join(search.folder, "visits"), partitions)
        run_steps(
            engine,
            _Invert(self, visits, num_lists),
            partitions,
            visits.folder,
            "turn visits around",
        )
        look = _LookInLists(self, visits)
        looked = storage.join(search.folder, "looked")
        items = search.rows.num_partitions
        run_steps(engine, look, items, looked, "look for neighbours")
        finish_search(search, tuple(tuple(range(items)) for _ in range(partitions)), engine)
        return figures

    def _lists_needed(self, engine: Engine) -> tuple[int, dict[str, Any]]:
        """Lists a query that reach the recall on sampled queries, and what they reach."""
        sample = _Sample(self)
        folder = storage.join(self.search.folder, "sample")
        run_steps(
            engine, sample, self.search.rows.num_partitions, folder, "compare sampled queries"
        )
        needed = sample.needed()  # (V + 1,)
        total = int(needed.sum())
        if not total:
            return min(16, len(needed) - 1), {"measured_recall": None, "sampled_neighbours": 0}
        met = np.cumsum(needed[:-1]) / total
        enough = np.flatnonzero(met >= self.recall)
        count = int(enough[0]) if len(enough) else len(met) - 1
        return 1 + count, {
            "lists_met": 1 + count,
            "measured_recall": float(met[count]),
            "sampled_neighbours": total,
        }


@dataclass(frozen=True)
class _Route(Work):
    """The nearest lists of the queries of one partition."""

    of: ListSearch

    def open(self) -> Any:
        return self.of.router.open()

    def __call__(self, item: int, opened: Any) -> Done:
        count = min(_MOST_LISTS, self.of.router.num_lists)
        vectors = self.of.search.queries.vectors(item)
        write_array(
            self.of.routes_path(item), opened.route(vectors, count, self.of.router.groups_met)
        )
        return Done([self.of.routes_path(item)])


@dataclass(frozen=True)
class _Invert(Work):
    """The visits of the queries of one partition, by list."""

    of: ListSearch
    visits: Visits
    num_lists: int

    def __call__(self, item: int, opened: Any) -> Done:
        lists = self.of.routes(item)[:, : self.num_lists]
        known = lists >= 0
        queries = np.arange(len(lists)) + self.of.search.queries.starts[item]
        self.visits.write(item, lists[known], np.broadcast_to(queries[:, None], lists.shape)[known])
        return Done([self.visits.path(item)])


@dataclass(frozen=True)
class _Sample(Work):
    """The k nearest rows of sampled queries in one partition, found exhaustively."""

    of: ListSearch

    def open(self) -> Any:
        if self.of.search.products.precision != "float32":
            limit_threads(self.of.threads)

    def path(self, item: int) -> str:
        return storage.join(self.of.search.folder, "sample", f"sample-{item:06d}.bin")

    def queries(self) -> np.ndarray:
        """(Q,) int64: positions of the queries with the smallest hash."""
        files = self.of.search.queries
        hashes = [
            hash_ids(files.ids(partition), "search", self.of.seed)
            for partition in range(files.num_partitions)
        ]
        return np.sort(np.argsort(np.concatenate(hashes), kind="stable")[:_SAMPLED])

    def __call__(self, item: int, opened: Any) -> Done:
        search, positions = self.of.search, self.queries()
        products = search.products
        queries = products.prepare(search.queries.gather("vectors", positions))
        parts = []
        vectors, start = search.rows.vectors(item), search.rows.starts[item]
        for first in range(0, len(vectors), _ROWS_HELD):
            rows = products.prepare(vectors[first : first + _ROWS_HELD])
            found = nearest_in(products, queries, rows, search.k)
            parts.append(Found(found.queries, found.positions + first, found.scores))
        found = Found.joined(parts).possible(search.k, products.band(search.rows.width))
        found = Found(positions[found.queries], found.positions + start, found.scores)
        found = exactly_nearest(search, found)
        lists = np.asarray(search.rows.rows(item)["list"])[found.positions - start]
        write_array(self.path(item), found.queries, found.positions, lists, found.scores)
        return Done([self.path(item)])

    def needed(self) -> np.ndarray:
        """(V + 1,) int64: neighbours that lie in the query's first, second, … list, or in none."""
        found, lists = [], []
        for item in range(self.of.search.rows.num_partitions):
            data = storage.read_bytes(self.path(item))
            n = len(data) // 24
            numbers = np.frombuffer(data, np.int64, 2 * n)
            lists.append(np.frombuffer(data, np.int32, n, 16 * n))
            found.append(
                Found(numbers[:n], numbers[n:], np.frombuffer(data, np.float32, n, 20 * n))
            )
        joined = Found.joined(found)
        order = np.lexsort((joined.positions, -joined.scores, joined.queries))
        best = joined.take(order)
        chosen = best.ranks() < self.of.search.k
        return self._count(best.queries[chosen], np.concatenate(lists)[order][chosen])

    def _count(self, queries: np.ndarray, lists: np.ndarray) -> np.ndarray:
        count = min(_MOST_LISTS, self.of.router.num_lists)
        routes = np.empty((len(queries), count), np.int32)
        for partition, where in self.of.search.queries.by_partition(queries):
            start = self.of.search.queries.starts[partition]
            routes[where] = self.of.routes(partition)[queries[where] - start]
        same = routes == lists[:, None]
        ranks = np.where(same.any(axis=1), same.argmax(axis=1), count)
        return np.bincount(ranks, minlength=count + 1)


@dataclass(frozen=True)
class _LookInLists(Work):
    """Candidates in the lists of one partition, for the queries that visit them."""

    of: ListSearch
    visits: Visits

    def open(self) -> Any:
        if self.of.search.products.precision != "float32":
            limit_threads(self.of.threads)

    def __call__(self, item: int, opened: Any) -> Done:
        search = self.of.search
        band = search.products.band(search.rows.width)
        parts = []
        known = np.unique(self.visits.of(item)[1])
        floors = np.full(len(known), -np.inf, np.float32)
        for chunk in self._chunks(item):
            found = Found.joined(list(self._look(item, *chunk, known, floors)))
            parts.append(found.possible_of_any(search.k, band))
        found = Found.joined(parts).possible_of_any(search.k, band)
        path = search.looked_path(item)
        found.write(path, search.queries)
        return Done([path], {"candidates": len(found.queries)})

    def _look(
        self,
        item: int,
        rows: slice,
        queries: list[np.ndarray],
        bounds: np.ndarray,
        known: np.ndarray,
        floors: np.ndarray,
    ) -> Iterator[Found]:
        """Candidates of the lists whose residents are `rows`, list i from bounds[i] on.

        floors: what the k-th nearest of each known query surely reaches; raised in place.
        """
        search, products = self.of.search, self.of.search.products
        visitors = np.unique(np.concatenate(queries))
        prepared = products.prepare(search.queries.gather("vectors", visitors))
        residents = products.prepare(search.rows.vectors(item)[rows])
        for number, own in enumerate(queries):
            first, stop = bounds[number] - rows.start, bounds[number + 1] - rows.start
            if not len(own) or first == stop:
                continue
            some = products.rows(prepared, np.searchsorted(visitors, own))
            places = np.searchsorted(known, own)
            floor = floors[places]
            found = nearest_in(products, some, residents[first:stop], search.k, floor)
            floors[places] = floor
            start = search.rows.starts[item] + rows.start + first
            yield Found(own[found.queries], found.positions + start, found.scores)

    def _chunks(self, item: int) -> Iterator[tuple[slice, list[np.ndarray], np.ndarray]]:
        """Runs of lists: their residents, the queries that visit each, and where each begins."""
        files = self.of.search.rows
        numbers = np.arange(files.list_starts[item], files.list_starts[item + 1] + 1)
        starts = np.searchsorted(np.asarray(files.rows(item)["list"]), numbers)
        visited, visitors = self.visits.of(item)
        bounds = np.searchsorted(visited, numbers)
        sizes = np.diff(starts) + np.diff(bounds)
        first = 0
        while first < len(sizes):
            held = np.cumsum(sizes[first:])
            stop = first + max(1, int(np.searchsorted(held, _ROWS_HELD, "right")))
            queries = [visitors[bounds[i] : bounds[i + 1]] for i in range(first, stop)]
            yield slice(int(starts[first]), int(starts[stop])), queries, starts[first : stop + 1]
            first = stop
