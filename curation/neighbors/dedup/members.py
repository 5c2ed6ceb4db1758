"""The members of components: brought together, and in the order in which a rule sees them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from curation.exchange import Exchange
from curation.neighbors.dedup.threshold_graph import ThresholdGraph
from curation.neighbors.rows.file_tasks import FileTask, TaskResult
from curation.neighbors.rows.packed_rows import id_keys, pack_rows, unpack_rows
from curation.neighbors.rows.row_files import RowFiles, RowReader
from curation.neighbors.rows.vectors import exact_similarities

_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Members:
    """M rows of whole components, one component after the other.

    Inside a component published rows come first, then those with most original pixels, then with
    most bytes, then by id. Where sizes are unknown they are 0, and the smallest id decides alone.
    """

    table: pa.Table
    """label, position, set, shard, row, pixels, num_bytes, id, twin, twin_set, similarity."""
    published: np.ndarray
    """(M,) bool: rows that an earlier delivery kept."""
    files: RowFiles

    @classmethod
    def ordered(cls, table: pa.Table, first_base: int | None, files: RowFiles) -> "Members":
        """Rows in any order. first_base: number of the first set of published rows, if any."""
        published = np.zeros(table.num_rows, bool)
        if first_base is not None:
            published = np.asarray(table["set"]) >= first_base
        label, pixels, num_bytes = (np.asarray(table[n]) for n in ("label", "pixels", "num_bytes"))
        first, second = id_keys(unpack_rows(table["id"]))
        order = np.lexsort((second, first, -num_bytes, -pixels, ~published, label))
        return cls(table.take(pa.array(order)).combine_chunks(), published[order], files)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, column: str) -> np.ndarray:
        """(M,): a column of numbers."""
        return np.asarray(self.table[column])

    @cached_property
    def ids(self) -> np.ndarray:
        """(M, 16) uint8."""
        return unpack_rows(self.table["id"])

    @cached_property
    def positions(self) -> np.ndarray:
        """(M,) int64."""
        return self["position"]

    @cached_property
    def _reader(self) -> RowReader:
        return RowReader(self.files)

    @cached_property
    def bounds(self) -> np.ndarray:
        """(C + 1,) int64: first member of each component, then their number."""
        starts = np.flatnonzero(np.diff(self["label"], prepend=-1))
        return np.append(starts, len(self))

    @property
    def sizes(self) -> np.ndarray:
        """(C,) int64: rows of each component."""
        return np.diff(self.bounds)

    @property
    def firsts(self) -> np.ndarray:
        """(M,) int64: the first member of each row's component."""
        return np.repeat(self.bounds[:-1], self.sizes)

    def components(self) -> Iterator[slice]:
        """The members of each component."""
        for start, stop in zip(self.bounds[:-1], self.bounds[1:], strict=True):
            yield slice(int(start), int(stop))

    def take(self, which: np.ndarray) -> "Members":
        """Some whole components. which: (M,) bool."""
        table = self.table.filter(pa.array(which)).combine_chunks()
        return Members(table, self.published[which], self.files)

    def vectors(self, which: slice | np.ndarray) -> np.ndarray:
        """Vectors of some members, as stored."""
        return self._reader.gather(self.positions[which])

    def similarities(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """(H,) float32: exact cosines of pairs of members. left, right: (H,) their numbers."""
        found = np.empty(len(left), np.float32)
        for start in range(0, len(left), _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            pairs = np.stack([left[some], right[some]])
            known, numbers = np.unique(self["position"][pairs], return_inverse=True)
            vectors = self.files.gather("vectors", known)  # both at once: a partition is read once
            a, b = numbers.reshape(pairs.shape)
            found[some] = exact_similarities(vectors[a], vectors[b])
        return found


@dataclass(frozen=True)
class GatherMembers(FileTask[None, None]):
    """The members of components among one partition's rows, by component."""

    graph: ThresholdGraph
    members: Exchange

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        """Send the rows that have a twin to the bucket of their component."""
        files = self.graph.files
        twins, similarities = self.graph.joined.best(item)
        rows = np.flatnonzero(twins >= 0)
        labels = np.asarray(self.graph.labels(item)[rows], np.int64)
        stored, twins = files.rows(item), np.asarray(twins[rows])
        columns: dict[str, Any] = {
            **{name: stored[name][rows] for name in ("set", "shard", "row", "pixels", "num_bytes")},
            "label": labels,
            "position": rows + files.starts[item],
            "id": pack_rows(stored["ids"][rows]),
            "twin": pack_rows(files.gather("ids", twins)),
            "twin_set": self._sets_of(twins),
            "similarity": np.asarray(similarities[rows]),
        }
        # Those of neighboring labels are judged together: their vectors lie near each other.
        self.members.write(
            item, pa.table(columns), labels * self.members.num_buckets // files.num_rows
        )
        return TaskResult([self.members.mapped_path(item)], None)

    def _sets_of(self, twins: np.ndarray) -> np.ndarray:
        """(M,) int16: the twins' sets, where rows of several are joined for duplicates; else 0."""
        if self.graph.joined.join.apart is None:
            return np.zeros(len(twins), np.int16)
        return self.graph.files.gather("set", twins)
