"""How many pairs the lists would miss: measured on a sample of rows against all others.

Every pair above the threshold of a sampled row is found by exhaustive comparison; then it is
known how far a row must go visiting for the join to meet it. The margin within which lists are
visited is chosen to reach the recall asked for, and what would still be missed is reported.
Q sampled rows, N rows, S steps of the margin.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.neighbors.kernels.id_hashes import hash_ids, share_bound
from curation.neighbors.kernels.products import Products
from curation.neighbors.kernels.threads import in_threads
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.routes import Routes
from curation.neighbors.rows.row_files import RowFiles, map_array, write_array
from curation.neighbors.rows.vectors import exact_similarities
from curation.stage import Engine

_QUERIES = 1 << 11
_TILE = 1 << 13
_FEWEST_PAIRS = 50
_ERRORS = 1.645
"""Standard errors within which 19 of 20 measurements lie on one side."""
_STEPS = 256
"""Gaps that are tried."""


@dataclass(frozen=True)
class Recall:
    """What a sample says about a join by lists."""

    margin: float
    """How far a visited list may be."""
    lists_met: float
    """Lists that a row meets on average, its own included."""
    expected: float | None
    """Share of the sampled pairs that are met; None where the sample holds too few pairs."""
    error: float
    """Standard error of that share: pairs of one row are met or missed together."""
    sampled_pairs: int
    estimated_pairs: float
    """Pairs above the threshold in all rows."""

    def figures(self) -> dict[str, Any]:
        """What the report says."""
        missed = None if self.expected is None else (1 - self.expected) * self.estimated_pairs
        return {
            "probe_margin": self.margin,
            "lists_met": round(self.lists_met, 2),
            "measured_recall": self.expected,
            "recall_error": self.error,
            "sampled_pairs": self.sampled_pairs,
            "estimated_pairs": round(self.estimated_pairs),
            "estimated_missed_pairs": None if missed is None else round(missed),
        }


def measure_recall(
    files: RowFiles,
    threshold: float,
    target: float,
    products: Products,
    folder: str,
    engine: Engine,
    *,
    limits: float,
    seed: int,
    threads: int,
    apart: str | None = None,
) -> Recall:
    """Choose the smallest margin whose recall on a sample is what was asked, 19 times in 20.

    limits: the largest margin of a probe. apart: file of the rows not compared with each other;
    none of them is sampled.
    """
    num_rows = files.num_rows
    if apart is not None:
        num_rows -= int(map_array(apart, "bool", 0, (files.num_rows,)).sum())
    pick = _Pick(files, folder, seed, num_rows, apart)
    run_file_tasks(engine, pick, files.num_partitions, f"{folder}/picked", "pick a sample")
    compare = _Compare(pick, threshold, products, limits, threads)
    compared = f"{folder}/compared"
    facts = run_file_tasks(engine, compare, files.num_partitions, compared, "compare the sample")
    picked = pick.read()
    needed = compare.total(len(picked.positions))  # (Q, S + 2)
    pairs, sampled = int(needed.sum()), len(needed)
    both_sampled = pairs - sum(fact["with_rows_apart"] for fact in facts)
    estimated = (pairs - both_sampled / 2) * num_rows / max(1, sampled)
    routes, margins = picked.routes, margin_steps(limits)
    if pairs < _FEWEST_PAIRS:
        return Recall(limits, lists_within(routes, limits), None, 0.0, pairs, estimated)
    step, met, error = first_enough(needed, target)
    margin = float(margins[step])
    return Recall(margin, lists_within(routes, margin), met, error, pairs, estimated)


def margin_steps(limits: float) -> np.ndarray:
    """(S + 1,) float16: margins that a visit may be allowed, from none to the largest."""
    return np.linspace(0, limits, _STEPS + 1).astype(np.float16)


def lists_within(routes: Routes, margin: float) -> float:
    """Lists that a row meets on average, its own included."""
    return 1 + len(routes.within(margin)[0]) / max(1, len(routes))


def first_enough(needed: np.ndarray, target: float) -> tuple[int, float, float]:
    """The first step whose share is the target 19 times in 20, else the last; both numbers.

    needed: as in `shares_met`.
    """
    met, errors = shares_met(needed)
    enough = np.flatnonzero(met - _ERRORS * errors >= target)
    step = int(enough[0]) if len(enough) else len(met) - 1
    return step, float(met[step]), float(errors[step])


def shares_met(needed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the pairs met with each margin, and its standard error: (S + 1,) both.

    needed: (Q, S + 2) pairs of each sampled row by the step of the margin that they need; the last
    column counts those that no visit meets. Rows are drawn, not pairs: the error is that of a
    ratio of sums over rows.
    """
    of_row = needed.sum(axis=1)[:, None]  # (Q, 1)
    met = np.cumsum(needed[:, :-1], axis=1)  # (Q, S + 1)
    shares = met.sum(axis=0) / of_row.sum()
    errors = np.sqrt(((met - shares * of_row) ** 2).sum(axis=0)) / of_row.sum()
    return shares, errors


@dataclass(frozen=True)
class _Picked:
    """The sampled rows, in the order of their positions."""

    positions: np.ndarray
    """(Q,) int64."""
    raw: np.ndarray
    """(Q, D) vectors as stored."""
    routes: Routes


@dataclass(frozen=True)
class _Pick(FileTask[None, None]):
    """The sampled rows of one partition: those with the smallest hash of (seed, id)."""

    files: RowFiles
    folder: str
    seed: int
    num_rows: int
    """Rows that are sampled from."""
    apart: str | None = None

    def path(self, kind: str, partition: int) -> str:
        return storage.join(self.folder, f"{kind}-{partition:06d}.bin")

    def read(self) -> _Picked:
        """Those of all partitions."""
        partitions = range(self.files.num_partitions)
        parts = storage.gather(self._read, partitions, self.folder)
        positions, raw, routes = zip(*parts, strict=True)
        return _Picked(np.concatenate(positions), np.concatenate(raw), Routes.joined(routes))

    def _read(self, partition: int) -> tuple[np.ndarray, np.ndarray, Routes]:
        data = storage.read_bytes(self.path("rows", partition))
        row_bytes = self.files.width * np.dtype(self.files.dtype).itemsize
        count = len(data) // (8 + row_bytes)
        raw = np.frombuffer(data, self.files.dtype, offset=8 * count)
        return (
            np.frombuffer(data, np.int64, count),
            raw.reshape(count, self.files.width),
            Routes.read(self.path("routes", partition), count),
        )

    def rows_apart(self, partition: int) -> np.ndarray:
        """(N,) bool: rows of one partition that are not compared with each other."""
        start, size = self.files.starts[partition], self.files.size(partition)
        if self.apart is None:
            return np.zeros(size, bool)
        return map_array(self.apart, "bool", start, (size,))

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        share = _QUERIES / max(1, self.num_rows)
        keys = hash_ids(self.files.ids(item), "recall", self.seed)
        rows = np.flatnonzero(keys <= share_bound(share))
        rows = rows[~self.rows_apart(item)[rows]]
        positions = rows + self.files.starts[item]
        routes = Routes.read(self.files.path("routes", item), self.files.size(item))
        paths = [self.path(kind, item) for kind in ("rows", "routes")]
        write_array(paths[0], positions, self.files.gather("vectors", positions))
        routes.take(rows).write(paths[1])
        return TaskResult(paths, None)


@dataclass(frozen=True)
class _Compare(FileTask[Any, dict[str, Any]]):
    """Sampled rows against all rows of one partition: the margin that each pair needs.

    Of identical rows, which share their lists, one is compared and all are counted.
    """

    pick: _Pick
    threshold: float
    products: Products
    limits: float
    threads: int

    def open(self) -> tuple[_Picked, Any]:
        """What every partition is asked about, and its vectors ready for products."""
        picked = self.pick.read()
        return picked, self.products.prepare(picked.raw)

    def __call__(self, item: int, opened: tuple[_Picked, Any]) -> TaskResult[dict[str, Any]]:
        picked, prepared = opened
        files, queries, of_queries = self.pick.files, picked.positions, picked.routes
        routes = Routes.read(files.path("routes", item), files.size(item))
        margins = margin_steps(self.limits)
        first = np.asarray(files.rows(item)["first"])
        uniques = np.flatnonzero(first == np.arange(len(first)))
        copies = np.bincount(first, minlength=len(first))
        copies_apart = np.bincount(first[self.pick.rows_apart(item)], minlength=len(first))
        vectors, themselves = files.vectors(item), self._first_in(item, queries, first)
        needed = np.zeros((len(queries), _STEPS + 2), np.int32)
        with_apart = 0

        def of_block(start: int) -> tuple[np.ndarray, np.ndarray]:
            rows = uniques[start : start + _TILE]
            a, b = self._pairs(picked.raw, prepared, vectors[rows])
            return a, rows[b]

        blocks = range(0, len(uniques), _TILE)
        for a, b in in_threads(of_block, blocks, self.threads):
            with_apart += int(copies_apart[b].sum())
            there = of_queries.margins_to(a, routes.home[b])
            back = routes.margins_to(b, of_queries.home[a])
            steps = np.searchsorted(margins, np.minimum(there, back))  # S + 1 where neither visits
            pairs = copies[b] - (themselves[a] == b)  # no row is a pair with itself
            np.add.at(needed, (a, steps), pairs.astype(np.int32))
        write_array(self.path(item), needed)
        return TaskResult([self.path(item)], {"with_rows_apart": with_apart})

    def path(self, item: int) -> str:
        return storage.join(self.pick.folder, "compared", f"needed-{item:06d}.bin")

    def total(self, num_queries: int) -> np.ndarray:
        """(Q, S + 2): pairs of each sampled row by the step of the margin that they need."""
        files = self.pick.files
        total = np.zeros((num_queries, _STEPS + 2), np.int64)
        for partition in range(files.num_partitions):
            total += map_array(self.path(partition), "int32", 0, total.shape)
        return total

    def _pairs(
        self, raw: np.ndarray, prepared: Any, block: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of queries and rows of a block above the threshold. raw: (Q, D)."""
        band = self.products.band(block.shape[1])
        others = self.products.prepare(block)
        a, b, scores = self.products.above(prepared, others, self.threshold - band)
        true = scores > self.threshold + band
        near = np.flatnonzero(~true)
        exact = exact_similarities(raw[a[near]], block[b[near]])
        true[near] = exact > np.float32(self.threshold)
        return a[true], b[true]

    def _first_in(self, partition: int, positions: np.ndarray, first: np.ndarray) -> np.ndarray:
        """(Q,) int64: the first row identical to each sampled one; -1 in other partitions."""
        rows = positions - self.pick.files.starts[partition]
        here = (rows >= 0) & (rows < len(first))
        found = np.full(len(rows), -1, np.int64)
        found[here] = first[rows[here]]
        return found
