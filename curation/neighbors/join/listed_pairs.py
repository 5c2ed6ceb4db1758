"""Listed pairs: of each row its k most similar other rows above the threshold, as a data set.

The join finds them among rows that stand for identical ones; here copies come back in. One task a
partition of rows, in the order of rank. N rows of a partition, H pairs, S rows that stand for
others, k pairs a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curation import storage
from curation.dataset import ShardInfo, commit, write_shard
from curation.neighbors.join.join import Join, Joined
from curation.neighbors.kernels.selection import ranks_within
from curation.neighbors.rows.column_file import ColumnFile
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.schema import ids_from_bytes, schema_of
from curation.stage import Engine

PAIRS = "pairs"
PAIR_COLUMNS = ("id", "rank", "twin", "twin_set", "similarity")

_ROWS_AT_ONCE = 1 << 13


def write_pairs(
    joined: Joined, folder: str, base_set: str | None, engine: Engine, attributes: dict[str, Any]
) -> int:
    """Write the pairs of the pool's rows, and give their number.

    base_set: what `twin_set` says of rows that are not of the pool.
    """
    join = joined.join
    work = _List(join, folder, base_set)
    receipts = storage.join(join.folder, "listed")
    facts = run_file_tasks(engine, work, join.files.num_partitions, receipts, "list pairs")
    infos = [ShardInfo.model_validate(fact) for fact in facts]
    commit(folder, schema_of(PAIR_COLUMNS), infos, attributes)
    return sum(info.num_rows for info in infos)


@dataclass(frozen=True)
class _Pairs:
    """Rows of a partition, and rows of any that they are similar to."""

    rows: np.ndarray
    """(H,) int64: numbers in the partition."""
    twins: np.ndarray
    """(H,) int64: positions."""
    exact: np.ndarray
    """(H,) float32: cosines."""

    @classmethod
    def joined(cls, parts: list["_Pairs"]) -> "_Pairs":
        """All pairs of some parts."""
        names = ("rows", "twins", "exact")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def take(self, which: np.ndarray) -> "_Pairs":
        return _Pairs(self.rows[which], self.twins[which], self.exact[which])

    def nearest(self, join: Join) -> "_Pairs":
        """The k most similar of each row, nearest first (ties: smallest id)."""
        ids = join.files.gather("ids", self.twins).view(">u8")  # (H, 2)
        order = np.lexsort((self.twins, ids[:, 1], ids[:, 0], -self.exact, self.rows))
        return self.take(order[ranks_within(self.rows[order]) < join.neighbors])


@dataclass(frozen=True)
class _List(FileTask[None, dict[str, Any]]):
    """The pairs of one partition's rows: one shard."""

    join: Join
    folder: str
    base_set: str | None

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        sets = np.asarray(self.join.files.rows(item)["set"])
        of_pool = [some.take(sets[some.rows] == 0) for some in self._pairs(item)]
        tables = [self._table(item, some) for some in of_pool]
        empty = schema_of(PAIR_COLUMNS).empty_table()
        info = write_shard(self.folder, item, pa.concat_tables([empty, *tables]))
        return TaskResult([storage.join(self.folder, info.name)], info.model_dump(mode="json"))

    def _pairs(self, item: int) -> Iterator[_Pairs]:
        """Pairs of some rows at a time: with strangers, and with copies of themselves."""
        groups = _groups_of(self.join, item)
        strangers = self._strangers(item)
        for start in range(0, len(groups.rows), _ROWS_AT_ONCE):
            own = groups.rows[start : start + _ROWS_AT_ONCE]
            shared = _of_stand_ins(strangers, groups.stand_ins[own], own)
            both = _Pairs.joined([shared, self._copies(item, groups, own)])
            yield both.nearest(self.join)

    def _strangers(self, item: int) -> _Pairs:
        """The k nearest strangers of the rows that stand for others, with the copies of each."""
        file = ColumnFile.open(self.join.settled_path(item))
        names = ["pair_rows", "pair_twins", "pair_cosines"]
        found = _Pairs(*file.read(names, 0, file.num_rows(names[0]))).nearest(self.join)
        return _with_copies(self.join, found).nearest(self.join)

    def _copies(self, item: int, groups: "_Groups", own: np.ndarray) -> _Pairs:
        """Each row with the first k other rows that are identical to it."""
        if self.join.threshold >= 1:
            own = own[:0]
        which, members = groups.members(groups.stand_ins[own], self.join.neighbors + 1)
        rows = own[which]
        others = rows != members
        twins = members[others] + self.join.files.starts[item]
        return _Pairs(rows[others], twins, np.ones(len(twins), np.float32))

    def _table(self, item: int, pairs: _Pairs) -> pa.Table:
        files = self.join.files
        ids = ids_from_bytes(files.ids(item)[pairs.rows])
        columns = {
            "id": ids,
            "rank": pa.array(ranks_within(pairs.rows) + 1, pa.int32()),
            "twin": ids_from_bytes(files.gather("ids", pairs.twins)),
            "twin_set": pa.array(self._set_names(pairs.twins), pa.string()),
            "similarity": pa.array(pairs.exact, pa.float32()),
        }
        return pa.table(columns, schema=schema_of(PAIR_COLUMNS))

    def _set_names(self, positions: np.ndarray) -> np.ndarray:
        names = np.full(len(positions), None, object)
        if self.base_set is not None:
            for partition, where in self.join.files.by_partition(positions):
                sets = np.asarray(self.join.files.rows(partition)["set"])
                other = sets[positions[where] - self.join.files.starts[partition]] != 0
                names[where[other]] = self.base_set
        return names


@dataclass(frozen=True)
class _Groups:
    """Active rows of a partition by the row that stands for them."""

    stand_ins: np.ndarray
    """(N,) int64: for each row of the partition, -1 where it takes no part."""
    rows: np.ndarray
    """(M,) int64: rows that take part, sorted by who stands for them, then by number."""
    owners: np.ndarray
    """(M,) int64: who stands for each of these."""

    def members(self, stand_ins: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The first rows that each of some rows stands for: which of them, and the row."""
        first = np.searchsorted(self.owners, stand_ins)
        counts = np.minimum(np.searchsorted(self.owners, stand_ins, "right") - first, most)
        which = np.repeat(np.arange(len(stand_ins)), counts)
        inside = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        return which, self.rows[first[which] + inside]


def _groups_of(join: Join, partition: int) -> _Groups:
    stand_ins = join.stand_ins(partition)
    rows = np.flatnonzero(stand_ins >= 0)
    rows = rows[np.argsort(stand_ins[rows], kind="stable")]
    return _Groups(stand_ins, rows, stand_ins[rows])


def _of_stand_ins(strangers: _Pairs, stand_ins: np.ndarray, rows: np.ndarray) -> _Pairs:
    """Give rows the strangers of the row that stands for them. strangers: sorted by row."""
    first = np.searchsorted(strangers.rows, stand_ins)
    counts = np.searchsorted(strangers.rows, stand_ins, "right") - first
    which = np.repeat(np.arange(len(rows)), counts)
    inside = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    taken = first[which] + inside
    return _Pairs(rows[which], strangers.twins[taken], strangers.exact[taken])


def _with_copies(join: Join, pairs: _Pairs) -> _Pairs:
    """Pairs with twins that stand for others, and with the first k of those that they stand for."""
    parts = [pairs.take(np.empty(0, np.int64))]
    for partition, where in join.files.by_partition(pairs.twins):
        start = join.files.starts[partition]
        groups = _groups_of(join, partition)
        which, members = groups.members(pairs.twins[where] - start, join.neighbors)
        found = pairs.take(where[which])
        parts.append(_Pairs(found.rows, members + start, found.exact))
    return _Pairs.joined(parts)
