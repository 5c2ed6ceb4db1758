"""Rule cluster: images drawn from the clusters into which enough seeds of a set fall.

Seeds are counted in each cluster; the pool's rows in seeded clusters travel to buckets of clusters,
where each set draws its share. C clusters, N rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation import storage
from curation.exchange import Exchange
from curation.neighbors.clusters.centroids import Centroids
from curation.neighbors.kernels.id_hashes import hash_ids
from curation.neighbors.kernels.k_means import assign_exactly
from curation.neighbors.kernels.selection import ranks_within
from curation.neighbors.retrieval.hit_files import HitFiles, HitWriter
from curation.neighbors.retrieval.seed_rule import SeedRule
from curation.neighbors.rows.column_file import ColumnFile, write_columns
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.row_files import RowFiles
from curation.stage import Engine


@dataclass(frozen=True)
class ClusterRule:
    """The draw of some seed sets from the clusters of the pool."""

    pool: RowFiles
    centroids: Centroids
    rules: Mapping[int, SeedRule]
    """By the number of the set."""
    seed: int
    folder: str

    def run(
        self, seeds: Mapping[int, RowFiles], hits: HitFiles, engine: Engine
    ) -> dict[str, dict[str, int]]:
        """Draw and write the hits of all sets; give the figures of each."""
        counts = {number: self._count(number, seeds[number], engine) for number in self.rules}
        seeded = {str(n): counts[n] >= rule.min_hits for n, rule in self.rules.items()}
        write_columns(self.seeded_path, seeded)
        clusters = Exchange(storage.join(self.folder, "by-cluster"), hits.num_buckets)
        assign = _AssignRows(self, clusters)
        partitions = self.pool.num_partitions
        run_file_tasks(engine, assign, partitions, clusters.folder, "assign to clusters")
        figures = {}
        for number, rule in self.rules.items():
            found = self._draw(number, clusters, hits.writer(number), engine)
            clusters_of_set = int(seeded[str(number)].sum())
            figures[rule.set] = {
                "seeds": seeds[number].num_rows,
                "clusters": clusters_of_set,
            } | found
        return figures

    @property
    def seeded_path(self) -> str:
        """File of a column (C,) bool for each set: which clusters it draws from."""
        return storage.join(self.folder, "seeded.bin")

    def _count(self, number: int, seeds: RowFiles, engine: Engine) -> np.ndarray:
        """(C,) int64: seeds of one set in each cluster."""
        task = _CountSeeds(seeds, self.centroids, storage.join(self.folder, f"seeds-{number}"))
        run_file_tasks(engine, task, seeds.num_partitions, task.folder, "count seeds")
        paths = map(task.path, range(seeds.num_partitions))
        return np.asarray(sum(ColumnFile.open(path)["count"] for path in paths))

    def _draw(
        self, number: int, clusters: Exchange, hits: HitWriter, engine: Engine
    ) -> dict[str, int]:
        rule, buckets = self.rules[number], clusters.num_buckets
        draw = _Draw(self, number, clusters)
        drawn = run_file_tasks(engine, draw, buckets, draw.folder, "draw from clusters")
        write = _WriteHits(draw, hits, cap_bound(draw, rule.cap))
        written = storage.join(draw.folder, "hits")
        found = run_file_tasks(engine, write, buckets, written, "write hits")
        return {"before_cap": sum(drawn), "hits": sum(found)}


@dataclass(frozen=True)
class _CountSeeds(FileTask[None, None]):
    """Seeds of one partition in each cluster."""

    seeds: RowFiles
    centroids: Centroids
    folder: str

    def path(self, item: int) -> str:
        return storage.join(self.folder, f"counts-{item:06d}.bin")

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        nearest, _ = assign_exactly(self.seeds.vectors(item), self.centroids.load())
        counts = np.bincount(nearest, minlength=self.centroids.count)
        write_columns(self.path(item), {"count": counts})
        return TaskResult([self.path(item)], None)


@dataclass(frozen=True)
class _AssignRows(FileTask[None, None]):
    """Rows of one partition of the pool that lie in clusters from which some set draws."""

    of: ClusterRule
    clusters: Exchange

    def __call__(self, item: int, opened: None) -> TaskResult[None]:
        nearest, cosines = assign_exactly(self.of.pool.vectors(item), self.of.centroids.load())
        seeded = ColumnFile.open(self.of.seeded_path)
        of_any = np.logical_or.reduce([seeded[str(number)] for number in self.of.rules])
        rows = np.flatnonzero(of_any[nearest])
        columns = {
            "position": rows + self.of.pool.starts[item],
            "cluster": nearest[rows],
            "similarity": cosines[rows],
        }
        self.clusters.write(item, pa.table(columns), nearest[rows] % self.clusters.num_buckets)
        return TaskResult([self.clusters.mapped_path(item)], None)


@dataclass(frozen=True)
class _Draw(FileTask[None, int]):
    """What one set draws from the clusters of one bucket: the rows with the smallest hash."""

    of: ClusterRule
    number: int
    clusters: Exchange

    @property
    def folder(self) -> str:
        return storage.join(self.clusters.folder, f"set-{self.number}")

    def drawn(self, bucket: int) -> ColumnFile:
        """position, cluster, similarity, rank and cap_hash of the rows drawn in one bucket."""
        return ColumnFile.open(self._path(bucket))

    def _path(self, bucket: int) -> str:
        return storage.join(self.folder, f"drawn-{bucket:06d}.bin")

    def __call__(self, item: int, opened: None) -> TaskResult[int]:
        table = self.clusters.read(item, self.of.pool.num_partitions)
        rows = {name: np.asarray(table[name]) for name in table.column_names}
        seeded = ColumnFile.open(self.of.seeded_path)[str(self.number)]
        rule, some = self.of.rules[self.number], np.flatnonzero(seeded[rows["cluster"]])
        ids = self.of.pool.gather("ids", rows["position"][some])
        draw_hashes = hash_ids(ids, "draw", rule.set, self.of.seed)
        order = np.lexsort((draw_hashes, rows["cluster"][some]))
        ranks = ranks_within(rows["cluster"][some][order])
        order, ranks = order[ranks < rule.per_cluster], ranks[ranks < rule.per_cluster]
        columns = {name: column[some][order] for name, column in rows.items()}
        cap_hashes = hash_ids(ids, "cap", rule.set, self.of.seed)[order]
        write_columns(self._path(item), {**columns, "rank": ranks + 1, "cap_hash": cap_hashes})
        return TaskResult([self._path(item)], len(order))


def cap_bound(draw: _Draw, cap: int) -> int:
    """Cap hashes up to this one stay, so that at most `cap` rows do; holds `cap` of them."""
    hashes = np.empty(0, np.uint64)
    for bucket in range(draw.clusters.num_buckets):
        hashes = np.sort(np.concatenate([hashes, draw.drawn(bucket)["cap_hash"]]))[:cap]
    return int(hashes[-1]) if len(hashes) == cap else (1 << 64) - 1


@dataclass(frozen=True)
class _WriteHits(FileTask[None, int]):
    """The hits of one set in one bucket of clusters, after the cap; gives their number."""

    draw: _Draw
    hits: HitWriter
    bound: int

    def __call__(self, item: int, opened: None) -> TaskResult[int]:
        drawn = self.draw.drawn(item)
        kept = drawn["cap_hash"] <= np.uint64(self.bound)
        names = ("position", "rank", "similarity", "cluster")
        positions, ranks, similarities, clusters = (drawn[name][kept] for name in names)
        files = self.hits.write(item, positions, ranks, similarities, clusters=clusters)
        return TaskResult(files, len(positions))
