"""Giving each seed images of its own: the nearest free ones, closest pairs first.

Pairs of a seed and a candidate are sorted into runs on disk, one a partition of seeds, which are
merged block by block. So the one task that serves them holds a byte an image, four bytes a seed
and a few blocks, however many pairs there are.
Q seeds, K candidates of each, H pairs, P partitions of seeds.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.row_files import map_array, write_array
from curation.neighbors.search.search import Search
from curation.stage import Engine

_PAIRS_HELD = 1 << 18
"""Pairs of all runs that are merged at once."""
_FEWEST_OF_A_RUN = 1 << 8
_SERVED_AT_ONCE = 1 << 16
_PAIRS_PER_FILE = 1 << 19


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
    def folder(self) -> str:
        """Where runs and results lie."""
        return storage.join(self.search.folder, "matched")

    @property
    def num_runs(self) -> int:
        """Partitions of seeds."""
        return self.search.queries.num_partitions

    def run_path(self, partition: int) -> str:
        """File of the sorted pairs of one partition of seeds."""
        return storage.join(self.folder, f"run-{partition:06d}.bin")

    def served_path(self, number: int) -> str:
        """File of some of the pairs that were given, by partition of their seeds."""
        return storage.join(self.folder, f"served-{number:06d}.bin")

    def run(self, engine: Engine) -> dict[str, int]:
        """Match seeds and images; give the number of collisions: requests for a taken image."""
        sort = _SortPairs(self)
        facts = run_file_tasks(engine, sort, self.num_runs, f"{self.folder}/sorted", "sort pairs")
        serve = _Serve(self, tuple(fact["pairs"] for fact in facts))
        (found,) = run_file_tasks(engine, serve, 1, f"{self.folder}/served", "give images to seeds")
        return {"collisions": found["collisions"]}

    def chosen(self, partition: int) -> np.ndarray:
        """(Q, K) bool: which candidates the seeds of one partition get."""
        start, size = self.search.queries.starts[partition], self.search.queries.size(partition)
        chosen = np.zeros((size, self.search.k), bool)
        for number in range(self._num_files()):
            path, head = self.served_path(number), 8 * (self.num_runs + 1)
            bounds = map_array(path, "int64", 0, (head // 8,))
            first, stop, total = (int(bounds[i]) for i in (partition, partition + 1, -1))
            seeds = map_array(path, "int64", head + 8 * first, (stop - first,))
            ranks = map_array(path, "int32", head + 8 * total + 4 * first, (stop - first,))
            chosen[seeds - start, ranks] = True
        return chosen

    def _num_files(self) -> int:
        receipt = storage.read_json(storage.join(self.folder, "served", "000000.json"))
        return int(receipt["summary"]["files"])


@dataclass(frozen=True)
class Pairs:
    """Seeds and candidates, in the order in which they are served."""

    similarities: np.ndarray
    """(H,) float32, falling."""
    seeds: np.ndarray
    """(H,) int64: positions."""
    ranks: np.ndarray
    """(H,) int32: places among the candidates of the seed."""
    images: np.ndarray
    """(H,) int64: positions."""

    def take(self, which: Any) -> "Pairs":
        """Some of the pairs, by slice or number."""
        return Pairs(
            self.similarities[which], self.seeds[which], self.ranks[which], self.images[which]
        )

    def sorted(self) -> "Pairs":
        """The same pairs in the order in which they are served."""
        return self.take(np.lexsort((self.ranks, self.seeds, -self.similarities)))

    @classmethod
    def joined(cls, parts: list["Pairs"]) -> "Pairs":
        """All pairs of some parts."""
        names = ("similarities", "seeds", "ranks", "images")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def write(self, path: str) -> None:
        """Write a run."""
        write_array(path, self.similarities, self.ranks, self.seeds, self.images)

    @classmethod
    def read(cls, path: str, total: int, start: int, count: int) -> "Pairs":
        """Some pairs of a run of `total`, mapped where the file is local."""
        shape = (max(0, min(count, total - start)),)
        return cls(
            map_array(path, "float32", 4 * start, shape),
            map_array(path, "int64", 8 * total + 8 * start, shape),
            map_array(path, "int32", 4 * total + 4 * start, shape),
            map_array(path, "int64", 16 * total + 8 * start, shape),
        )


@dataclass(frozen=True)
class _SortPairs(FileTask[None, dict[str, Any]]):
    """The pairs of one partition of seeds, sorted."""

    matching: Matching

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        search = self.matching.search
        positions, similarities = search.nearest(item)
        seeds, ranks = np.nonzero(positions >= 0)
        pairs = Pairs(
            similarities[seeds, ranks],
            seeds + search.queries.starts[item],
            ranks.astype(np.int32),
            positions[seeds, ranks],
        )
        path = self.matching.run_path(item)
        pairs.sorted().write(path)
        return TaskResult([path], {"pairs": len(seeds)})


@dataclass(frozen=True)
class _Serve(FileTask[None, dict[str, Any]]):
    """All pairs in order: each is given if its image is free and its seed wants more."""

    matching: Matching
    lengths: tuple[int, ...]
    """Pairs of each run."""

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        desk = _Desk(self.matching.search, self.matching.k)
        paths: list[str] = []
        given: list[Pairs] = []
        for pairs in self._merged():
            given.append(desk.serve(pairs))
            if sum(len(part.seeds) for part in given) >= self.matching.pairs_per_file:
                paths.append(self._write(len(paths), given))
                given = []
        if given:
            paths.append(self._write(len(paths), given))
        return TaskResult(paths, {"collisions": desk.collisions, "files": len(paths)})

    def _merged(self) -> Iterator[Pairs]:
        """Pairs of all runs, block by block, in the order in which they are served.

        A block ends with the window of that run whose last pair comes first: what other runs
        hold before it lies in their windows, too. Equal similarities go by seed, hence by run.
        """
        starts = np.zeros(len(self.lengths), np.int64)
        size = max(_FEWEST_OF_A_RUN, self.matching.pairs_held // max(1, len(starts)))
        while (starts < self.lengths).any():
            windows = [self._window(run, int(starts[run]), size) for run in range(len(starts))]
            goes_on = np.flatnonzero(starts + size < self.lengths)
            counts = np.array([len(window.seeds) for window in windows])
            if len(goes_on):
                last = np.array([windows[run].similarities[-1] for run in goes_on])
                bounding = int(goes_on[last.argmax()])  # of equals the first
                counts = _before(windows, bounding, float(last.max()))
            parts = [window.take(slice(n)) for window, n in zip(windows, counts, strict=True)]
            block = Pairs.joined(parts).sorted()
            for first in range(0, len(block.seeds), _SERVED_AT_ONCE):
                yield block.take(slice(first, first + _SERVED_AT_ONCE))
            starts += counts

    def _window(self, run: int, start: int, size: int) -> Pairs:
        return Pairs.read(self.matching.run_path(run), self.lengths[run], start, size)

    def _write(self, number: int, given: list[Pairs]) -> str:
        """Write pairs by the partition of their seed, with an offset table."""
        pairs = Pairs.joined(given)
        order = np.argsort(pairs.seeds, kind="stable")
        seeds = pairs.seeds[order]
        bounds = np.searchsorted(seeds, self.matching.search.queries.starts).astype(np.int64)
        path = self.matching.served_path(number)
        write_array(path, bounds, seeds, pairs.ranks[order])
        return path


def _before(windows: list[Pairs], bounding: int, similarity: float) -> np.ndarray:
    """(P,) int64: pairs of each window up to the last one of the bounding window."""
    counts = np.empty(len(windows), np.int64)
    for run, window in enumerate(windows):
        falling = -window.similarities
        if run <= bounding:
            counts[run] = np.searchsorted(falling, np.float32(-similarity), "right")
        else:
            counts[run] = np.searchsorted(falling, np.float32(-similarity), "left")
    return counts


class _Desk:
    """Knows which images are taken, and how many each seed still wants."""

    def __init__(self, search: Search, k: int) -> None:
        self._taken = bytearray(search.rows.num_rows)
        self._wanted = array("i", [k]) * search.queries.num_rows
        self.collisions = 0

    def serve(self, pairs: Pairs) -> Pairs:
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
