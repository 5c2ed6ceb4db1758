"""Clusters the pool: k-means out of core, and levels of clusters above it (SPEC A.5)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from curation import storage
from curation.clustering import train_centroids
from curation.dataset import commit, write_shard
from curation.exchange import Exchange
from curation.ledger import Receipt, commit_shard, finished_shards
from curation.neighbors.layout import Comparison, lay_out, sources_of, threads_of
from curation.neighbors.levels import Level, level_above, refine
from curation.neighbors.partition import read_bad_rows
from curation.neighbors.quantized import nearest_centroids, quantize_centroids, quantize_rows
from curation.neighbors.row_files import RowFiles
from curation.neighbors.steps import Done, Work, run_steps
from curation.neighbors.vectors import exact_similarities
from curation.pool import Pool
from curation.schema import schema_of
from curation.stage import DatasetStage, Engine, Shard, StageFolder, StageInputs, Task, reject

CLUSTERS = "clusters"
CENTROIDS = "centroids"


class Cluster(DatasetStage):
    """Finds the cluster of every row, and the clusters of clusters above it."""

    reasons = ("bad_vector",)

    embeddings: str
    """Name of the side-car with the vectors."""
    embedding_column: str = "embedding"
    """Its column of vectors."""
    levels: tuple[int, ...] = Field(min_length=1)
    """Clusters of each level, the lowest first."""
    iterations: int = Field(default=10, ge=0)
    """Passes over all rows for the lowest level, after training on a sample."""
    upper_iterations: int = Field(default=50, ge=1)
    """Iterations of k-means for the levels above."""
    resamplings: int = Field(default=10, ge=0)
    """Fresh starts of a level above, from points near the centroids only."""
    per_cluster: int = Field(default=3, ge=1)
    """Points of each cluster that a fresh start uses."""

    @field_validator("levels")
    @classmethod
    def _descending(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if min(levels) < 1 or list(levels) != sorted(set(levels), reverse=True):
            raise ValueError("levels must be positive and fall, such as [5000, 500, 50]")
        return levels

    def needs(self) -> tuple[str, ...]:
        """Columns that the stage reads."""
        return (self.embedding_column,)

    def outputs(self) -> dict[str, pa.Schema]:
        """The cluster of every row in each level."""
        return {CLUSTERS: schema_of(["id", "cluster", "similarity", "clusters"])}

    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> dict[str, Any]:
        """Train, refine over all rows, cluster the centroids, and tell the shards."""
        sources = sources_of(
            inputs, (), self.embeddings, self.embedding_column, assume_same_space=True
        )
        rows_folder = storage.join(folder.scratch, "rows")
        scattered = Comparison(method="all")
        files = lay_out(sources, rows_folder, engine, comparison=scattered, seed=inputs.seed).files
        by_shard = Exchange(
            storage.join(folder.scratch, "by-shard"), max(1, inputs.pool.num_shards)
        )
        levels, figures = self._levels(files, folder, engine, inputs.seed)
        if levels:
            assign = _Assign(files, levels[0], by_shard, threads_of(engine))
            run_steps(engine, assign, files.num_partitions, by_shard.folder, "assign to clusters")
            _write_centroids(levels, folder)
        task = _TellShard(self, inputs.pool, folder, by_shard, files.num_partitions, tuple(levels))
        waiting = [i for i in range(inputs.pool.num_shards) if i not in finished_shards(folder)]
        for _ in engine.map(task, waiting, folder.stage):
            pass
        return figures

    def _levels(
        self, files: RowFiles, folder: StageFolder, engine: Engine, seed: int
    ) -> tuple[list[Level], dict[str, Any]]:
        if not files.num_rows:
            return [], {}
        threads, root = threads_of(engine), storage.join(folder.scratch, "levels")
        start = train_centroids(
            files, self.levels[0], root, engine, seed=seed, rows_per_centroid=64
        )
        centroids, cosines = refine(
            files, start, self.iterations, root, engine, seed=seed, threads=threads
        )
        levels = [Level(centroids)]
        for number, count in enumerate(self.levels[1:], start=2):
            above = level_above(
                levels[-1].centroids,
                count,
                storage.join(root, f"level-{number}"),
                engine,
                iterations=self.upper_iterations,
                resamplings=self.resamplings,
                per_cluster=self.per_cluster,
                seed=seed + number,
                threads=threads,
            )
            levels.append(above)
        counts = [level.centroids.count for level in levels]
        return levels, {"clusters": counts, "mean_cosine_by_pass": [round(c, 6) for c in cosines]}


def _write_centroids(levels: list[Level], folder: StageFolder) -> None:
    """Write the centroids of all levels as a data set, a shard a level."""
    infos, schema = [], None
    for number, level in enumerate(levels):
        rows = level.centroids.load()
        flat = pa.array(np.ascontiguousarray(rows).reshape(-1))
        table = pa.table(
            {
                "level": np.full(len(rows), number + 1, np.int32),
                "cluster": np.arange(len(rows), dtype=np.int32),
                "embedding": pa.FixedSizeListArray.from_arrays(flat, rows.shape[1]),
            }
        )
        schema = table.schema
        infos.append(write_shard(folder.output(CENTROIDS), number, table))
    commit(folder.output(CENTROIDS), schema, infos, {"stage": folder.stage})


@dataclass(frozen=True)
class _Assign(Work):
    """The cluster of each row of one partition, sent to its shard."""

    files: RowFiles
    level: Level
    by_shard: Exchange
    threads: int

    def open(self) -> Any:
        centroids = np.asarray(self.level.centroids.load())
        return centroids, quantize_centroids(centroids)

    def __call__(self, item: int, opened: Any) -> Done:
        centroids, quantized = opened
        vectors = self.files.vectors(item)
        nearest, cosines = np.empty(len(vectors), np.int32), np.empty(len(vectors), np.float32)
        for start in range(0, len(vectors), 1 << 15):
            rows = np.asarray(vectors[start : start + (1 << 15)])
            own = nearest_centroids(quantize_rows(rows), quantized)
            nearest[start : start + len(rows)] = own
            cosines[start : start + len(rows)] = exact_similarities(rows, centroids[own])
        places = self.files.rows(item)
        columns = {"row": places["row"], "cluster": nearest, "similarity": cosines}
        self.by_shard.write(item, pa.table(columns), np.asarray(places["shard"]))
        return Done([self.by_shard.mapped_path(item)])


@dataclass(frozen=True)
class _TellShard(Task[int, Receipt]):
    """One shard of the pool with its clusters of all levels."""

    stage: Cluster
    pool: Pool
    folder: StageFolder
    by_shard: Exchange
    num_items: int
    levels: tuple[Level, ...]

    def __call__(self, item: int, opened: Any) -> Receipt:
        shard = Shard(self.pool.read(item, []), item)
        bad = np.zeros(shard.num_rows, bool)
        bad[read_bad_rows(storage.join(self.folder.scratch, "rows"), 0, item)] = True
        reject(shard, bad, "bad_vector")
        leaf, cosine = np.zeros(shard.num_rows, np.int32), np.zeros(shard.num_rows, np.float32)
        if self.levels:
            found = self.by_shard.read(item, self.num_items)
            rows = np.asarray(found["row"])
            leaf[rows] = np.asarray(found["cluster"])
            cosine[rows] = np.asarray(found["similarity"])
        path = [leaf]
        for level in self.levels[1:]:
            path.append(level.owners()[path[-1]])
        shard.emit(
            CLUSTERS,
            {"cluster": leaf, "similarity": cosine, "clusters": np.stack(path, axis=1).tolist()},
        )
        return commit_shard(self.stage, self.folder, shard)
