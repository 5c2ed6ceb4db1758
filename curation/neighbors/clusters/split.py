"""Splitting a level: each of its clusters is clustered inside itself, a bucket of them at a time.

So ten million centroids come of 100,000 without ever being trained or held at once (SPEC A.5). All
rows travel once to the bucket of their cluster; there a sample of each cluster trains its leaves,
and each row finds the nearest leaf of its own cluster.
N rows, C clusters, L leaves, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation import storage
from curation.exchange import Exchange
from curation.neighbors.clusters.assignment import Assignment, FindOwners
from curation.neighbors.clusters.levels import rows_of_level, write_level_part
from curation.neighbors.clusters.passes import Fit
from curation.neighbors.kernels.id_hashes import hash_ids, share_bound
from curation.neighbors.kernels.k_means import lloyd
from curation.neighbors.kernels.quantized import (
    nearest_centroids,
    quantize_centroids,
    quantize_rows,
)
from curation.neighbors.kernels.threads import limit_threads
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.packed_rows import pack_rows, unpack_rows
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.rows.shard_batches import BatchExchange
from curation.neighbors.rows.vectors import exact_similarities
from curation.stage import Engine

_ROWS_PER_BUCKET = 1 << 18
"""Rows of the clusters that one task splits, about."""
_ROWS_AT_ONCE = 1 << 16
"""Rows of a bucket that are held at once."""
_SAMPLE_PER_LEAF = 64
"""Rows that train a leaf, as many as train a centroid before passes over all rows."""


@dataclass(frozen=True)
class SplitPlan:
    """Which leaves each cluster gets, and in which bucket they are found."""

    path: str
    """File of columns: rows (C,), first_leaf (C + 1,), bucket (C,) of each cluster."""
    cluster_starts: tuple[int, ...]
    """(B + 1,): first cluster of each bucket, then their number."""
    leaf_starts: tuple[int, ...]
    """(B + 1,): first leaf of each bucket, then their number."""

    @classmethod
    def written(cls, path: str, counts: np.ndarray, split: int) -> "SplitPlan":
        """Plan so many leaves a cluster, or as many as it has rows. counts: (C,) rows."""
        leaves = np.concatenate([[0], np.cumsum(np.minimum(counts, split))])
        before = np.concatenate([[0], np.cumsum(counts)[:-1]])
        buckets = before // _ROWS_PER_BUCKET
        firsts = np.flatnonzero(np.diff(buckets, prepend=-1))
        buckets = np.searchsorted(firsts, np.arange(len(counts)), "right") - 1
        write_columns(path, {"rows": counts, "first_leaf": leaves, "bucket": buckets})
        starts = [*firsts.tolist(), len(counts)]
        return cls(path, tuple(starts), tuple(leaves[starts].tolist()))

    @property
    def num_buckets(self) -> int:
        """Number of buckets."""
        return len(self.cluster_starts) - 1

    def load(self) -> ColumnFile:
        """Columns rows, first_leaf and bucket."""
        return ColumnFile.open(self.path)


def split_clusters(
    assignment: Assignment,
    split: int,
    fit: Fit,
    folder: str,
    by_shard: BatchExchange,
    engine: Engine,
) -> tuple[RowFiles, int]:
    """Split every cluster inside itself; give the leaves, and how many items told the shards.

    by_shard: receives shard, row, cluster (the leaf) and similarity of all rows.
    """
    files = assignment.files
    owners = FindOwners(assignment, storage.join(folder, "parents"))
    owners.run(engine, "assign to clusters")
    plan = SplitPlan.written(storage.join(folder, "plan.bin"), owners.counts(), split)
    by_cluster = Exchange(storage.join(folder, "by-cluster"), plan.num_buckets)
    send = _SendRows(owners, plan, by_cluster, _SAMPLE_PER_LEAF * split, fit.seed)
    partitions = files.num_partitions
    run_file_tasks(engine, send, partitions, by_cluster.folder, "rows to their clusters")
    leaves = rows_of_level(storage.join(folder, "leaves"), files.width, plan.leaf_starts)
    task = _FindLeaves(files, leaves, plan, by_cluster, by_shard, fit)
    run_file_tasks(engine, task, plan.num_buckets, by_shard.folder, "split the clusters")
    return leaves, plan.num_buckets


@dataclass(frozen=True)
class _SendRows(FileTask[ColumnFile, None]):
    """Rows of one partition, sent to the bucket of their cluster."""

    owners: FindOwners
    plan: SplitPlan
    by_cluster: Exchange
    most_trained: int
    """Rows of a cluster that train its leaves, about."""
    seed: int

    def open(self) -> ColumnFile:
        return self.plan.load()

    def __call__(self, item: int, opened: ColumnFile) -> TaskResult[None]:
        files, owners = self.owners.of.files, self.owners.owners(item)
        places = files.rows(item)
        draw_hashes = hash_ids(files.ids(item), "split", self.seed)
        columns = {
            "cluster": owners,
            "draw_hash": draw_hashes,
            "trains": draw_hashes <= share_bound(self.most_trained / opened["rows"][owners]),
            "shard": places["shard"],
            "row": places["row"],
            "vector": pack_rows(files.vectors(item)),
        }
        self.by_cluster.write(item, pa.table(columns), opened["bucket"][owners])
        return TaskResult([self.by_cluster.mapped_path(item)], None)


@dataclass(frozen=True)
class _FindLeaves(FileTask[np.ndarray, None]):
    """The leaves of the clusters of one bucket, and the leaf of each of their rows."""

    files: RowFiles
    leaves: RowFiles
    plan: SplitPlan
    by_cluster: Exchange
    by_shard: BatchExchange
    fit: Fit

    def open(self) -> np.ndarray:
        """(C + 1,): first leaf of each cluster."""
        limit_threads(self.fit.threads)
        return self.plan.load()["first_leaf"]

    def __call__(self, item: int, opened: np.ndarray) -> TaskResult[None]:
        first_leaves = opened - self.plan.leaf_starts[item]
        centroids = self._train(item, first_leaves)
        paths = write_level_part(self.leaves, item, centroids)
        told = [self._assign(rows, item, centroids, first_leaves) for rows in self._chunks(item)]
        self.by_shard.send(item, pa.concat_tables(told))
        return TaskResult([*paths, self.by_shard.mapped_path(item)], None)

    def _train(self, item: int, first_leaves: np.ndarray) -> np.ndarray:
        """(L, D) float32: leaves of the clusters of a bucket, in their order."""
        rows = pa.concat_tables(
            [some.filter(some["trains"]) for some in self._chunks(item)]
        ).combine_chunks()
        vectors = unpack_rows(rows["vector"], self.files.dtype)
        draw_hashes = np.asarray(rows["draw_hash"])
        first, stop = self.plan.cluster_starts[item : item + 2]
        leaves = np.empty((first_leaves[stop] - first_leaves[first], self.files.width), np.float32)
        for cluster, own in _by_cluster(rows):
            some = vectors[own[np.argsort(draw_hashes[own], kind="stable")]]
            part = slice(first_leaves[cluster], first_leaves[cluster + 1])
            rng = np.random.default_rng([self.fit.seed, 3, cluster])
            leaves[part] = lloyd(some, int(part.stop - part.start), self.fit.iterations, rng)
        return leaves

    def _assign(
        self, rows: pa.Table, item: int, centroids: np.ndarray, first_leaves: np.ndarray
    ) -> pa.Table:
        """Shard, row, leaf and similarity of some rows of a bucket."""
        vectors = unpack_rows(rows["vector"], self.files.dtype)
        leaf = np.empty(rows.num_rows, np.int64)
        for cluster, own in _by_cluster(rows):
            part = slice(first_leaves[cluster], first_leaves[cluster + 1])
            codes = quantize_centroids(centroids[part])
            leaf[own] = part.start + nearest_centroids(quantize_rows(vectors[own]), codes)
        columns = {
            "shard": rows["shard"],
            "row": rows["row"],
            "cluster": (leaf + self.plan.leaf_starts[item]).astype(np.int32),
            "similarity": exact_similarities(vectors, centroids[leaf]),
        }
        return pa.table(columns)

    def _chunks(self, item: int) -> Iterator[pa.Table]:
        """Rows of a bucket, some ten thousand at a time, in the order of their positions."""
        held: list[pa.Table] = []
        for part in self.by_cluster.parts(item, self.files.num_partitions):
            held.append(part)
            if sum(one.num_rows for one in held) >= _ROWS_AT_ONCE:
                yield pa.concat_tables(held).combine_chunks()
                held = []
        if held:
            yield pa.concat_tables(held).combine_chunks()


def _by_cluster(rows: pa.Table) -> Iterator[tuple[int, np.ndarray]]:
    """Clusters that occur in some rows, and which rows are theirs, in order."""
    clusters = np.asarray(rows["cluster"])
    order = np.argsort(clusters, kind="stable")
    known, starts = np.unique(clusters[order], return_index=True)
    for cluster, own in zip(known, np.split(order, starts[1:]), strict=True):
        yield int(cluster), own
