"""The search by lists: every query meets the rows of the lists nearest to it.

`_Sample` finds the neighbours of some queries in all rows, and `_Measure` how far these queries
must go visiting for the recall; `_Route` finds the lists of all queries, `_SetFloors` what each
query surely reaches in its nearest list, so that `_LookInLists` tasks, which go through the lists
of one partition, keep few candidates.
Q queries, N rows, K neighbours, S steps of the gap, H candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.clustering import hash_ids
from curation.neighbors.coarse import CoarseRouter
from curation.neighbors.recall import first_enough, gap_steps, lists_within
from curation.neighbors.routes import Reach, Routes
from curation.neighbors.row_files import write_array
from curation.neighbors.search import Found, Search, finish_search, nearest_in
from curation.neighbors.steps import Done, Work, run_steps
from curation.neighbors.threads import in_threads
from curation.neighbors.visits import Visits
from curation.stage import Engine

_MEAN_LISTS = 1024
"""Lists of a query at most, on average; also no more than a quarter of all."""
_MOST_LISTS = 1 << 13
_ROWS_HELD = 1 << 15
_QUERIES_HELD = 1 << 16
"""Queries up to which all are held ready, in every worker."""
_CANDIDATES_WRITTEN = 1 << 18
"""Candidates of a partition that are written as they are; more are thinned out first."""
_SAMPLED = 512


@dataclass(frozen=True)
class ListSearch:
    """A search in rows that are arranged by lists."""

    search: Search
    router: CoarseRouter
    recall: float
    seed: int
    threads: int

    def routes_path(self, partition: int) -> str:
        """File of the routes of the queries of one partition."""
        return storage.join(self.search.folder, "routes", f"{partition:06d}.bin")

    def routes(self, partition: int) -> Routes:
        """Lists of the queries of one partition."""
        return Routes.read(self.routes_path(partition), self.search.queries.size(partition))

    def reach(self, gap: float) -> Reach:
        """How far queries go visiting."""
        return Reach(gap, _MOST_LISTS, self.router.reach.groups)

    def run(self, engine: Engine) -> dict[str, Any]:
        """Search; give the figures of the report."""
        search = self.search
        partitions, items = search.queries.num_partitions, search.rows.num_partitions
        sample, measured = _Sample(self), storage.join(search.folder, "measured")
        run_steps(engine, sample, items, f"{search.folder}/sample", "compare sampled queries")
        figures = run_steps(engine, _Measure(sample), 1, measured, "measure the recall")[0]
        route = _Route(self, figures["gap"])
        run_steps(engine, route, partitions, f"{search.folder}/routes", "find the lists of queries")
        floors = _SetFloors(self, self._visits("nearest", engine, at_home=True))
        run_steps(engine, floors, items, f"{search.folder}/floors", "look into the nearest lists")
        look = _LookInLists(self, self._visits("visits", engine), floors)
        looked = storage.join(search.folder, "looked")
        run_steps(engine, look, items, looked, "look for neighbours")
        finish_search(search, tuple(tuple(range(items)) for _ in range(partitions)), engine)
        return figures

    def _visits(self, name: str, engine: Engine, *, at_home: bool = False) -> Visits:
        """The lists of every query, or only the nearest, turned around."""
        partitions = self.search.queries.num_partitions
        visits = Visits(self.search.rows, storage.join(self.search.folder, name), partitions)
        work = _Invert(self, visits, at_home)
        run_steps(engine, work, partitions, visits.folder, "turn visits around")
        return visits


@dataclass(frozen=True)
class _Route(Work):
    """The lists of the queries of one partition."""

    of: ListSearch
    gap: float

    def open(self) -> Any:
        return self.of.router.open()

    def __call__(self, item: int, opened: Any) -> Done:
        vectors = self.of.search.queries.vectors(item)
        path, reach = self.of.routes_path(item), self.of.reach(self.gap)
        opened.route(vectors, reach, self.of.threads).write(path)
        return Done([path])


@dataclass(frozen=True)
class _Invert(Work):
    """The visits of the queries of one partition, by list; their nearest list is one."""

    of: ListSearch
    visits: Visits
    at_home: bool

    def __call__(self, item: int, opened: Any) -> Done:
        routes, start = self.of.routes(item), self.of.search.queries.starts[item]
        lists, queries = routes.own, np.arange(len(routes))
        if not self.at_home:
            lists = np.concatenate([lists, routes.lists])
            queries = np.concatenate([queries, routes.visitors])
        self.visits.write(item, lists, queries + start)
        return Done([self.visits.path(item)])


@dataclass(frozen=True)
class _Sample(Work):
    """The k nearest rows of sampled queries in one partition, found exhaustively."""

    of: ListSearch

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
        vectors, start = search.rows.vectors(item), search.rows.starts[item]

        def of_block(first: int) -> Found:
            rows = products.prepare(vectors[first : first + _ROWS_HELD])
            found = nearest_in(products, queries, rows, search.k)
            return Found(found.queries, found.positions + first, found.scores)

        blocks = range(0, len(vectors), _ROWS_HELD)
        found = Found.joined(list(in_threads(of_block, blocks, self.of.threads)))
        found = found.possible(search.k, 0.0)  # near enough to say in which lists they lie
        found = Found(positions[found.queries], found.positions + start, found.scores)
        lists = np.asarray(search.rows.rows(item)["list"])[found.positions - start]
        write_array(self.path(item), found.queries, found.positions, lists, found.scores)
        return Done([self.path(item)])

    def nearest(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the sampled queries, one for each of their neighbours, and its list."""
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
        return best.queries[chosen], np.concatenate(lists)[order][chosen]


@dataclass(frozen=True)
class _Measure(Work):
    """The gap that the recall needs on sampled queries, and what it gives."""

    sample: _Sample

    def open(self) -> Any:
        return self.sample.of.router.open()

    def __call__(self, item: int, opened: Any) -> Done:
        of = self.sample.of
        queries, lists = self.sample.nearest()
        if not len(queries):
            return Done([], {"gap": 0.0, "measured_recall": None, "sampled_neighbours": 0})
        known, numbers = np.unique(queries, return_inverse=True)
        vectors = of.search.queries.gather("vectors", known)
        routes = opened.route(vectors, of.reach(np.inf), of.threads)
        most = min(_MEAN_LISTS, 16 + of.router.num_lists // 4) * len(known)
        gaps = gap_steps(routes.gap_at(most - 1))
        steps = np.searchsorted(gaps, routes.gaps_to(numbers, lists))
        cells = np.bincount(
            numbers * (len(gaps) + 1) + steps, minlength=len(known) * (len(gaps) + 1)
        )
        step, met, error = first_enough(cells.reshape(len(known), -1), of.recall)
        gap = float(gaps[step])
        facts = {
            "gap": gap,
            "lists_met": round(lists_within(routes, gap), 2),
            "measured_recall": met,
            "recall_error": error,
            "sampled_neighbours": len(queries),
        }
        return Done([], facts)


@dataclass(frozen=True)
class _Lists:
    """The lists of one partition, and the queries that come to each."""

    starts: np.ndarray
    """(L + 1,) first resident of each list, as a row of the partition."""
    bounds: np.ndarray
    """(L + 1,) first visit of each list."""
    visitors: np.ndarray
    """(V,) int64 positions of the queries, by list."""

    def chunks(self) -> Iterator[range]:
        """Runs of lists whose residents and visitors are held at once."""
        sizes = np.diff(self.starts) + np.diff(self.bounds)
        first = 0
        while first < len(sizes):
            held = np.cumsum(sizes[first:])
            stop = first + max(1, int(np.searchsorted(held, _ROWS_HELD, "right")))
            yield range(first, stop)
            first = stop


@dataclass(frozen=True)
class _Look(Work):
    """What tasks share that go through the lists of one partition of the rows."""

    of: ListSearch
    visits: Visits

    def lists(self, item: int) -> _Lists:
        files = self.of.search.rows
        numbers = np.arange(files.list_starts[item], files.list_starts[item + 1] + 1)
        starts = np.searchsorted(np.asarray(files.rows(item)["list"]), numbers)
        visited, visitors = self.visits.of(item)
        return _Lists(starts, np.searchsorted(visited, numbers), visitors)

    def prepared_queries(self) -> Any:
        """All queries ready for products, where they are few; None where they are many."""
        queries = self.of.search.queries
        if queries.num_rows > _QUERIES_HELD:
            return None
        parts = [queries.vectors(partition) for partition in range(queries.num_partitions)]
        return self.of.search.products.prepare(np.concatenate(parts))

    def blocks(
        self, item: int, lists: _Lists, chunk: range, prepared: Any
    ) -> Iterator[tuple[np.ndarray, Any, Any, int]]:
        """Of each list: its queries' positions, both sides prepared, its first row's position.

        prepared: of all queries, or None.
        """
        search, products = self.of.search, self.of.search.products
        first, stop = lists.bounds[chunk.start], lists.bounds[chunk.stop]
        visitors = places = lists.visitors[first:stop]
        if prepared is None:
            visited, places = np.unique(visitors, return_inverse=True)
            prepared = products.prepare(search.queries.gather("vectors", visited))
        start = int(lists.starts[chunk.start])
        rows = search.rows.vectors(item)[start : int(lists.starts[chunk.stop])]
        residents = products.prepare(rows)
        for number in chunk:
            own = slice(int(lists.bounds[number] - first), int(lists.bounds[number + 1] - first))
            here = slice(int(lists.starts[number]) - start, int(lists.starts[number + 1]) - start)
            if own.start == own.stop or here.start == here.stop:
                continue
            queries = products.rows(prepared, places[own])
            position = search.rows.starts[item] + start + here.start
            yield visitors[own], queries, residents[here], position


@dataclass(frozen=True)
class _SetFloors(_Look):
    """What each query surely reaches, from its nearest list: (V,) int64 and (V,) float32."""

    def path(self, item: int) -> str:
        return storage.join(self.of.search.folder, "floors", f"floors-{item:06d}.bin")

    def all(self) -> np.ndarray:
        """(Q,) float32 of all queries, -inf where the nearest list has fewer rows than k."""
        search = self.of.search
        floors = np.full(search.queries.num_rows, -np.inf, np.float32)
        for item in range(search.rows.num_partitions):
            data = storage.read_bytes(self.path(item))
            count = len(data) // 12
            known = np.frombuffer(data, np.int64, count)
            floors[known] = np.frombuffer(data, np.float32, count, 8 * count)
        return floors

    def open(self) -> Any:
        return self.prepared_queries()

    def __call__(self, item: int, opened: Any) -> Done:
        lists, search = self.lists(item), self.of.search

        def of_chunk(chunk: range) -> list[tuple[np.ndarray, np.ndarray]]:
            return [
                (own, search.products.kth_highest(queries, rows, search.k))
                for own, queries, rows, _ in self.blocks(item, lists, chunk, opened)
                if len(rows) >= search.k
            ]

        parts = [(np.empty(0, np.int64), np.empty(0, np.float32))]
        for found in in_threads(of_chunk, lists.chunks(), self.of.threads):
            parts += found
        queries, floors = (np.concatenate(side) for side in zip(*parts, strict=True))
        write_array(self.path(item), queries, floors)
        return Done([self.path(item)])


@dataclass(frozen=True)
class _LookInLists(_Look):
    """Candidates in the lists of one partition, for the queries that visit them."""

    floors: _SetFloors

    def open(self) -> tuple[np.ndarray, Any]:
        return self.floors.all(), self.prepared_queries()

    def __call__(self, item: int, opened: tuple[np.ndarray, Any]) -> Done:
        lists, search = self.lists(item), self.of.search
        surely, prepared = opened

        def of_chunk(chunk: range) -> Found:
            parts = []
            for own, queries, rows, start in self.blocks(item, lists, chunk, prepared):
                found = nearest_in(search.products, queries, rows, search.k, surely[own])
                parts.append(Found(own[found.queries], found.positions + start, found.scores))
            return Found.joined(parts)

        parts = list(in_threads(of_chunk, lists.chunks(), self.of.threads))
        found = Found.joined(parts)
        if len(found.queries) > _CANDIDATES_WRITTEN:
            found = found.possible_of_any(search.k, search.products.band(search.rows.width))
        path = search.looked_path(item)
        found.write(path, search.queries)
        return Done([path], {"candidates": len(found.queries)})
