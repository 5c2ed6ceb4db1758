"""All pairs above a threshold: the edges between them, and each row's most similar other row.

Two phases: `Meet` tasks compare blocks and write spanning edges and candidates; `Settle` tasks,
one a partition, score the candidates of their rows exactly and choose the best (ties: smallest
id). N rows, D width, P partitions, E edges.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.neighbors.join.pairs import Candidates, PairCollector
from curation.neighbors.kernels.identical import first_among
from curation.neighbors.kernels.products import FLOAT32, Products
from curation.neighbors.kernels.threads import side_by_side
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.row_files import RowFiles, RowReader, map_array
from curation.neighbors.rows.vectors import exact_similarities
from curation.stage import Engine

_TILE = 1 << 12
_PAIRS_AT_ONCE = 1 << 13
_CANDIDATE = ("rows", "twins", "scores", "bands")
"""Columns of candidates."""


@dataclass(frozen=True)
class Join:
    """A self-join of arranged rows above a threshold."""

    files: RowFiles
    threshold: float
    folder: str
    products: Products = FLOAT32
    active: str | None = None
    """File of (N,) bool by position: which rows take part; all where it is None."""
    apart: str | None = None
    """File of (N,) bool by position: rows not compared with each other; none where it is None."""
    neighbors: int = 0
    """How many of the most similar other rows are listed for each row."""

    @property
    def k(self) -> int:
        """How many of the most similar other rows are found for each row: one, even unlisted."""
        return max(1, self.neighbors)

    def active_rows(self, partition: int) -> np.ndarray:
        """(N,) bool: rows of one partition that take part."""
        size = self.files.size(partition)
        if self.active is None:
            return np.ones(size, bool)
        return map_array(self.active, "bool", self.files.starts[partition], (size,))

    def stand_ins(self, partition: int) -> np.ndarray:
        """(N,) int64: for each active row the first identical active one; -1 elsewhere."""
        first = np.asarray(self.files.rows(partition)["first"])
        return first_among(first, self.active_rows(partition))

    def unique_rows(self, partition: int) -> np.ndarray:
        """(M,) int64: numbers of the active rows, of identical ones only the first."""
        stand_ins = self.stand_ins(partition)
        return np.flatnonzero(stand_ins == np.arange(len(stand_ins)))

    def rows_apart(self, positions: np.ndarray) -> np.ndarray:
        """(M,) bool: which rows are not compared with each other."""
        if self.apart is None:
            return np.zeros(len(positions), bool)
        return np.asarray(map_array(self.apart, "bool", 0, (self.files.num_rows,))[positions])

    def met_path(self, item: int) -> str:
        """What one `Meet` task found: edges, and candidates by the partition of their row."""
        return storage.join(self.folder, "met", f"found-{item:06d}.bin")

    def settled_path(self, partition: int) -> str:
        """What one `Settle` task found: edges, twins, similarities; candidates of listed pairs."""
        return storage.join(self.folder, "settled", f"found-{partition:06d}.bin")


@dataclass(frozen=True)
class Joined:
    """What a join found, as files."""

    join: Join
    num_met: int
    """`Meet` tasks."""
    num_pairs: int
    """Pairs above the threshold that were met; a pair may be met more than once."""

    def edges(self) -> Iterator[np.ndarray]:
        """Spanning edges of the threshold graph in shards of (E, 2) int64 positions."""
        for item in range(self.num_met):
            yield ColumnFile.open(self.join.met_path(item))["edges"]
        for partition in range(self.join.files.num_partitions):
            yield ColumnFile.open(self.join.settled_path(partition))["edges"]

    def best(self, partition: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and cosines of the most similar other rows above the threshold.

        Gives (N,) int64, -1 where there is none, and (N,) float32, NaN where there is none.
        """
        file = ColumnFile.open(self.join.settled_path(partition))
        size = self.join.files.size(partition)
        twins, similarities = file.read(["twins", "similarities"], 0, size)
        return twins, similarities


def join_exhaustively(join: Join, engine: Engine) -> Joined:
    """Compare every active row with every other: the exact reference, for small inputs."""
    count = join.files.num_partitions
    pairs = tuple((a, b) for a in range(count) for b in range(a, count))
    return finish_join(join, _MeetAll(join, pairs), len(pairs), engine)


def finish_join(
    join: Join, meet: FileTask[Any, dict[str, Any]], num_met: int, engine: Engine
) -> Joined:
    """Run the `Meet` tasks of a join, then settle every partition."""
    facts = run_file_tasks(engine, meet, num_met, storage.join(join.folder, "met"), "compare")
    settle = _Settle(join, num_met)
    folder = storage.join(join.folder, "settled")
    run_file_tasks(engine, settle, join.files.num_partitions, folder, "settle the most similar")
    return Joined(join, num_met, sum(fact["pairs"] for fact in facts))


@dataclass(frozen=True)
class _MeetAll(FileTask[None, dict[str, Any]]):
    """All pairs between two partitions, or inside one."""

    join: Join
    pairs: tuple[tuple[int, int], ...]

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        first, second = self.pairs[item]
        positions, raw, apart = _unique_vectors(self.join, first)
        blocks = [((0, apart), (0, len(raw)))]
        if first != second:
            more, more_raw, more_apart = _unique_vectors(self.join, second)
            start, end = len(raw), len(raw) + len(more)
            blocks = [((0, apart), (start, end)), ((apart, start), (start, start + more_apart))]
            positions, raw = np.concatenate([positions, more]), np.concatenate([raw, more_raw])
        collector = PairCollector(len(raw), self.join.threshold, raw.__getitem__, self.join.k)
        rows = self.join.products.prepare(raw)
        for own, others in blocks:
            meet_blocks(collector, self.join.products, rows, own, others)
        return write_met(self.join, item, positions, collector)


def meet_blocks(
    collector: PairCollector,
    products: Products,
    rows: Any,
    own: tuple[int, int],
    others: tuple[int, int],
) -> None:
    """Compare the rows of a range with those of another, or each with those behind it.

    rows: (M, D), prepared. own, others: first row and end, of the same range or of two.
    """
    band = products.band(rows.shape[1])
    for left in range(*own, _TILE):
        for right in range(max(left, others[0]), others[1], _TILE):
            block, columns = (
                rows[start : min(start + _TILE, end)]
                for start, end in ((left, own[1]), (right, others[1]))
            )
            found = products.above(block, columns, collector.bound(band))
            a, b, scores = found[0] + left, found[1] + right, found[2]
            if left == right:
                a, b, scores = (values[found[0] < found[1]] for values in (a, b, scores))
            collector.add(a, b, scores, band)


def _unique_vectors(join: Join, partition: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Positions and vectors of a partition's active rows, of identical ones only the first.

    Those that are not compared with each other come last; the number says where they begin.
    """
    rows = join.unique_rows(partition)
    apart = join.rows_apart(rows + join.files.starts[partition])
    rows = np.concatenate([rows[~apart], rows[apart]])
    vectors = join.files.vectors(partition)[rows]
    return rows + join.files.starts[partition], vectors, int((~apart).sum())


def write_met(
    join: Join, item: int, positions: np.ndarray, collector: PairCollector
) -> TaskResult[dict[str, Any]]:
    """Write what a task found. positions: (M,) int64 of the rows that it held."""
    some = collector.candidates()
    found = Candidates(positions[some.rows], positions[some.twins], some.scores, some.bands)
    return write_found(join, item, positions[collector.edges()], found, collector.num_pairs)


def write_found(
    join: Join, item: int, edges: np.ndarray, found: Candidates, num_pairs: int
) -> TaskResult[dict[str, Any]]:
    """Write edges and candidates, candidates by the partition of their row; all are positions."""
    found = found.take(np.argsort(found.rows, kind="stable"))
    bounds = np.searchsorted(found.rows, join.files.starts)  # (P + 1,)
    candidates = {name: getattr(found, name) for name in _CANDIDATE}
    write_columns(join.met_path(item), {"bounds": bounds, "edges": edges, **candidates})
    return TaskResult([join.met_path(item)], {"pairs": num_pairs})


def read_candidates(join: Join, items: Sequence[int], partition: int) -> Candidates:
    """Candidates of one partition's rows from all `Meet` tasks; rows and twins are positions."""
    parts = [Candidates.empty()]
    for item in items:
        file = ColumnFile.open(join.met_path(item))
        start, stop = file["bounds"][partition : partition + 2].tolist()
        if start < stop:
            parts.append(Candidates(*file.read(_CANDIDATE, start, stop)))
    return Candidates.joined(parts)


@dataclass(frozen=True)
class _Settle(FileTask[None, None]):
    """The most similar other row of every row of one partition, scored exactly."""

    join: Join
    num_met: int

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        stand_ins = self.join.stand_ins(item)
        start = self.join.files.starts[item]
        local, exact = self._scored(item, start)
        best = best_of_each(self.join.files, len(stand_ins), local.rows, local.twins, exact)
        copies, firsts = _copies(self.join, stand_ins)
        twins, similarities = _with_copies(self.join, best, stand_ins, start)
        edges = np.stack([firsts, copies], axis=1) + start
        found = {"edges": edges, "twins": twins, "similarities": similarities}
        if self.join.neighbors:
            found |= {"pair_rows": local.rows, "pair_twins": local.twins, "pair_cosines": exact}
        write_columns(self.join.settled_path(item), found)
        return TaskResult([self.join.settled_path(item)], None)

    def _scored(self, item: int, start: int) -> tuple[Candidates, np.ndarray]:
        """Candidates of rows, by their number in the partition, and their exact cosines."""
        found = read_candidates(self.join, range(self.num_met), item).possible_of_any(self.join.k)
        local = Candidates(found.rows - start, found.twins, found.scores, found.bands)
        return local, self._exact(item, local)

    def _exact(self, item: int, found: Candidates) -> np.ndarray:
        """(H,) float32: cosines of candidates, scored in the order of their twins."""
        files, own = self.join.files, np.asarray(self.join.files.vectors(item))
        reader, order = RowReader(files), np.argsort(found.twins, kind="stable")
        exact = np.empty(len(order), np.float32)

        def score(first: int) -> None:
            some = order[first : first + _PAIRS_AT_ONCE]
            twins = reader.gather(found.twins[some])
            exact[some] = exact_similarities(own[found.rows[some]], twins)

        side_by_side(score, range(0, len(order), _PAIRS_AT_ONCE))
        return exact


def best_of_each(
    files: RowFiles, size: int, rows: np.ndarray, twins: np.ndarray, exact: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The twin with the highest cosine, of equals the smallest id, for each of `size` rows.

    rows: (H,) numbers below `size`; twins: (H,) positions; exact: (H,) float32.
    """
    top = np.full(size, -np.inf, np.float32)
    np.maximum.at(top, rows, exact)
    finalists = np.flatnonzero(exact >= top[rows])
    rows, twins, exact = rows[finalists], twins[finalists], exact[finalists]
    ids = files.gather("ids", twins).view(">u8")  # (H, 2)
    order = np.lexsort((twins, ids[:, 1], ids[:, 0], rows))
    _, firsts = np.unique(rows[order], return_index=True)
    chosen = order[firsts]
    best, similarities = np.full(size, -1, np.int64), np.full(size, np.nan, np.float32)
    best[rows[chosen]], similarities[rows[chosen]] = twins[chosen], exact[chosen]
    return best, similarities


def _copies(join: Join, stand_ins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are identical to an earlier one, and that one."""
    if join.threshold >= 1:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    copies = np.flatnonzero((stand_ins >= 0) & (stand_ins != np.arange(len(stand_ins))))
    return copies, stand_ins[copies]


def _with_copies(
    join: Join, best: tuple[np.ndarray, np.ndarray], stand_ins: np.ndarray, start: int
) -> tuple[np.ndarray, np.ndarray]:
    """Let identical rows share their best stranger, and be each other's best where none is."""
    copies, firsts = _copies(join, stand_ins)
    if not len(copies):
        return best
    groups, second = np.unique(firsts, return_index=True)  # copies ascend: the first is smallest
    rows = np.concatenate([copies, groups, copies])
    twins = np.concatenate([firsts, copies[second], best[0][firsts] - start]) + start
    exact = np.concatenate([np.ones(len(copies) + len(groups)), best[1][firsts]])
    known = ~np.isnan(exact)
    own = np.flatnonzero(best[0] >= 0)
    return best_of_each(
        join.files,
        len(stand_ins),
        np.concatenate([rows[known], own]),
        np.concatenate([twins[known], best[0][own]]),
        np.concatenate([exact[known], best[1][own]]).astype(np.float32),
    )
