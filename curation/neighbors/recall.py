"""How many pairs the lists would miss: measured on a sample of rows against all others.

Every pair above the threshold of a sampled row is found by exhaustive comparison; then it is
known how many lists a row must be compared with for the join to meet it. The number of visits is
chosen to reach the recall asked for, and what would still be missed is reported.
Q sampled rows, N rows, V visits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.clustering import hash_ids
from curation.neighbors.coarse import limit_threads
from curation.neighbors.products import Products
from curation.neighbors.row_files import RowFiles, map_array, write_array
from curation.neighbors.steps import Done, Work, run_steps
from curation.neighbors.vectors import exact_similarities
from curation.stage import Engine

_QUERIES = 1 << 10
_TILE = 1 << 13
_FEWEST_PAIRS = 50


@dataclass(frozen=True)
class Recall:
    """What a sample says about a join by lists."""

    num_visits: int
    """Visits a row, beside its own list."""
    expected: float | None
    """Share of the sampled pairs that are met; None where the sample holds too few pairs."""
    sampled_pairs: int
    estimated_pairs: float
    """Pairs above the threshold in all rows."""

    def figures(self) -> dict[str, Any]:
        """What the report says."""
        missed = None if self.expected is None else (1 - self.expected) * self.estimated_pairs
        return {
            "lists_met": 1 + self.num_visits,
            "measured_recall": self.expected,
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
    seed: int,
    threads: int,
    apart: str | None = None,
) -> Recall:
    """Choose the number of visits that reaches a recall on a sample of rows.

    apart: file of the rows not compared with each other; none of them is sampled.
    """
    num_rows = files.num_rows
    if apart is not None:
        num_rows -= int(map_array(apart, "bool", 0, (files.num_rows,)).sum())
    pick = _Pick(files, folder, seed, num_rows, apart)
    run_steps(engine, pick, files.num_partitions, f"{folder}/picked", "pick a sample")
    compare = _Compare(pick, threshold, products, threads)
    facts = run_steps(
        engine, compare, files.num_partitions, f"{folder}/compared", "compare the sample"
    )
    needed = np.sum([fact["needed"] for fact in facts], axis=0)  # (V + 2,)
    pairs, sampled = int(needed.sum()), facts[0]["queries"]
    both_sampled = pairs - sum(fact["with_rows_apart"] for fact in facts)
    estimated = (pairs - both_sampled / 2) * num_rows / max(1, sampled)
    if pairs < _FEWEST_PAIRS:
        return Recall(min(files.num_visits, 15), None, pairs, estimated)
    met = np.cumsum(needed[:-1]) / pairs  # (V + 1,)
    enough = np.flatnonzero(met >= target)
    visits = int(enough[0]) if len(enough) else files.num_visits
    return Recall(visits, float(met[visits]), pairs, estimated)


@dataclass(frozen=True)
class _Pick(Work):
    """The sampled rows of one partition: those with the smallest hash of (seed, id)."""

    files: RowFiles
    folder: str
    seed: int
    num_rows: int
    """Rows that are sampled from."""
    apart: str | None = None

    def path(self, partition: int) -> str:
        return storage.join(self.folder, f"picked-{partition:06d}.bin")

    def positions(self) -> np.ndarray:
        """(Q,) int64: positions of all sampled rows."""
        partitions = range(self.files.num_partitions)
        parts = [np.frombuffer(storage.read_bytes(self.path(p)), np.int64) for p in partitions]
        return np.concatenate(parts)

    def rows_apart(self, partition: int) -> np.ndarray:
        """(N,) bool: rows of one partition that are not compared with each other."""
        start, size = self.files.starts[partition], self.files.size(partition)
        if self.apart is None:
            return np.zeros(size, bool)
        return map_array(self.apart, "bool", start, (size,))

    def __call__(self, item: int, opened: Any) -> Done:
        share = min(1.0, _QUERIES / max(1, self.num_rows))
        keys = hash_ids(self.files.ids(item), "recall", self.seed)
        rows = np.flatnonzero(keys <= np.uint64(share * float(2**64 - 2**11)))
        rows = rows[~self.rows_apart(item)[rows]]
        write_array(self.path(item), rows + self.files.starts[item])
        return Done([self.path(item)])


@dataclass(frozen=True)
class _Compare(Work):
    """Sampled rows against all rows of one partition: lists that each pair needs.

    Of identical rows, which share their lists, one is compared and all are counted.
    """

    pick: _Pick
    threshold: float
    products: Products
    threads: int

    def open(self) -> Any:
        if self.products.precision != "float32":
            limit_threads(self.threads)

    def __call__(self, item: int, opened: Any) -> Done:
        files, queries = self.pick.files, self.pick.positions()
        raw = files.gather("vectors", queries)
        prepared = self.products.prepare(raw)
        band = self.products.band(files.width)
        needed, with_apart = np.zeros(files.num_visits + 2, np.int64), 0
        first = np.asarray(files.rows(item)["first"])
        uniques = np.flatnonzero(first == np.arange(len(first)))
        copies = np.bincount(first, minlength=len(first))
        copies_apart = np.bincount(first[self.pick.rows_apart(item)], minlength=len(first))
        vectors, lists = files.vectors(item), lists_of(files, item)
        of_queries, themselves = self._lists_of(queries), self._first_in(item, queries, first)
        for start in range(0, len(uniques), _TILE):
            rows = uniques[start : start + _TILE]
            block = vectors[rows]
            others = self.products.prepare(block)
            a, b, scores = self.products.above(prepared, others, self.threshold - band)
            true = scores > self.threshold + band
            near = np.flatnonzero(~true)
            exact = exact_similarities(raw[a[near]], block[b[near]])
            true[near] = exact > np.float32(self.threshold)
            a, b = a[true], rows[b[true]]
            with_apart += int(copies_apart[b].sum())
            ranks = np.minimum(_rank(of_queries[a], lists[b, 0]), _rank(lists[b], of_queries[a, 0]))
            pairs = copies[b] - (themselves[a] == b)  # no row is a pair with itself
            np.add.at(needed, ranks, pairs)
        facts = {"needed": needed.tolist(), "with_rows_apart": with_apart}
        return Done((), {**facts, "queries": len(queries)})

    def _first_in(self, partition: int, positions: np.ndarray, first: np.ndarray) -> np.ndarray:
        """(Q,) int64: the first row identical to each sampled one; -1 in other partitions."""
        rows = positions - self.pick.files.starts[partition]
        here = (rows >= 0) & (rows < len(first))
        found = np.full(len(rows), -1, np.int64)
        found[here] = first[rows[here]]
        return found

    def _lists_of(self, positions: np.ndarray) -> np.ndarray:
        """(Q, 1 + V) int32: own list and visits of any rows."""
        files = self.pick.files
        found = np.empty((len(positions), 1 + files.num_visits), np.int32)
        for partition, where in files.by_partition(positions):
            rows = positions[where] - files.starts[partition]
            found[where] = lists_of(files, partition)[rows]
        return found


def lists_of(files: RowFiles, partition: int) -> np.ndarray:
    """(N, 1 + V) int32: own list and visits of the rows of one partition."""
    shape = (files.size(partition), files.num_visits)
    visits = map_array(files.path("visits", partition), "int32", 0, shape)
    own = np.asarray(files.rows(partition)["list"])[:, None]
    return np.concatenate([own, visits], axis=1)


def _rank(lists: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(H,) where in its row each wanted list stands, the number of columns where nowhere."""
    found = lists == wanted[:, None]
    return np.asarray(np.where(found.any(axis=1), found.argmax(axis=1), lists.shape[1]))
