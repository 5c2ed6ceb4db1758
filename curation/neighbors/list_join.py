"""The join by lists: every row meets the residents of its own list and of the lists it visits.

A task takes one partition and goes through its lists in order, some at a time: their residents
and visitors are read once, prepared once, and compared list by list. So a task holds a few
thousand rows, however large the partition.
M rows held at a time, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.components import spanning_edges
from curation.neighbors.coarse import limit_threads
from curation.neighbors.join import Join, Joined, finish_join, write_found
from curation.neighbors.pairs import Candidates, PairCollector
from curation.neighbors.steps import Done, Work
from curation.neighbors.visits import Visits, invert
from curation.stage import Engine

_ROWS_HELD = 1 << 15
_TILE = 1 << 12


def join_by_lists(join: Join, num_visits: int, engine: Engine, threads: int = 0) -> Joined:
    """Compare rows that share a list, or one of which visits the list of the other."""
    folder = storage.join(join.folder, "visits")
    visits = invert(join.files, join.unique_rows, num_visits, folder, engine)
    meet = _MeetLists(join, visits, threads)
    return finish_join(join, meet, join.files.num_partitions, engine)


@dataclass(frozen=True)
class _List:
    """One list: where its residents and visitors stand among the rows held."""

    residents: np.ndarray
    visitors: np.ndarray
    among: bool = True
    """Whether residents meet each other, too."""


def _without_pairs_apart(one: _List, apart: np.ndarray) -> list[_List]:
    """A list in two parts, in which no two rows that are apart meet. apart: (M,) bool."""
    old, old_visitors = apart[one.residents], apart[one.visitors]
    new_to_all = np.concatenate([one.residents[old], one.visitors])
    return [
        _List(one.residents[~old], new_to_all),
        _List(one.residents[old], one.visitors[~old_visitors], among=False),
    ]


@dataclass(frozen=True)
class _MeetLists(Work):
    """All pairs of a resident with a resident or a visitor, in the lists of one partition."""

    join: Join
    visits: Visits
    threads: int

    def open(self) -> Any:
        if self.join.products.precision != "float32":
            limit_threads(self.threads)

    def __call__(self, item: int, opened: Any) -> Done:
        edges, candidates = [np.empty((0, 2), np.int64)], [Candidates.empty()]
        num_pairs = 0
        for positions, lists in self._chunks(item):
            found = self._meet(positions, lists)
            num_pairs += found.num_pairs
            edges.append(positions[found.edges()])
            some = found.candidates()
            rows, twins = positions[some.rows], positions[some.twins]
            candidates.append(Candidates(rows, twins, some.scores, some.bands))
        return write_found(
            self.join,
            item,
            spanning_edges(np.concatenate(edges)),
            Candidates.joined(candidates).possible_of_any(),
            num_pairs,
        )

    def _meet(self, positions: np.ndarray, lists: list[_List]) -> PairCollector:
        raw = self.join.files.gather("vectors", positions)  # (M, D)
        products = self.join.products
        prepared = products.prepare(raw)
        band = products.band(raw.shape[1])
        collector = PairCollector(len(raw), self.join.threshold, raw.__getitem__)
        for one in lists:
            everyone = np.concatenate([one.residents, one.visitors])
            for left in range(0, len(one.residents), _TILE):
                rows = one.residents[left : left + _TILE]
                block = products.rows(prepared, rows)
                first = left if one.among else len(one.residents)
                for right in range(first, len(everyone), _TILE):
                    columns = everyone[right : right + _TILE]
                    others = products.rows(prepared, columns)
                    a, b, scores = products.above(block, others, collector.bound(band))
                    new = a + left < b + right  # residents meet each other once
                    collector.add(rows[a[new]], columns[b[new]], scores[new], band)
        return collector

    def _chunks(self, item: int) -> Iterator[tuple[np.ndarray, list[_List]]]:
        """Positions of the rows to hold, sorted, and the lists to be compared among them."""
        starts, residents, visit_starts, visitors = self._lists(item)
        sizes = np.diff(starts) + np.diff(visit_starts)
        first = 0
        while first < len(sizes):
            held = np.cumsum(sizes[first:])
            count = max(1, int(np.searchsorted(held, _ROWS_HELD, "right")))
            stop = first + count
            yield self._chunk(
                [residents[starts[i] : starts[i + 1]] for i in range(first, stop)],
                [visitors[visit_starts[i] : visit_starts[i + 1]] for i in range(first, stop)],
            )
            first = stop

    def _chunk(
        self, residents: list[np.ndarray], visitors: list[np.ndarray]
    ) -> tuple[np.ndarray, list[_List]]:
        positions = np.unique(np.concatenate([*residents, *visitors]))
        lists = [
            _List(np.searchsorted(positions, own), np.searchsorted(positions, others))
            for own, others in zip(residents, visitors, strict=True)
            if len(own)
        ]
        if self.join.apart is not None:
            apart = self.join.rows_apart(positions)
            lists = [part for one in lists for part in _without_pairs_apart(one, apart)]
        return positions, lists

    def _lists(self, item: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Residents and visitors of all lists of a partition, and where each list begins."""
        files = self.join.files
        numbers = np.arange(files.list_starts[item], files.list_starts[item + 1] + 1)
        rows = self.join.unique_rows(item)
        lists = np.asarray(files.rows(item)["list"])[rows]
        visited, visitors = self.visits.of(item)
        return (
            np.searchsorted(lists, numbers),
            rows + files.starts[item],
            np.searchsorted(visited, numbers),
            visitors,
        )
