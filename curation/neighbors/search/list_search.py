"""The search by lists: every query meets the rows of the lists nearest to it.

`_Route` finds lists of queries. `_Survey` tasks, which go through the lists of one partition, find
what each query surely reaches in the few lists nearest to it, and the neighbours of some queries
in all rows or half of them; `_Measure` says how far these must go visiting for the recall.
`_Look` tasks then compare all queries with the lists so near, and keep few candidates.
Q queries, N rows, K neighbours, S steps of the margin, H candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.neighbors.index.probes import Probes
from curation.neighbors.index.quantizer import QuantizerRouter
from curation.neighbors.index.recall import first_enough, lists_within, margin_steps
from curation.neighbors.index.routes import ProbeLimits, Routes
from curation.neighbors.kernels.id_hashes import hash_ids
from curation.neighbors.kernels.threads import in_threads
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.row_files import write_array
from curation.neighbors.search.search import Found, Search, finish_search, nearest_in
from curation.stage import Engine

_MEAN_LISTS = 1024
"""Lists of a query at most, on average; also no more than a quarter of all."""
_MOST_LISTS = 1 << 13
_ROWS_HELD = 1 << 15
_QUERIES_HELD = 1 << 16
"""Queries up to which all are held ready, in every worker."""
_CANDIDATES_WRITTEN = 1 << 20
"""Candidates of a partition that are written as they are; more are thinned out first."""
_SAMPLED = 512
_HALVED_FROM = 16
"""Neighbours from which on half as many are sought, among every second row, where there are that
many queries: as sure an answer for half of the products."""
_SURVEYED = 8
"""Lists nearest to a query that say what it surely reaches."""


@dataclass(frozen=True)
class ListSearch:
    """A search in rows that are arranged by lists."""

    search: Search
    router: QuantizerRouter
    recall: float
    seed: int
    threads: int

    def limits(self, margin: float) -> ProbeLimits:
        """How far queries go visiting."""
        return ProbeLimits(margin, _MOST_LISTS, self.router.limits.groups)

    def run(self, engine: Engine) -> dict[str, Any]:
        """Search; give the figures of the report."""
        search = self.search
        partitions, items = search.queries.num_partitions, search.rows.num_partitions
        few = ProbeLimits(np.inf, _SURVEYED - 1, self.router.limits.groups)
        survey = _Survey(self, self._visits("near", few, engine))
        surveyed, measured = survey.folder, storage.join(search.folder, "measured")
        run_file_tasks(engine, survey, items, surveyed, "compare sampled queries")
        figures = run_file_tasks(engine, _Measure(survey), 1, measured, "measure the recall")[0]
        look = _Look(
            self, self._visits("visits", self.limits(figures["probe_margin"]), engine), survey
        )
        looked = storage.join(search.folder, "looked")
        run_file_tasks(engine, look, items, looked, "look for neighbours")
        finish_search(search, tuple(tuple(range(items)) for _ in range(partitions)), engine)
        return figures

    def _visits(self, name: str, limits: ProbeLimits, engine: Engine) -> Probes:
        """The probes of every query, turned around."""
        partitions = self.search.queries.num_partitions
        folder = storage.join(self.search.folder, name)
        route = _Route(self, limits, storage.join(folder, "routes"))
        run_file_tasks(engine, route, partitions, route.folder, "find the lists of queries")
        visits = Probes(self.search.rows, folder, partitions)
        run_file_tasks(engine, _Invert(route, visits), partitions, folder, "turn visits around")
        return visits


@dataclass(frozen=True)
class _Route(FileTask[Any, None]):
    """The lists of the queries of one partition."""

    of: ListSearch
    limits: ProbeLimits
    folder: str

    def path(self, partition: int) -> str:
        return storage.join(self.folder, f"{partition:06d}.bin")

    def routes(self, partition: int) -> Routes:
        return Routes.read(self.path(partition), self.of.search.queries.size(partition))

    def open(self) -> Any:
        return self.of.router.open()

    def __call__(self, item: int, opened: Any) -> TaskResult[None]:
        vectors = self.of.search.queries.vectors(item)
        opened.route(vectors, self.limits, self.of.threads).write(self.path(item))
        return TaskResult([self.path(item)], None)


@dataclass(frozen=True)
class _Invert(FileTask[None, None]):
    """The visits of the queries of one partition, by list; their nearest list is one."""

    route: _Route
    visits: Probes

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        routes, start = self.route.routes(item), self.route.of.search.queries.starts[item]
        lists = np.concatenate([routes.home, routes.probes])
        queries = np.concatenate([np.arange(len(routes)), routes.probing_rows])
        self.visits.write(item, lists, queries + start)
        return TaskResult([self.visits.path(item)], None)


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
class _ThroughLists(FileTask[Any, Any]):
    """What tasks share that go through the lists of one partition of the rows."""

    of: ListSearch
    visits: Probes

    def lists(self, item: int) -> _Lists:
        files = self.of.search.rows
        numbers = np.arange(files.list_starts[item], files.list_starts[item + 1] + 1)
        starts = np.searchsorted(np.asarray(files.rows(item)["list"]), numbers)
        visited, visitors = self.visits.of(item)
        return _Lists(starts, np.searchsorted(visited, numbers), visitors)

    def prepared_queries(self) -> Any:
        """All queries, ready for products, or None where they are too many."""
        queries = self.of.search.queries
        if queries.num_rows > _QUERIES_HELD:
            return None
        parts = [queries.vectors(partition) for partition in range(queries.num_partitions)]
        return self.of.search.products.prepare(np.concatenate(parts))

    def residents(self, item: int, lists: _Lists, chunk: range) -> Any:
        """The rows of a run of lists, prepared."""
        start, stop = int(lists.starts[chunk.start]), int(lists.starts[chunk.stop])
        return self.of.search.products.prepare(self.of.search.rows.vectors(item)[start:stop])

    def meetings(
        self, lists: _Lists, chunk: range, prepared: Any
    ) -> Iterator[tuple[np.ndarray, Any, slice]]:
        """Of each list: its queries' positions, these prepared, and which residents are its.

        prepared: of all queries, or None.
        """
        search, products = self.of.search, self.of.search.products
        first, stop = lists.bounds[chunk.start], lists.bounds[chunk.stop]
        visitors = places = lists.visitors[first:stop]
        if prepared is None:
            visited, places = np.unique(visitors, return_inverse=True)
            prepared = products.prepare(search.queries.gather("vectors", visited))
        start = int(lists.starts[chunk.start])
        for number in chunk:
            own = slice(int(lists.bounds[number] - first), int(lists.bounds[number + 1] - first))
            here = slice(int(lists.starts[number]) - start, int(lists.starts[number + 1]) - start)
            if own.start < own.stop and here.start < here.stop:
                yield visitors[own], products.rows(prepared, places[own]), here


@dataclass(frozen=True)
class _Survey(_ThroughLists):
    """What queries surely reach near them, and nearest rows of sampled ones in all lists.

    Those of the sampled ones are found roughly: they only say in which lists neighbours lie. Of
    many, half are sought in half of the rows: they lie as far away as the k nearest of all.
    """

    @property
    def every(self) -> int:
        """Rows of which one is compared with sampled queries."""
        search = self.of.search
        enough = search.k >= _HALVED_FROM and search.queries.num_rows >= _SAMPLED
        return 2 if enough else 1

    @property
    def sought(self) -> int:
        """How many of those rows are sought for each of these queries."""
        return self.of.search.k // self.every

    @property
    def folder(self) -> str:
        return storage.join(self.of.search.folder, "surveyed")

    def path(self, kind: str, item: int) -> str:
        return storage.join(self.folder, f"{kind}-{item:06d}.bin")

    def open(self) -> tuple[Any, np.ndarray, Any]:
        """All queries, prepared; positions (Q,) of the sampled ones, and these prepared."""
        search, sampled = self.of.search, self._sampled()
        vectors = search.queries.gather("vectors", sampled)
        return self.prepared_queries(), sampled, search.products.prepare(vectors)

    def _sampled(self) -> np.ndarray:
        """(Q,) int64: positions of the queries with the smallest hash."""
        files = self.of.search.queries
        hashes = [
            hash_ids(files.ids(partition), "search", self.of.seed)
            for partition in range(files.num_partitions)
        ]
        return np.sort(np.argsort(np.concatenate(hashes), kind="stable")[:_SAMPLED])

    def __call__(
        self, item: int, opened: tuple[Any, np.ndarray, Any]
    ) -> TaskResult[dict[str, Any]]:
        prepared, sampled, questions = opened
        search, lists = self.of.search, self.lists(item)
        products, k, start = search.products, search.k, search.rows.starts[item]

        def of_chunk(chunk: range) -> tuple[Found, Found]:
            residents, near = self.residents(item, lists, chunk), []
            for own, queries, here in self.meetings(lists, chunk, prepared):
                best = products.highest(products.scores(queries, residents[here]), k)  # (V, K)
                owners = np.repeat(own, best.shape[1])
                near.append(Found(owners, np.zeros_like(owners), best.reshape(-1)))
            first = int(lists.starts[chunk.start])
            some = np.arange(-(start + first) % self.every, len(residents), self.every)
            rows = products.rows(residents, some)
            found = nearest_in(products, questions, rows, self.sought, roughly=True)
            positions = some[found.positions] + (start + first)
            return Found.joined(near), Found(sampled[found.queries], positions, found.scores)

        parts = list(in_threads(of_chunk, lists.chunks(), self.of.threads))
        near, found = (Found.joined(list(side)) for side in zip(*parts, strict=True))
        found = found.possible_of_any(self.sought, 0.0)
        numbers = np.asarray(search.rows.rows(item)["list"])[found.positions - start]
        write_array(self.path("floors", item), *near.surely(k))
        columns = (found.queries, found.positions, numbers, found.scores)
        write_array(self.path("sample", item), *columns)
        return TaskResult([self.path(kind, item) for kind in ("floors", "sample")], {})

    def floors(self) -> np.ndarray:
        """(Q,) float32 of all queries, -inf where the nearest lists have fewer rows than k."""
        search = self.of.search
        floors = np.full(search.queries.num_rows, -np.inf, np.float32)
        for item in range(search.rows.num_partitions):
            data = storage.read_bytes(self.path("floors", item))
            count = len(data) // 12
            known = np.frombuffer(data, np.int64, count)
            reached = np.frombuffer(data, np.float32, count, 8 * count)
            floors[known] = np.maximum(floors[known], reached)
        return floors

    def nearest(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the sampled queries, one for each of their neighbours, and its list."""
        found, lists = [], []
        for item in range(self.of.search.rows.num_partitions):
            data = storage.read_bytes(self.path("sample", item))
            n = len(data) // 24
            numbers = np.frombuffer(data, np.int64, 2 * n)
            lists.append(np.frombuffer(data, np.int32, n, 16 * n))
            found.append(
                Found(numbers[:n], numbers[n:], np.frombuffer(data, np.float32, n, 20 * n))
            )
        joined = Found.joined(found)
        order = np.lexsort((joined.positions, -joined.scores, joined.queries))
        best = joined.take(order)
        chosen = best.ranks() < self.sought
        return best.queries[chosen], np.concatenate(lists)[order][chosen]


@dataclass(frozen=True)
class _Measure(FileTask[Any, dict[str, Any]]):
    """The margin that the recall needs on sampled queries, and what it gives."""

    survey: "_Survey"

    def open(self) -> Any:
        return self.survey.of.router.open()

    def __call__(self, item: int, opened: Any) -> TaskResult[dict[str, Any]]:
        of = self.survey.of
        queries, lists = self.survey.nearest()
        if not len(queries):
            return TaskResult(
                [], {"probe_margin": 0.0, "measured_recall": None, "sampled_neighbours": 0}
            )
        known, numbers = np.unique(queries, return_inverse=True)
        vectors = of.search.queries.gather("vectors", known)
        routes = opened.route(vectors, of.limits(np.inf), of.threads)
        most = min(_MEAN_LISTS, 16 + of.router.num_lists // 4) * len(known)
        margins = margin_steps(routes.margin_at(most - 1))
        steps = np.searchsorted(margins, routes.margins_to(numbers, lists))
        cells = np.bincount(
            numbers * (len(margins) + 1) + steps, minlength=len(known) * (len(margins) + 1)
        )
        step, met, error = first_enough(cells.reshape(len(known), -1), of.recall)
        margin = float(margins[step])
        facts = {
            "probe_margin": margin,
            "lists_met": round(lists_within(routes, margin), 2),
            "measured_recall": met,
            "recall_error": error,
            "sampled_neighbours": len(queries),
        }
        return TaskResult([], facts)


@dataclass(frozen=True)
class _Look(_ThroughLists):
    """Candidates in the lists of one partition, for the queries that visit them."""

    survey: _Survey

    def open(self) -> tuple[np.ndarray, Any]:
        return self.survey.floors(), self.prepared_queries()

    def __call__(self, item: int, opened: tuple[np.ndarray, Any]) -> TaskResult[dict[str, Any]]:
        lists, search = self.lists(item), self.of.search
        surely, prepared = opened

        def of_chunk(chunk: range) -> Found:
            residents, parts = self.residents(item, lists, chunk), []
            start = search.rows.starts[item] + lists.starts[chunk.start]
            for own, queries, here in self.meetings(lists, chunk, prepared):
                rows, floors = residents[here], surely[own]
                found = nearest_in(search.products, queries, rows, search.k, floors)
                positions = found.positions + (start + here.start)
                parts.append(Found(own[found.queries], positions, found.scores))
            return Found.joined(parts)

        found = Found.joined(list(in_threads(of_chunk, lists.chunks(), self.of.threads)))
        if len(found.queries) > _CANDIDATES_WRITTEN:
            found = found.possible_of_any(search.k, search.products.band(search.rows.width))
        path = search.looked_path(item)
        found.write(path, search.queries)
        return TaskResult([path], {"candidates": len(found.queries)})
