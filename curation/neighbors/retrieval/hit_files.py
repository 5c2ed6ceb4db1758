"""Hits on their way to the shards of the pool, and to a data set of their own by id.

H hits, S sets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curation import storage
from curation.dataset import ShardInfo, commit, write_shard
from curation.exchange import Exchange
from curation.neighbors.kernels.selection import ranks_within
from curation.neighbors.retrieval.seed_rule import SeedRule
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.packed_rows import pack_rows, unpack_rows
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.rows.shard_batches import BatchExchange, DecideBatch, of_shard
from curation.pool import Pool
from curation.schema import ids_from_bytes, schema_of
from curation.stage import Engine, Shard, reject

HITS = "hits"
HIT_COLUMNS = ("id", "seed_set", "rule", "seed_id", "rank", "similarity", "cluster")

_HITS_PER_SHARD = 1 << 18
_ROWS_PER_BUCKET = 1 << 18
"""Rows of the pool for each bucket of clusters."""


@dataclass(frozen=True)
class HitFiles:
    """The hits of all sets, as files."""

    pool: RowFiles
    """Its indexed rows."""
    by_batch: BatchExchange
    by_id: Exchange
    first_items: tuple[int, ...]
    """(S + 1,): number of the first item of each set that writes hits, then that of all items."""
    set_names: tuple[str, ...]

    @classmethod
    def planned(
        cls,
        rules: Sequence[SeedRule],
        seeds: Sequence[RowFiles],
        indexed: RowFiles,
        pool: Pool,
        folder: str,
    ) -> "HitFiles":
        """Number the items that will write hits, and choose the shards of the hits."""
        counts, expected = [], 0
        for rule, queries in zip(rules, seeds, strict=True):
            sample = rule.rule == "sample"
            counts.append(queries.num_partitions if sample else _buckets_of(indexed))
            most = rule.k * queries.num_rows if sample else rule.cap
            expected += min(most, rule.k * queries.num_rows if sample else indexed.num_rows)
        return cls(
            indexed,
            BatchExchange.of(pool, storage.join(folder, "by-batch")),
            Exchange(storage.join(folder, "by-id"), 1 + expected // _HITS_PER_SHARD),
            tuple(int(first) for first in np.cumsum([0, *counts])),
            tuple(rule.set for rule in rules),
        )

    @property
    def num_items(self) -> int:
        """Items that write hits."""
        return self.first_items[-1]

    @property
    def num_buckets(self) -> int:
        """Buckets over which the clusters of rule cluster are spread."""
        return _buckets_of(self.pool)

    def writer(self, number: int) -> "HitWriter":
        """Writes the hits of one set."""
        return HitWriter(self, number)

    def write_none(self) -> None:
        """Write that there are no hits at all."""
        none = np.empty(0, np.int64)
        for item in range(self.num_items):
            HitWriter(self, 0).write(item, none, none, none)


def _buckets_of(indexed: RowFiles) -> int:
    return 1 + indexed.num_rows // _ROWS_PER_BUCKET


@dataclass(frozen=True)
class HitWriter:
    """Writes the hits of one set, item by item."""

    files: HitFiles
    number: int
    """Of the set."""

    def write(
        self,
        item: int,
        positions: np.ndarray,
        ranks: np.ndarray,
        similarities: np.ndarray,
        *,
        seeds: np.ndarray | None = None,
        clusters: np.ndarray | None = None,
    ) -> list[str]:
        """Write one item's hits to both exchanges; give the files.

        positions: (H,) of images. seeds: (H, 16) uint8 ids of rule sample; clusters: (H,) of rule
        cluster.
        """
        pool, by_batch, by_id = self.files.pool, self.files.by_batch, self.files.by_id
        count = len(positions)
        ids, (shards, rows) = pool.gather("ids", positions), pool.places(positions)
        seeds = np.zeros((count, 16), np.uint8) if seeds is None else seeds
        clusters = np.full(count, -1) if clusters is None else clusters
        hits = pa.table(
            {
                "id": pack_rows(ids),
                "shard": shards,
                "row": rows,
                "set": np.full(count, self.number, np.int32),
                "seed": pack_rows(seeds),
                "rank": ranks.astype(np.int32),
                "similarity": similarities.astype(np.float32),
                "cluster": clusters.astype(np.int32),
            }
        )
        leading = ids[:, :4].copy().view(">u4")[:, 0].astype(np.uint64)
        buckets = (leading * np.uint64(by_id.num_buckets)) >> np.uint64(32)
        item += self.files.first_items[self.number]
        by_batch.send(item, hits)
        by_id.write(item, hits, buckets.astype(np.int64))
        return [by_batch.mapped_path(item), by_id.mapped_path(item)]


def write_hits(hits: HitFiles, folder: str, engine: Engine, attributes: dict[str, Any]) -> None:
    """Write the hits as a data set: sorted by id, set, seed and rank."""
    buckets, written = hits.by_id.num_buckets, storage.join(hits.by_id.folder, "written")
    task = _WriteShard(hits, folder)
    summaries = run_file_tasks(engine, task, buckets, written, "write hits by id")
    infos = [ShardInfo.model_validate(summary) for summary in summaries]
    commit(folder, schema_of(HIT_COLUMNS), infos, attributes)


@dataclass(frozen=True)
class _WriteShard(FileTask[None, dict[str, Any]]):
    """One shard of the hits."""

    hits: HitFiles
    folder: str

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        rows = self.hits.by_id.read(item, self.hits.num_items)
        rows = rows.take(pa.array(_order_of(rows, self.hits.set_names)))
        info = write_shard(self.folder, item, readable_hits(rows, self.hits.set_names))
        return TaskResult([storage.join(self.folder, info.name)], info.model_dump(mode="json"))


def _order_of(rows: pa.Table, set_names: Sequence[str]) -> np.ndarray:
    """(H,) hits by id, name of the set, seed and rank; Arrow's sort by texts takes their square."""
    ids, seeds = (unpack_rows(rows[one]).view(">u8") for one in ("id", "seed"))
    names = np.argsort(np.argsort(np.array([*set_names, ""], object), kind="stable"))
    sets = names[np.asarray(rows["set"])]
    return np.lexsort((np.asarray(rows["rank"]), seeds[:, 1], seeds[:, 0], sets, *ids.T[::-1]))


def readable_hits(rows: pa.Table, set_names: Sequence[str]) -> pa.Table:
    """Hits with the columns that people read."""
    names, clusters = np.array([*set_names, ""], object), np.asarray(rows["cluster"])
    seed_ids = np.array(ids_from_bytes(unpack_rows(rows["seed"])).to_pylist(), object)
    columns = {
        "id": ids_from_bytes(unpack_rows(rows["id"])),
        "seed_set": names[np.asarray(rows["set"])],
        "rule": np.where(clusters < 0, "sample", "cluster").astype(object),
        "seed_id": pa.array(seed_ids, pa.string(), mask=clusters >= 0),
        "rank": rows["rank"],
        "similarity": rows["similarity"],
        "cluster": pa.array(clusters, pa.int32(), mask=clusters < 0),
    }
    return pa.table(columns, schema=schema_of(HIT_COLUMNS))


@dataclass(frozen=True)
class DecideByHits(DecideBatch[pa.Table, None]):
    """Images are kept where hit, with their best hit."""

    hits: HitFiles

    def read(self, batch: int) -> pa.Table:
        """All hits."""
        return self.hits.by_batch.read(batch, self.hits.num_items)

    def decide(self, shard: Shard, found: pa.Table, opened: None) -> None:
        """Drop what was not hit; say of the rest which hit was the best."""
        rows = of_shard(found, shard.index)
        _count_collisions(shard, rows)
        best = best_hits(rows)
        readable = readable_hits(best, self.hits.set_names)
        where = np.asarray(best["row"])
        missed = np.ones(shard.num_rows, bool)
        missed[where] = False
        reject(shard, missed, "not_retrieved")
        for field in self.stage.decision_columns():
            values = np.full(shard.num_rows, None, object)
            values[where] = np.array(readable[field.name].to_pylist(), object)
            shard.note(field.name, values.tolist())


def _count_collisions(shard: Shard, rows: pa.Table) -> None:
    """Count hits, and those beyond the first of an image: by one set, and by others."""
    pairs = np.stack([np.asarray(rows["set"]), np.asarray(rows["row"])], axis=1)
    different = np.unique(pairs, axis=0)
    images = np.unique(pairs[:, 1])
    shard.count("hits", len(pairs))
    shard.count("collisions_within_sets", len(pairs) - len(different))
    shard.count("collisions_between_sets", len(different) - len(images))


def best_hits(rows: pa.Table) -> pa.Table:
    """One hit a row of the shard: sample before cluster, nearest, first set, smallest seed."""
    seeds = unpack_rows(rows["seed"]).view(">u8").reshape(-1, 2)
    keys = (
        seeds[:, 1],
        seeds[:, 0],
        np.asarray(rows["set"]),
        -np.asarray(rows["similarity"]),
        np.asarray(rows["cluster"]) >= 0,
        np.asarray(rows["row"]),
    )
    order = np.lexsort(keys)
    return rows.take(pa.array(order[ranks_within(keys[-1][order]) == 0]))
