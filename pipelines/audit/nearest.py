"""The nearest row of a set to each row of a benchmark, by files: exhaustive, and bounded in memory.

`_Compare` tasks hold a block of the benchmark's rows and go through a run of the set's shards in
tiles; `_Reduce` tasks take the best of all runs for one block. Every pair that may be the nearest
is scored exactly, so neither tiles nor precision nor workers show in what is found.

Legend: B benchmark rows of a block, N rows of a tile, D width, H candidates.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation import storage
from curation.dataset import Dataset, ShardInfo, commit, write_shard
from curation.neighbors.kernels.products import Products
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.vectors import VectorSource, bad_rows, exact_similarities
from curation.neighbors.search.candidates import nearest_in
from curation.schema import ID, ids_from_bytes
from curation.stage import Engine, Resources

SCHEMA = pa.schema([(ID, pa.string()), ("kept", pa.string()), ("similarity", pa.float32())])
"""A row of a benchmark, the nearest of the set (null: none was compared), and their cosine."""
QUERIES, TILE = 1 << 10, 1 << 13
"""Rows of both sides whose products are held at once."""
_BLOCK_ROWS = 1 << 16
_RUN_ROWS = 1 << 20
_PAIRS = 1 << 15
_LIBRARIES_BYTES = 1 << 29

Slices = tuple[tuple[int, int, int], ...]
"""Shard, first row, end: some rows of a data set in its order."""


@dataclass(frozen=True)
class Best:
    """The nearest row so far of each of B rows."""

    scores: np.ndarray
    """(B,) float32 cosines, -inf where nothing was compared."""
    ids: np.ndarray
    """(B, 16) uint8."""

    @classmethod
    def none(cls, count: int) -> "Best":
        """Before anything was compared."""
        return cls(np.full(count, -np.inf, np.float32), np.full((count, 16), 255, np.uint8))

    def better(self, other: "Best") -> "Best":
        """The better of both, row by row; ties go to the smallest id."""
        takes = (other.scores > self.scores) | (
            (other.scores == self.scores) & (_before(other.ids, self.ids))
        )
        return Best(
            np.where(takes, other.scores, self.scores),
            np.where(takes[:, None], other.ids, self.ids),
        )


@dataclass(frozen=True)
class Comparison:
    """A benchmark and a set, and where what is found lies."""

    benchmark: VectorSource
    kept: VectorSource
    folder: str
    block_rows: int = _BLOCK_ROWS
    run_rows: int = _RUN_ROWS

    def blocks(self) -> list[Slices]:
        """Rows of the benchmark that one task holds."""
        return _cut(self.benchmark.pool.shard_rows(), self.block_rows)

    def runs(self) -> list[range]:
        """Shards of the set that one task goes through."""
        rows = self.kept.pool.shard_rows()
        bounds = np.unique(np.cumsum(rows) // self.run_rows, return_index=True)[1]
        ends = [*bounds[1:], len(rows)]
        return [range(int(a), int(b)) for a, b in zip(bounds, ends, strict=True)]

    def path(self, block: int, run: int) -> str:
        """File of what one task found."""
        return storage.join(self.folder, "compared", f"{block:06d}-{run:06d}.bin")

    def find(self, engine: Engine) -> Dataset:
        """Compare all with all; give the nearest of each row of the benchmark."""
        blocks, runs = self.blocks(), self.runs()
        pairs = tuple(np.ndindex(len(blocks), len(runs)))
        work = _Compare(self, tuple(blocks), tuple(runs), pairs, self._memory())
        run_file_tasks(
            engine, work, len(pairs), storage.join(self.folder, "compared"), "certificate"
        )
        reduce = _Reduce(self, tuple(blocks), len(runs))
        done = storage.join(self.folder, "reduced")
        facts = run_file_tasks(engine, reduce, len(blocks), done, "certificate: nearest of all")
        infos = [ShardInfo.model_validate(fact) for fact in facts]
        found = commit(storage.join(self.folder, "nearest"), SCHEMA, infos)
        for name in ("compared", "reduced"):
            storage.remove(storage.join(self.folder, name))
        return found

    def read(self, rows: Slices) -> tuple[np.ndarray, np.ndarray]:
        """Ids and vectors of some rows of the benchmark."""
        parts = [(self.benchmark.read(shard), slice(a, b)) for shard, a, b in rows]
        ids, vectors = (
            np.concatenate([found[side][some] for found, some in parts]) for side in (0, 1)
        )
        return ids, vectors

    def _memory(self) -> int:
        """Bytes of a task: a block and a shard twice (as stored, and prepared), and a tile."""
        width = 4 * _width_of(self.kept)
        rows = [int(one.pool.shard_rows().max(initial=0)) for one in (self.benchmark, self.kept)]
        held = min(self.block_rows, int(self.benchmark.pool.num_rows)) + sum(rows)
        return _LIBRARIES_BYTES + 3 * held * width + 16 * QUERIES * TILE


@dataclass(frozen=True)
class _Compare(FileTask[None, None]):
    """The nearest rows of one run of shards to the rows of one block."""

    comparison: Comparison
    blocks: tuple[Slices, ...]
    runs: tuple[range, ...]
    pairs: tuple[tuple[int, ...], ...]
    memory: int

    @property
    def resources(self) -> Resources:
        return Resources(memory=self.memory)

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        block, run = self.pairs[item]
        _, vectors = self.comparison.read(self.blocks[block])
        rows = self.comparison.kept.pool.shard_rows()[list(self.runs[run])].sum()
        nearest = Nearest(vectors, Products.best_for(int(max(rows, len(vectors)))))
        for shard in self.runs[run]:
            nearest.meet(*self.comparison.kept.read(shard))
        path = self.comparison.path(block, run)
        write_columns(path, {"scores": nearest.best.scores, "ids": nearest.best.ids})
        return TaskResult([path], None)


@dataclass(frozen=True)
class _Reduce(FileTask[None, dict[str, Any]]):
    """The nearest of all runs to the rows of one block, as a shard."""

    comparison: Comparison
    blocks: tuple[Slices, ...]
    num_runs: int

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        ids = self.comparison.read(self.blocks[item])[0]
        best = Best.none(len(ids))
        for run in range(self.num_runs):
            found = ColumnFile.open(self.comparison.path(item, run))
            best = best.better(Best(*found.read(["scores", "ids"], 0, len(ids))))
        none = pa.array(np.isneginf(best.scores))
        kept = pc.if_else(none, pa.scalar(None, pa.string()), ids_from_bytes(best.ids))
        scores = pc.if_else(none, pa.scalar(None, pa.float32()), pa.array(best.scores))
        table = pa.table([ids_from_bytes(ids), kept, scores], schema=SCHEMA)
        folder = storage.join(self.comparison.folder, "nearest")
        info = write_shard(folder, item, table)
        return TaskResult([storage.join(folder, info.name)], info.model_dump(mode="json"))


class Nearest:
    """The nearest of all rows that were met to each row of a block."""

    def __init__(self, block: np.ndarray, products: Products) -> None:
        """block: (B, D) float16 or float32; rows without a direction are not compared."""
        self.best = Best.none(len(block))
        self._good = np.flatnonzero(~bad_rows(block))
        self._block, self._products = block[self._good], products
        self._prepared = products.prepare(self._block)

    def meet(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Compare with more rows. ids: (N, 16) uint8, rows: (N, D)."""
        good = np.flatnonzero(~bad_rows(rows))
        for first in range(0, len(good), TILE):
            some = good[first : first + TILE]
            tile, prepared = rows[some], self._products.prepare(rows[some])
            for start in range(0, len(self._block), QUERIES):
                self._meet_tile(slice(start, start + QUERIES), ids[some], tile, prepared)

    def _meet_tile(self, some: slice, ids: np.ndarray, tile: np.ndarray, prepared: Any) -> None:
        where = self._good[some]
        floor = self.best.scores[where]
        found = nearest_in(self._products, self._prepared[some], prepared, 1, floor)
        best = Best.none(len(where))
        for first in range(0, len(found.queries), _PAIRS):
            pairs = found.take(slice(first, first + _PAIRS))
            left = self._block[some][pairs.queries]
            scores = exact_similarities(left, tile[pairs.positions])
            best = best.better(_best_of(len(where), pairs.queries, scores, ids[pairs.positions]))
        both = Best(floor, self.best.ids[where]).better(best)
        self.best.scores[where], self.best.ids[where] = both.scores, both.ids


def _best_of(count: int, queries: np.ndarray, scores: np.ndarray, ids: np.ndarray) -> Best:
    """The best of some candidates of each row. queries: (H,), scores: (H,), ids: (H, 16)."""
    high, low = _words(ids).T
    order = np.lexsort((low, high, -scores, queries))
    first = order[np.unique(queries[order], return_index=True)[1]]
    best = Best.none(count)
    best.scores[queries[first]], best.ids[queries[first]] = scores[first], ids[first]
    return best


def _before(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(B,) bool: which ids come before others."""
    (high, low), (other_high, other_low) = _words(left).T, _words(right).T
    return np.asarray((high < other_high) | ((high == other_high) & (low < other_low)))


def _words(ids: np.ndarray) -> np.ndarray:
    """(H, 2) uint64 that are ordered as ids are."""
    return np.ascontiguousarray(ids).view(">u8").astype(np.uint64).reshape(-1, 2)


def _cut(shard_rows: np.ndarray, at_once: int) -> list[Slices]:
    """All rows in order, so many at once."""
    ends = np.cumsum(shard_rows)
    blocks = []
    for first in range(0, int(ends[-1]) if len(ends) else 0, at_once):
        last = min(first + at_once, int(ends[-1]))
        low, high = np.searchsorted(ends, [first, last - 1], "right")
        shards = range(int(low), int(high) + 1)
        starts = [(shard, int(ends[shard] - shard_rows[shard])) for shard in shards]
        blocks.append(
            tuple(
                (shard, max(0, first - start), min(int(shard_rows[shard]), last - start))
                for shard, start in starts
            )
        )
    return blocks


def _width_of(source: VectorSource) -> int:
    """D, where the side-car says so in its type; else what no encoder exceeds."""
    kind = source.dataset.manifest.columns[source.column]
    digits = kind.rpartition("[")[2].rstrip("]")
    return int(digits) if digits.isdigit() else 1 << 12
