"""Rows that repeat another in one column, found by exchange: once by that column, once by shard."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation import storage
from curation.exchange import Exchange, Mapper, Reducer, Result, bucket_of_ids
from curation.pool import Pool
from curation.schema import ID
from curation.stage import Engine

_ROWS_PER_BUCKET = 1 << 20

Order = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class KeyDuplicates:
    """Which rows count as repeats, and which of each group is the first."""

    pool: Pool
    key: str
    """Column of 32 hex characters that repeats share."""
    columns: tuple[str, ...]
    """Columns that `order` and the writer need."""
    order: Order
    """The first row by (column, "ascending" | "descending"), then by id, is no repeat."""
    base: tuple[Pool, ...] = ()
    """What earlier deliveries kept: such a row comes before any other, and is no repeat."""
    base_key: str = ""
    """Column of the base that is held against `key`; `key` itself where it is empty."""

    def run(self, engine: Engine, scratch: str, writer: Reducer[Result]) -> list[Result]:
        """Find the repeats and hand those of each shard to `writer`; give what it says.

        The writer's rows have id, twin (the first of the group), and each of `columns` and the
        number of the shard for the row itself and, as `twin_<column>`, for its twin; the shard is
        -1 for a twin in the base.
        """
        pools = (self.pool, *self.base)
        buckets = max(1, -(-sum(pool.num_rows for pool in pools) // _ROWS_PER_BUCKET))
        groups = Exchange(storage.join(scratch, "groups"), buckets)
        shards = [(number, shard) for number in range(len(pools)) for shard in self._shards(number)]
        groups.run(engine, _ByKey(self, buckets), shards, _FindFirst(self, groups.folder))
        back = Exchange(storage.join(scratch, "repeats"), self.pool.num_shards)
        return back.run(engine, _ByShard(groups.folder), range(buckets), writer)

    def read(self, number: int, shard: int) -> pa.Table:
        """One shard's rows, of the pool (0) or of a base: id, key, columns and shard."""
        if number == 0:
            rows = self.pool.read(shard, [self.key, *self.columns])
        else:
            key = self.base_key or self.key
            rows = self.base[number - 1].read(shard, [key, *self.columns])
            rows = rows if key == self.key else rows.append_column(self.key, rows[key])
            rows, shard = rows.select([ID, self.key, *self.columns]), -1
        return rows.append_column("shard", pa.array(np.full(rows.num_rows, shard), pa.int64()))

    def _shards(self, number: int) -> range:
        return range((self.pool, *self.base)[number].num_shards)


@dataclass(frozen=True)
class _ByKey(Mapper[tuple[int, int]]):
    duplicates: KeyDuplicates
    num_buckets: int

    def __call__(self, item: tuple[int, int]) -> tuple[pa.Table, np.ndarray]:
        rows = self.duplicates.read(*item)
        return rows, bucket_of_ids(rows[self.duplicates.key], self.num_buckets)


@dataclass(frozen=True)
class _FindFirst(Reducer[int]):
    """Writes the repeats of one bucket, each with the first of its group."""

    duplicates: KeyDuplicates
    folder: str

    def __call__(self, bucket: int, rows: pa.Table) -> int:
        key = self.duplicates.key
        rows = rows.append_column("is_new", pa.array(np.asarray(rows["shard"]) >= 0))
        first_of_all = ((key, "ascending"), ("is_new", "ascending"))
        rows = rows.sort_by([*first_of_all, *self.duplicates.order, (ID, "ascending")])
        keys = np.asarray(rows[key].to_numpy(zero_copy_only=False))
        first = np.ones(len(keys), bool)
        first[1:] = keys[1:] != keys[:-1]
        leader = np.maximum.accumulate(np.where(first, np.arange(len(keys)), 0))
        leaders = rows.take(pa.array(leader))
        for column in (*self.duplicates.columns, "shard"):
            rows = rows.append_column(f"twin_{column}", leaders[column])
        repeats = rows.append_column("twin", leaders[ID])
        repeats = repeats.filter(pa.array(~first & np.asarray(rows["is_new"])))
        storage.write_parquet(_repeats_path(self.folder, bucket), repeats)
        return int(repeats.num_rows)


@dataclass(frozen=True)
class _ByShard(Mapper[int]):
    folder: str

    def __call__(self, item: int) -> tuple[pa.Table, np.ndarray]:
        repeats = storage.read_parquet(_repeats_path(self.folder, item))
        return repeats, repeats["shard"].to_numpy()


def _repeats_path(folder: str, bucket: int) -> str:
    return storage.join(folder, "found", f"{bucket:06d}.parquet")
