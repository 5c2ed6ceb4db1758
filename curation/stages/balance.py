"""Draws a balanced sample: equal shares down the tree of clusters (SPEC A.5, Vo et al. 2024)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation import storage
from curation.dataset import commit, write_shard
from curation.exchange import Exchange
from curation.neighbors.kernels.id_hashes import hash_ids
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.packed_rows import one_chunk
from curation.neighbors.rows.shard_batches import (
    BatchExchange,
    DecideBatch,
    decide_shards,
    of_shard,
)
from curation.pool import Pool
from curation.sampling import (
    TREE_COLUMNS,
    Tree,
    draw_counts,
    leaf_targets,
    level_summary,
    tree_level,
)
from curation.schema import ID, ids_to_bytes, schema_of
from curation.stage import DatasetStage, Engine, Figures, Shard, StageFolder, StageInputs, reject

TREE = "tree"
"""Output with a line a cluster: its parent, its rows, and how many were drawn."""
_ROWS_PER_BUCKET = 1 << 18


class Balance(DatasetStage):
    """Keeps a sample to which every cluster of a level gives as equally as it can."""

    reasons = ("not_drawn",)
    compares_rows = True

    target: int = Field(ge=1)
    """Rows to draw."""
    clusters: str = "clusters"
    """Name of the side-car with the clusters of every row."""
    multiplier: int = Field(default=1, ge=1)
    """How often one row may be drawn; with more than 1, `draws` says how often it was."""

    def required_columns(self) -> tuple[str, ...]:
        """Columns that the stage reads."""
        return ("clusters",)

    def decision_columns(self) -> pa.Schema:
        """The row's cluster, and how often it was drawn."""
        return schema_of(["cluster", "draws"])

    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> Figures:
        """Count the rows of each cluster, share the target out, draw, and tell the shards."""
        pool, scratch = inputs.pool.only(self.clusters), folder.scratch
        buckets = 1 + pool.num_rows // _ROWS_PER_BUCKET
        by_cluster = Exchange(storage.join(scratch, "by-cluster"), buckets)
        send = _SendRows(pool, by_cluster, inputs.seed)
        run_file_tasks(engine, send, pool.num_shards, by_cluster.folder, "count clusters")
        tree = _tree_of(send)
        rng = np.random.default_rng([inputs.seed, 0xBA1A])
        targets = leaf_targets(tree, self.target, rng, multiplier=self.multiplier)
        target_path = storage.join(scratch, "targets.bin")
        write_columns(target_path, {"target": targets[0]})
        by_shard = BatchExchange.of(pool, storage.join(scratch, "by-shard"))
        draw = _Draw(by_cluster, by_shard, pool.num_shards, target_path)
        run_file_tasks(engine, draw, buckets, by_shard.folder, "draw")
        decide_shards(_DecideByDraws(self, inputs.pool, folder, by_shard, buckets), engine)
        levels = [
            write_shard(folder.output(TREE), level, tree_level(tree, targets, level))
            for level in range(tree.num_levels)
        ]
        commit(folder.output(TREE), schema_of(TREE_COLUMNS), levels, {"stage": folder.stage})
        drawn = int(targets[0].sum())
        return {
            "drawn": drawn,
            "shortfall": self.target - drawn,
            "levels": level_summary(tree, targets),
        }


@dataclass(frozen=True)
class _SendRows(FileTask[None, None]):
    """Rows of one shard by cluster, and the paths of clusters that occur in it."""

    pool: Pool
    by_cluster: Exchange
    seed: int

    def paths_path(self, item: int) -> str:
        return storage.join(self.by_cluster.folder, f"paths-{item:06d}.bin")

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        rows = self.pool.read(item, ["clusters"])
        paths = _paths(rows["clusters"])  # (N, levels)
        known, counts = np.unique(paths, axis=0, return_counts=True)
        write_columns(self.paths_path(item), {"path": known, "rows": counts})
        columns = {
            "cluster": paths[:, 0],
            "draw_hash": hash_ids(ids_to_bytes(rows[ID]), "balance", self.seed),
            "shard": np.full(len(paths), item, np.int32),
            "row": np.arange(len(paths), dtype=np.int32),
        }
        self.by_cluster.write(item, pa.table(columns), paths[:, 0] % self.by_cluster.num_buckets)
        files = [self.paths_path(item), self.by_cluster.mapped_path(item)]
        return TaskResult(files, None)


def _paths(column: pa.ChunkedArray) -> np.ndarray:
    """(N, levels) int64: the clusters of each row, leaves first."""
    values = one_chunk(column)
    if len(values) == 0:
        return np.empty((0, 1), np.int64)
    return np.asarray(values.flatten()).astype(np.int64).reshape(len(values), -1)


def _tree_of(send: _SendRows) -> Tree:
    """The tree of all clusters that hold rows; a few numbers a cluster in the driver."""
    files = [ColumnFile.open(send.paths_path(item)) for item in range(send.pool.num_shards)]
    files = [file for file in files if file.num_rows("rows")]  # no row tells no levels
    if not files:
        return Tree(np.zeros(0, np.int64))
    found = np.concatenate([file["path"] for file in files])
    counts = np.concatenate([file["rows"] for file in files])
    sizes = np.bincount(found[:, 0], weights=counts).astype(np.int64)
    parents = []
    for level in range(found.shape[1] - 1):
        above = np.zeros(int(found[:, level].max()) + 1, np.int64)
        above[found[:, level]] = found[:, level + 1]
        parents.append(above)
    return Tree(sizes, tuple(parents))


@dataclass(frozen=True)
class _Draw(FileTask[None, None]):
    """How often each row of some clusters is drawn."""

    by_cluster: Exchange
    by_shard: BatchExchange
    num_items: int
    target_path: str

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        rows = self.by_cluster.read(item, self.num_items)
        targets = ColumnFile.open(self.target_path)["target"]
        own = np.asarray(rows["cluster"])
        counts = draw_counts(np.asarray(rows["draw_hash"]), own, targets)
        told = rows.select(["shard", "row"]).append_column("draws", pa.array(counts))
        told = told.append_column("cluster", pa.array(own.astype(np.int32)))
        self.by_shard.send(item, told)
        return TaskResult([self.by_shard.mapped_path(item)], None)


@dataclass(frozen=True)
class _DecideByDraws(DecideBatch[Any, None]):
    """Rows are kept where drawn."""

    by_shard: BatchExchange
    num_items: int

    def read(self, batch: int) -> pa.Table:
        """How often rows were drawn."""
        return self.by_shard.read(batch, self.num_items)

    def decide(self, shard: Shard, found: pa.Table, opened: None) -> None:
        """Drop what was not drawn; say of the rest how often, and from which cluster."""
        found = of_shard(found, shard.index)
        rows = np.asarray(found["row"])
        draws, clusters = (np.zeros(shard.num_rows, np.int32) for _ in range(2))
        draws[rows], clusters[rows] = np.asarray(found["draws"]), np.asarray(found["cluster"])
        reject(shard, draws == 0, "not_drawn")
        shard.note("cluster", clusters)
        shard.note("draws", draws)
