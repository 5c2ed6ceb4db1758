"""Giving each seed images of its own: the nearest free ones, closest pairs first.

Pairs of a seed and a candidate are sorted into runs on disk, one a partition of seeds, which are
merged block by block. So the one task that serves them holds a byte an image, four bytes a seed
and a few blocks, however many pairs there are.
Q seeds, K candidates of each, H pairs, P partitions of seeds.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from curation import storage
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import (
    FileTask,
    TaskResult,
    finished_summaries,
    run_file_tasks,
)
from curation.neighbors.search.search import Search
from curation.stage import Engine

_PAIRS_HELD = 1 << 18
"""Pairs of all runs that are merged at once."""
_FEWEST_OF_A_RUN = 1 << 8
"""Pairs of each run at least, where there are many runs."""
_SERVED_AT_ONCE = 1 << 16
"""Pairs turned into Python numbers at a time."""
_PAIRS_PER_FILE = 1 << 19
"""Pairs that were given and wait in memory to be written: 12 MB."""
_COLUMNS = ("similarities", "seeds", "ranks", "images")


@dataclass(frozen=True)
class Matching:
    """Which candidates each seed gets: at most `k`, no image twice.

    Pairs are served in the order of similarity, then seed, then rank. Seeds lie in the order of
    their ids.
    """

    search: Search
    """Its k nearest rows of every seed are the candidates."""
    k: int
    pairs_held: int = _PAIRS_HELD
    pairs_per_file: int = _PAIRS_PER_FILE

    @property
    def num_runs(self) -> int:
        """Partitions of seeds."""
        return self.search.queries.num_partitions

    def path(self, kind: str, number: int) -> str:
        """File of the sorted pairs of one partition of seeds ("run"), or of "served" pairs."""
        return storage.join(self.search.folder, "matched", f"{kind}-{number:06d}.bin")

    def run(self, engine: Engine) -> dict[str, int]:
        """Match seeds and images; give the number of collisions: requests for a taken image."""
        runs = storage.join(self.search.folder, "matched", "sorted")
        lengths = run_file_tasks(engine, _SortPairs(self), self.num_runs, runs, "sort pairs")
        serve = _Serve(self, tuple(lengths))
        (found,) = run_file_tasks(engine, serve, 1, self._served_folder, "give images to seeds")
        return {"collisions": found["collisions"]}

    def chosen(self, partition: int) -> np.ndarray:
        """(Q, K) bool: which candidates the seeds of one partition get, after `run`."""
        (found,) = finished_summaries(self._served_folder, 1) or [{"files": 0}]
        start, size = self.search.queries.starts[partition], self.search.queries.size(partition)
        chosen = np.zeros((size, self.search.k), bool)
        for number in range(found["files"]):
            file = ColumnFile.open(self.path("served", number))
            first, stop = map(int, file["bounds"][partition : partition + 2])
            seeds, ranks = file.read(["seeds", "ranks"], first, stop)
            chosen[seeds - start, ranks] = True
        return chosen

    @property
    def _served_folder(self) -> str:
        return storage.join(self.search.folder, "matched", "served")


@dataclass(frozen=True)
class SeedPairs:
    """Seeds and candidates, in the order in which they are served."""

    similarities: np.ndarray
    """(H,) float32, falling."""
    seeds: np.ndarray
    """(H,) int64: positions."""
    ranks: np.ndarray
    """(H,) int32: places among the candidates of the seed."""
    images: np.ndarray
    """(H,) int64: positions."""

    def __len__(self) -> int:
        return len(self.seeds)

    def columns(self) -> dict[str, np.ndarray]:
        """Its arrays by name."""
        return {name: getattr(self, name) for name in _COLUMNS}

    def take(self, which: np.ndarray | slice) -> "SeedPairs":
        """Some of the pairs, by number or slice."""
        return SeedPairs(*(column[which] for column in self.columns().values()))

    def in_order(self) -> "SeedPairs":
        """The same pairs in the order in which they are served."""
        return self.take(np.lexsort((self.ranks, self.seeds, -self.similarities)))

    @classmethod
    def joined(cls, parts: Sequence["SeedPairs"]) -> "SeedPairs":
        """All pairs of some parts."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS))


@dataclass(frozen=True)
class _SortPairs(FileTask[None, int]):
    """The pairs of one partition of seeds, sorted; gives their number."""

    matching: Matching

    def __call__(self, item: int, opened: None) -> TaskResult[int]:
        search = self.matching.search
        positions, similarities = search.nearest(item)
        seeds, ranks = np.nonzero(positions >= 0)
        pairs = SeedPairs(
            similarities[seeds, ranks],
            seeds + search.queries.starts[item],
            ranks.astype(np.int32),
            positions[seeds, ranks],
        )
        path = self.matching.path("run", item)
        write_columns(path, pairs.in_order().columns())
        return TaskResult([path], len(pairs))


@dataclass(frozen=True)
class _Serve(FileTask[None, dict[str, int]]):
    """All pairs in order: each is given if its image is free and its seed wants more."""

    matching: Matching
    lengths: tuple[int, ...]
    """Pairs of each run."""

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, int]]:
        desk = _Desk(self.matching.search, self.matching.k)
        paths: list[str] = []
        given: list[SeedPairs] = []
        for pairs in self._merged():
            given.append(desk.serve(pairs))
            if sum(map(len, given)) >= self.matching.pairs_per_file:
                paths.append(self._write(len(paths), given))
                given = []
        if given:
            paths.append(self._write(len(paths), given))
        return TaskResult(paths, {"collisions": desk.collisions, "files": len(paths)})

    def _merged(self) -> Iterator[SeedPairs]:
        """Pairs of all runs, block by block, in the order in which they are served.

        A block ends with the window of that run whose last pair comes first: what other runs
        hold before it lies in their windows, too. Equal similarities go by seed, hence by run.
        """
        starts, lengths = np.zeros(len(self.lengths), np.int64), np.array(self.lengths, np.int64)
        size = max(_FEWEST_OF_A_RUN, self.matching.pairs_held // max(1, len(lengths)))
        while (starts < lengths).any():
            stops = np.minimum(starts + size, lengths)
            bounds = zip(starts.tolist(), stops.tolist(), strict=True)
            windows = [self._window(run, *some) for run, some in enumerate(bounds)]
            counts = stops - starts
            goes_on = np.flatnonzero(stops < lengths)
            if len(goes_on):
                last = np.array([windows[run].similarities[-1] for run in goes_on])
                bounding = int(goes_on[last.argmax()])  # of equals the first
                counts = _before(windows, bounding, float(last.max()))
            parts = [window.take(slice(n)) for window, n in zip(windows, counts, strict=True)]
            block = SeedPairs.joined(parts).in_order()
            for first in range(0, len(block), _SERVED_AT_ONCE):
                yield block.take(slice(first, first + _SERVED_AT_ONCE))
            starts += counts

    def _window(self, run: int, start: int, stop: int) -> SeedPairs:
        """Some pairs of a run, which is mapped no longer than they are held."""
        file = ColumnFile.open(self.matching.path("run", run))
        return SeedPairs(*file.read(_COLUMNS, start, stop))

    def _write(self, number: int, given: list[SeedPairs]) -> str:
        """Write pairs by the partition of their seed."""
        pairs = SeedPairs.joined(given)
        pairs = pairs.take(np.argsort(pairs.seeds, kind="stable"))
        bounds = np.searchsorted(pairs.seeds, self.matching.search.queries.starts)
        path = self.matching.path("served", number)
        write_columns(path, {"bounds": bounds, "seeds": pairs.seeds, "ranks": pairs.ranks})
        return path


def _before(windows: Sequence[SeedPairs], bounding: int, similarity: float) -> np.ndarray:
    """(P,) int64: pairs of each window up to the last one of the bounding window."""
    counts = []
    for run, window in enumerate(windows):
        falling, bound = -window.similarities, np.float32(-similarity)
        after = np.searchsorted(falling, bound, "right")
        counts.append(after if run <= bounding else np.searchsorted(falling, bound, "left"))
    return np.array(counts, np.int64)


class _Desk:
    """Knows which images are taken, and how many each seed still wants."""

    def __init__(self, search: Search, k: int) -> None:
        self._taken = bytearray(search.rows.num_rows)
        self._wanted = array("i", [k]) * search.queries.num_rows
        self.collisions = 0

    def serve(self, pairs: SeedPairs) -> SeedPairs:
        """Serve pairs in their order; give those that are given."""
        taken, wanted, given = self._taken, self._wanted, []
        hungry = np.flatnonzero(np.frombuffer(wanted, np.int32)[pairs.seeds] > 0)
        seeds, images = pairs.seeds[hungry].tolist(), pairs.images[hungry].tolist()
        for place, seed, image in zip(hungry.tolist(), seeds, images, strict=True):
            if not wanted[seed]:
                continue
            if taken[image]:
                self.collisions += 1
                continue
            taken[image] = 1
            wanted[seed] -= 1
            given.append(place)
        return pairs.take(np.array(given, np.int64))
