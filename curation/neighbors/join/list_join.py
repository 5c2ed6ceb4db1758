"""The join by lists: every row meets the residents of its own list and of the lists it visits.

A task takes one partition and goes through its lists in order, some at a time: their residents
and visitors are read once, prepared once, and compared list by list. So a task holds a few
thousand rows, however large the partition.
M rows held at a time, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from curation import storage
from curation.neighbors.index.probes import Probes, invert
from curation.neighbors.join.join import Join, Joined, finish_join, write_found
from curation.neighbors.join.pairs import Candidates, PairCollector
from curation.neighbors.kernels.components import spanning_edges
from curation.neighbors.kernels.threads import in_threads
from curation.neighbors.rows.file_tasks import FileTask, TaskResult
from curation.neighbors.rows.row_files import RowReader
from curation.stage import Engine

_ROWS_HELD = 1 << 15
_TILE = 1 << 12
_ROWS_TOGETHER = 1 << 8
"""Rows of short lists that are multiplied at once: small products cost their call."""


def join_by_lists(join: Join, margin: float, engine: Engine, threads: int = 0) -> Joined:
    """Compare rows that share a list, or one of which visits the list of the other.

    margin: how far a visited list may be.
    """
    folder = storage.join(join.folder, "visits")
    visits = invert(join.files, join.unique_rows, margin, folder, engine)
    meet = _MeetLists(join, visits, threads)
    return finish_join(join, meet, join.files.num_partitions, engine)


_Bounds = tuple[int, int, int, bool]
"""Of each list: its first resident, its first visitor, its end; whether residents meet."""
_Meeting = tuple[np.ndarray, np.ndarray, bool]
"""Positions of residents and of visitors that meet them; whether residents meet, too."""
_Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(H,) each: rows, rows behind them, approximate cosines."""


@dataclass(frozen=True)
class _Chunk:
    """Some lists, one after the other: residents, then visitors of each."""

    positions: np.ndarray
    """(M,) int64; a row stands there once for each list that it is in."""
    bounds: list[_Bounds]


@dataclass(frozen=True)
class _MeetLists(FileTask[Any, dict[str, Any]]):
    """All pairs of a resident with a resident or a visitor, in the lists of one partition."""

    join: Join
    probes: Probes
    threads: int

    def open(self) -> RowReader:
        return RowReader(self.join.files)

    def __call__(self, item: int, opened: RowReader) -> TaskResult[dict[str, Any]]:
        edges, candidates = [np.empty((0, 2), np.int64)], [Candidates.empty()]
        num_pairs = 0
        work = partial(self._meet, opened)
        for some_edges, some, count in in_threads(work, self._chunks(item), self.threads):
            edges.append(some_edges)
            candidates.append(some)
            num_pairs += count
        return write_found(
            self.join,
            item,
            spanning_edges(np.concatenate(edges)),
            Candidates.joined(candidates).possible_of_any(self.join.k),
            num_pairs,
        )

    def _meet(self, reader: RowReader, chunk: _Chunk) -> tuple[np.ndarray, Candidates, int]:
        """Edges, candidates and the number of pairs of one chunk; rows are positions."""
        products = self.join.products
        raw = reader.gather(chunk.positions)  # (M, D)
        prepared = products.prepare(raw)
        band = products.band(raw.shape[1])
        k = self.join.k
        collector = PairCollector(len(raw), self.join.threshold, raw.__getitem__, k)
        for lists in short_together(chunk.bounds):
            pairs = self._in_one if len(lists) == 1 else self._in_few
            for a, b, scores in pairs(prepared, lists, collector.bound(band)):
                collector.add(a, b, scores, band)
        some = collector.candidates()
        rows, twins = chunk.positions[some.rows], chunk.positions[some.twins]
        found = Candidates(rows, twins, some.scores, some.bands)
        return chunk.positions[collector.edges()], found.possible_of_any(k), collector.num_pairs

    def _in_one(self, prepared: Any, lists: list[_Bounds], bound: float) -> Iterator[_Pairs]:
        """Pairs in one list, block by block."""
        first, visitors, end, meet = lists[0]
        for left in range(first, visitors, _TILE):
            block = prepared[left : min(left + _TILE, visitors)]
            for right in range(left if meet else visitors, end, _TILE):
                others = prepared[right : min(right + _TILE, end)]
                a, b, scores = self.join.products.above(block, others, bound)
                new = a + left < b + right  # residents meet each other once
                yield a[new] + left, b[new] + right, scores[new]

    def _in_few(self, prepared: Any, lists: list[_Bounds], bound: float) -> Iterator[_Pairs]:
        """Pairs in each of some short lists that follow one another: those of two are left out."""
        firsts, visitors, ends, meet = (np.array(side) for side in zip(*lists, strict=True))
        numbers = np.arange(firsts[0], ends[-1])
        owners = np.searchsorted(ends, numbers, "right")
        residents = numbers < visitors[owners]
        meeting = ~residents | meet[owners]  # whether a row meets residents at all
        left = np.flatnonzero(residents)
        block, products = prepared[firsts[0] : ends[-1]], self.join.products
        a, b, scores = products.above(products.rows(block, left), block, bound)
        a = left[a]
        new = (owners[a] == owners[b]) & (a < b) & meeting[b]
        yield a[new] + firsts[0], b[new] + firsts[0], scores[new]

    def _chunks(self, item: int) -> Iterator[_Chunk]:
        """Runs of lists that are held at once; a list too long to be held comes in pieces."""
        starts, residents, visit_starts, visitors = self._lists(item)
        parts: list[np.ndarray] = []
        bounds: list[_Bounds] = []
        end = 0
        for one in range(len(starts) - 1):
            own = residents[starts[one] : starts[one + 1]]
            others = visitors[visit_starts[one] : visit_starts[one + 1]]
            for left, right, meet in self._meetings(own, others):
                if parts and end + len(left) + len(right) > _ROWS_HELD:
                    yield _Chunk(np.concatenate(parts), bounds)
                    parts, bounds, end = [], [], 0
                parts += [left, right]
                bounds.append((end, end + len(left), end + len(left) + len(right), meet))
                end = bounds[-1][2]
        if parts:
            yield _Chunk(np.concatenate(parts), bounds)

    def _meetings(self, residents: np.ndarray, visitors: np.ndarray) -> Iterator[_Meeting]:
        """Pieces of one list, without pairs of two rows that are apart."""
        if self.join.apart is None:
            yield from pieces(residents, visitors)
            return
        old = self.join.rows_apart(residents)
        yield from pieces(residents[~old], np.concatenate([residents[old], visitors]))
        new_visitors = visitors[~self.join.rows_apart(visitors)]
        yield from pieces(residents[old], new_visitors, meet=False)

    def _lists(self, item: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Residents and visitors of all lists of a partition, and where each list begins."""
        files = self.join.files
        numbers = np.arange(files.list_starts[item], files.list_starts[item + 1] + 1)
        rows = self.join.unique_rows(item)
        lists = np.asarray(files.rows(item)["list"])[rows]
        visited, visitors = self.probes.of(item)
        return (
            np.searchsorted(lists, numbers),
            rows + files.starts[item],
            np.searchsorted(visited, numbers),
            visitors,
        )


def short_together(lists: list[_Bounds]) -> Iterator[list[_Bounds]]:
    """Runs of lists that have few rows together; a longer one is alone."""
    run: list[_Bounds] = []
    for one in lists:
        if run and one[2] - run[0][0] > _ROWS_TOGETHER:
            yield run
            run = []
        run.append(one)
    if run:
        yield run


def pieces(residents: np.ndarray, visitors: np.ndarray, *, meet: bool = True) -> Iterator[_Meeting]:
    """Cut a list into pieces no longer than what is held at once; one that fits is one piece.

    Every pair of a resident and a visitor, and of two residents where they `meet`, stands in
    exactly one piece.
    """
    if len(residents) + len(visitors) <= _ROWS_HELD:
        if len(residents):
            yield residents, visitors, meet
        return
    half = _ROWS_HELD // 2
    for start in range(0, len(residents), half):
        own = residents[start : start + half]
        others = np.concatenate([residents[start + half :], visitors]) if meet else visitors
        yield own, others[:half], meet
        for first in range(half, len(others), half):
            yield own, others[first : first + half], False
