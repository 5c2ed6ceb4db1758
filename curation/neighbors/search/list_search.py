"""The search by lists: every query meets the rows of the lists nearest to it.

Tasks that go through the lists of one partition first find how near the k-th row of every query is
at least, in its few nearest lists, and the k nearest rows of sampled queries among all. From these
follows the probe margin that the recall needs. Then all queries meet the lists within it.
Q queries, K neighbors, H hits, L lists of a partition.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.neighbors.index.probe_margin import narrowest_margin
from curation.neighbors.index.probes import Probes
from curation.neighbors.index.quantizer import CoarseQuantizer, QuantizerRouter
from curation.neighbors.kernels.id_hashes import hash_ids
from curation.neighbors.kernels.threads import in_threads
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.routes import ProbeLimits
from curation.neighbors.search.candidates import QueryHits, nearest_in
from curation.neighbors.search.search import Search, rescore
from curation.stage import Engine, Opened

logger = logging.getLogger(__name__)

_MEAN_PROBES = 1024
"""Lists of a query at most, on average; also no more than half of all."""
_MOST_PROBES = 1 << 13
"""Lists of one query at most."""
_ROWS_HELD = 1 << 15
"""Rows and probes whose vectors a thread holds."""
_QUERIES_HELD = 1 << 16
"""Queries up to which all are held ready, in every worker."""
_CANDIDATES_WRITTEN = 1 << 20
"""Candidates of a partition that are written as they are; more are thinned out first."""
_SAMPLED, _SHARE_SAMPLED = (512, 2048), 1 / 20
"""Queries at least and at most whose neighbors are sought in all rows, and that share of them."""
_NEAR_LISTS = 8
"""Lists nearest to a query that say how near its k-th row is at least."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class ListSearch:
    """A search in rows that are arranged by lists."""

    search: Search
    router: QuantizerRouter
    recall: float
    """Share of the queries that are to find all of their k nearest rows."""
    seed: int
    threads: int

    def limits(self, margin: float) -> ProbeLimits:
        """Which lists queries probe."""
        return ProbeLimits(margin, _MOST_PROBES, self.router.limits.groups)

    def run(self, engine: Engine) -> Figures:
        """Search; give the figures of the report."""
        search, items = self.search, self.search.rows.num_partitions
        nearest = ProbeLimits(np.inf, _NEAR_LISTS - 1, self.router.limits.groups)
        sample = _SampleNeighbors(self, self._probes("near", nearest, engine))
        run_file_tasks(engine, sample, items, sample.folder, "compare sampled seeds")
        measured = storage.join(search.folder, "measured")
        (figures,) = run_file_tasks(engine, _Measure(sample), 1, measured, "measure the recall")
        probes = self._probes("probes", self.limits(figures["probe_margin"]), engine)
        find = _FindCandidates(self, probes, sample)
        run_file_tasks(engine, find, items, search.candidates_folder, "compare with lists")
        rescore(search, [range(items)] * search.queries.num_partitions, engine)
        if figures["measured_recall"] is not None and figures["measured_recall"] < self.recall:
            logger.warning(
                "%.3f of the seeds find all of their %d nearest where %.3g was asked: their "
                "neighbors lie in too many lists; comparison.method all finds every one",
                figures["measured_recall"],
                search.k,
                self.recall,
            )
        return figures

    def _probes(self, name: str, limits: ProbeLimits, engine: Engine) -> Probes:
        """The lists of every query, by the partition that these lie in."""
        count = self.search.queries.num_partitions
        probes = Probes(self.search.rows, storage.join(self.search.folder, name), count)
        task = _Route(self, limits, probes)
        run_file_tasks(engine, task, count, probes.folder, "find the lists of seeds")
        return probes


@dataclass(frozen=True)
class _Route(FileTask[CoarseQuantizer, None]):
    """The lists of the queries of one partition, the nearest among them."""

    plan: ListSearch
    limits: ProbeLimits
    probes: Probes

    def open(self) -> CoarseQuantizer:
        return self.plan.router.open()

    def __call__(self, item: int, opened: CoarseQuantizer) -> TaskResult[None]:
        queries = self.plan.search.queries
        routes = opened.route(queries.vectors(item), self.limits, self.plan.threads)
        lists = np.concatenate([routes.home, routes.probes])
        rows = np.concatenate([np.arange(len(routes)), routes.probing_rows])
        self.probes.write(item, lists, rows + queries.starts[item])
        return TaskResult([self.probes.path(item)], None)


@dataclass(frozen=True)
class _Lists:
    """The lists of one partition, and the queries that probe each."""

    starts: np.ndarray
    """(L + 1,) first resident of each list, as a row of the partition."""
    bounds: np.ndarray
    """(L + 1,) first probe of each list."""
    queries: np.ndarray
    """Positions of the queries, list by list: int64."""

    def chunks(self) -> Iterator[range]:
        """Lists that follow each other and whose residents and queries are held at once."""
        sizes = np.diff(self.starts) + np.diff(self.bounds)
        first = 0
        while first < len(sizes):
            held = np.cumsum(sizes[first:])
            stop = first + max(1, int(np.searchsorted(held, _ROWS_HELD, "right")))
            yield range(first, stop)
            first = stop


@dataclass(frozen=True)
class _ThroughLists(FileTask[Opened, None]):
    """What tasks share that go through the lists of one partition of the rows."""

    plan: ListSearch
    probes: Probes

    def lists(self, item: int) -> _Lists:
        files = self.plan.search.rows
        numbers = np.arange(files.list_starts[item], files.list_starts[item + 1] + 1)
        starts = np.searchsorted(np.asarray(files.rows(item)["list"]), numbers)
        probed, queries = self.probes.of(item)
        return _Lists(starts, np.searchsorted(probed, numbers), queries)

    def prepared_queries(self) -> Any:
        """All queries, ready for products, or None where they are too many."""
        queries = self.plan.search.queries
        if queries.num_rows > _QUERIES_HELD:
            return None
        parts = [queries.vectors(partition) for partition in range(queries.num_partitions)]
        return self.plan.search.products.prepare(np.concatenate(parts))

    def residents(self, item: int, lists: _Lists, chunk: range) -> Any:
        """The rows of some lists, prepared."""
        start, stop = int(lists.starts[chunk.start]), int(lists.starts[chunk.stop])
        return self.plan.search.products.prepare(self.plan.search.rows.vectors(item)[start:stop])

    def meetings(
        self, lists: _Lists, chunk: range, prepared: Any
    ) -> Iterator[tuple[np.ndarray, Any, slice]]:
        """Of each list: its queries' positions, these prepared, and which residents are its.

        prepared: of all queries, or None.
        """
        search, products = self.plan.search, self.plan.search.products
        first, stop = lists.bounds[chunk.start], lists.bounds[chunk.stop]
        queries = places = lists.queries[first:stop]
        if prepared is None:
            distinct, places = np.unique(queries, return_inverse=True)
            prepared = products.prepare(search.queries.gather("vectors", distinct))
        bounds, starts = lists.bounds - first, lists.starts - lists.starts[chunk.start]
        for number in chunk:
            own = slice(int(bounds[number]), int(bounds[number + 1]))
            here = slice(int(starts[number]), int(starts[number + 1]))
            if own.start < own.stop and here.start < here.stop:
                yield queries[own], products.rows(prepared, places[own]), here


@dataclass(frozen=True)
class _Sampled:
    """What every partition is asked about."""

    prepared: Any
    """All queries, or None where they are too many."""
    positions: np.ndarray
    """(Q,) int64 of the sampled queries."""
    questions: Any
    """These, prepared."""


@dataclass(frozen=True)
class _SampleNeighbors(_ThroughLists[_Sampled]):
    """Floors of all queries, and the nearest rows of sampled ones among all.

    A floor is the score of the k-th row in the lists nearest to a query. The rows of the sampled
    ones are found by products alone: they only say in which lists neighbors lie.
    """

    @property
    def folder(self) -> str:
        return storage.join(self.plan.search.folder, "sampled")

    def path(self, kind: str, item: int) -> str:
        return storage.join(self.folder, f"{kind}-{item:06d}.bin")

    def open(self) -> _Sampled:
        search, positions = self.plan.search, self._positions()
        vectors = search.queries.gather("vectors", positions)
        return _Sampled(self.prepared_queries(), positions, search.products.prepare(vectors))

    def _positions(self) -> np.ndarray:
        """(Q,) int64: positions of the queries with the smallest hash."""
        files = self.plan.search.queries
        ids = np.concatenate([files.ids(partition) for partition in range(files.num_partitions)])
        hashes = hash_ids(ids, "search", self.plan.seed)
        size = int(np.clip(_SHARE_SAMPLED * len(ids), *_SAMPLED))
        return np.sort(np.argsort(hashes, kind="stable")[:size])

    def __call__(self, item: int, opened: _Sampled) -> TaskResult[None]:
        search, lists = self.plan.search, self.lists(item)
        products, k, start = search.products, search.k, search.rows.starts[item]

        def of_chunk(chunk: range) -> tuple[QueryHits, QueryHits]:
            residents, near = self.residents(item, lists, chunk), []
            for own, queries, here in self.meetings(lists, chunk, opened.prepared):
                best = products.highest(products.scores(queries, residents[here]), k)  # (V, K)
                owners = np.repeat(own, best.shape[1])
                near.append(QueryHits(owners, np.zeros_like(owners), best.reshape(-1)))
            found = nearest_in(products, opened.questions, residents, k, exact=True)
            positions = found.positions + (start + lists.starts[chunk.start])
            return (
                QueryHits.joined(near),
                QueryHits(opened.positions[found.queries], positions, found.scores),
            )

        parts = list(in_threads(of_chunk, lists.chunks(), self.plan.threads))
        near, found = (QueryHits.joined(side) for side in zip(*parts, strict=True))
        queries, floors = near.nearest_first().kth(k)
        write_columns(self.path("floors", item), {"queries": queries, "floors": floors})
        found = found.possible(k, 0.0)
        homes = np.asarray(search.rows.rows(item)["list"])[found.positions - start]
        columns = {"queries": found.queries, "positions": found.positions, "scores": found.scores}
        write_columns(self.path("nearest", item), {**columns, "lists": homes})
        return TaskResult([self.path(kind, item) for kind in ("floors", "nearest")], None)

    def floors(self) -> np.ndarray:
        """(Q,) float32 of all queries, -inf where their nearest lists have fewer rows than k."""
        search = self.plan.search
        floors = np.full(search.queries.num_rows, -np.inf, np.float32)
        for item in range(search.rows.num_partitions):
            file = ColumnFile.open(self.path("floors", item))
            queries = file["queries"]
            floors[queries] = np.maximum(floors[queries], file["floors"])
        return floors

    def nearest(self) -> tuple[np.ndarray, np.ndarray]:
        """Sampled queries, one for each of their k nearest rows, and its list: (H,) both."""
        search = self.plan.search
        paths = [self.path("nearest", item) for item in range(search.rows.num_partitions)]
        files = storage.gather(ColumnFile.open, paths, self.folder)
        names = ("queries", "positions", "scores", "lists")
        queries, positions, scores, lists = (
            np.concatenate([file[name] for file in files]) for name in names
        )
        order = np.lexsort((positions, -scores, queries))
        chosen = order[QueryHits(queries, positions, scores).take(order).ranks() < search.k]
        return queries[chosen], lists[chosen]


@dataclass(frozen=True)
class _Measure(FileTask[CoarseQuantizer, Figures]):
    """The margin that the recall needs on sampled queries, and what it gives."""

    sample: _SampleNeighbors

    def open(self) -> CoarseQuantizer:
        return self.sample.plan.router.open()

    def __call__(self, item: int, opened: CoarseQuantizer) -> TaskResult[Figures]:
        plan, files = self.sample.plan, self.sample.plan.search.queries
        queries, lists = self.sample.nearest()
        if not len(queries):
            return TaskResult([], {"probe_margin": 0.0, "measured_recall": None})
        known, numbers = np.unique(queries, return_inverse=True)
        routes = opened.route(files.gather("vectors", known), plan.limits(np.inf), plan.threads)
        most = min(_MEAN_PROBES, 16 + plan.router.num_lists // 2) * len(known)
        widest = routes.margin_at(most - 1)
        margins = routes.margins_to(numbers, lists)  # (H,)
        margins[margins > np.float16(widest)] = np.inf
        needed = np.zeros(len(known), np.float16)  # from which on a seed meets all its lists
        np.maximum.at(needed, numbers, margins)
        is_sample = len(known) < files.num_rows
        found = narrowest_margin(needed, plan.recall, widest, is_sample=is_sample)
        figures = {
            "probe_margin": found.margin,
            "lists_met": round(routes.lists_met(found.margin), 2),
            "measured_recall": found.recall,
            "recall_at_least": found.at_least,
            "hit_recall": float((margins <= np.float16(found.margin)).mean()),
            "sampled_seeds": len(known),
        }
        return TaskResult([], figures)


@dataclass(frozen=True)
class _FindCandidates(_ThroughLists[tuple[np.ndarray, Any]]):
    """Candidates in the lists of one partition, for the queries that probe them."""

    sample: _SampleNeighbors

    def open(self) -> tuple[np.ndarray, Any]:
        return self.sample.floors(), self.prepared_queries()

    def __call__(self, item: int, opened: tuple[np.ndarray, Any]) -> TaskResult[None]:
        lists, search = self.lists(item), self.plan.search
        floors, prepared = opened

        def of_chunk(chunk: range) -> QueryHits:
            residents, parts = self.residents(item, lists, chunk), []
            start = search.rows.starts[item] + lists.starts[chunk.start]
            for own, queries, here in self.meetings(lists, chunk, prepared):
                found = nearest_in(search.products, queries, residents[here], search.k, floors[own])
                positions = found.positions + (start + here.start)
                parts.append(QueryHits(own[found.queries], positions, found.scores))
            return QueryHits.joined(parts)

        found = QueryHits.joined(list(in_threads(of_chunk, lists.chunks(), self.plan.threads)))
        if len(found.queries) > _CANDIDATES_WRITTEN:
            found = found.possible(search.k, search.products.band(search.rows.width))
        path = search.candidates_path(item)
        found.write(path, search.queries)
        return TaskResult([path], None)
