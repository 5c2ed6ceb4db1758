"""Clusters the pool: k-means out of core, and levels of clusters above it (SPEC A.5)."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from curation import storage
from curation.dataset import ShardInfo, commit, write_shard
from curation.errors import ConfigError
from curation.neighbors.clusters.assignment import Assignment
from curation.neighbors.clusters.levels import (
    Level,
    centroid_rows,
    find_clusters,
    fits_in_memory,
    level_above,
)
from curation.neighbors.clusters.passes import Fit
from curation.neighbors.clusters.split import split_clusters
from curation.neighbors.index.vector_index import Comparison, build_index, sources_of, threads_of
from curation.neighbors.kernels.centroid_index import CentroidIndex
from curation.neighbors.rows.arrange import read_bad_rows
from curation.neighbors.rows.file_tasks import FileTask, TaskResult, run_file_tasks
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.rows.shard_batches import (
    BatchExchange,
    DecideBatch,
    decide_shards,
    of_shard,
)
from curation.neighbors.rows.vectors import exact_similarities
from curation.schema import schema_of
from curation.stage import DatasetStage, Engine, Figures, Shard, StageFolder, StageInputs, reject

logger = logging.getLogger(__name__)

CLUSTERS = "clusters"
CENTROIDS = "centroids"


class Cluster(DatasetStage):
    """Finds the cluster of every row, and the clusters of clusters above it."""

    version = 3
    reasons = ("bad_vector",)
    compares_rows = True

    embeddings: str
    """Name of the side-car with the vectors."""
    embedding_column: str = "embedding"
    """Its column of vectors."""
    levels: tuple[int | str, ...] = Field(min_length=1)
    """Clusters of each level, the lowest first; the lowest may be split: "100000x100"."""
    iterations: int = Field(default=10, ge=0)
    """Passes over all rows, after training on a sample: lowest level, and what exceeds memory."""
    upper_iterations: int = Field(default=50, ge=1)
    """Iterations of k-means on rows in memory: upper levels, resampling, and splits."""
    resamplings: int | tuple[int, ...] | None = None
    """Fresh starts of each level on rows near its centroids: one number for all levels that are not
    split, or one a level; left out: 10 where there are several levels, none for one."""
    per_cluster: int | tuple[int, ...] | None = None
    """Rows of each cluster that a fresh start draws, for all levels or one a level; left out: half
    of what a cluster holds on average, 2 to 10."""
    agreement: float = Field(default=0.98, gt=0, le=1)
    """With thousands of clusters: share of the rows whose cluster is the nearest of all."""
    memory_gb: float = Field(default=4.0, gt=0)
    """Rows that are clustered in memory may take half of it."""

    @field_validator("levels")
    @classmethod
    def _descending(cls, levels: tuple[int | str, ...]) -> tuple[int | str, ...]:
        sizes = [parse_level(level) for level in levels]
        counts = [size.count * size.split for size in sizes]
        if min(counts) < 1 or counts != sorted(set(counts), reverse=True):
            raise ValueError("levels must be positive and fall, such as [5000, 500, 50]")
        if any(size.split > 1 for size in sizes[1:]):
            raise ValueError("only the lowest level, the first, may be split")
        return levels

    @model_validator(mode="after")
    def _resampling(self) -> "Cluster":
        for name, least in (("resamplings", 0), ("per_cluster", 1)):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            if isinstance(value, tuple) and len(value) != len(self.levels):
                raise ValueError(
                    f"{name} has {len(value)} numbers for {len(self.levels)} levels: give one for "
                    "all, or one a level"
                )
            if any(number < least for number in numbers):
                raise ValueError(f"{name} must be {least} or more")
        if isinstance(self.resamplings, tuple) and self.sizes[0].split > 1 and self.resamplings[0]:
            raise ValueError(
                f"level {self.levels[0]} is split and resampled {self.resamplings[0]} times; a "
                "level cannot do both: give 0 resamplings for it"
            )
        return self

    @property
    def sizes(self) -> tuple["LevelSize", ...]:
        """Clusters of each level, and into how many each is split."""
        return tuple(parse_level(level) for level in self.levels)

    def fit_of(self, number: int, rows: RowFiles, seed: int, threads: int) -> Fit:
        """How level `number`, from 0, is found among its rows."""
        size, sample_bytes = self.sizes[number], int(self.memory_gb * 1e9 / 2)
        whole = number > 0 and fits_in_memory(rows, sample_bytes)
        half = int(np.clip(-(-rows.num_rows // (2 * size.count)), 2, 10))
        usual = 10 if len(self.levels) > 1 else 0
        return Fit(
            count=size.count,
            passes=0 if whole else self.iterations,
            iterations=self.upper_iterations,
            resamplings=0 if size.split > 1 else _at(self.resamplings, number, usual),
            per_cluster=_at(self.per_cluster, number, half),
            agreement=self.agreement,
            seed=seed + number,
            threads=threads,
            sample_bytes=sample_bytes,
        )

    def required_columns(self) -> tuple[str, ...]:
        """Columns that the stage reads."""
        return (self.embedding_column,)

    def outputs(self) -> dict[str, pa.Schema]:
        """The cluster of every row in each level."""
        return {CLUSTERS: schema_of(["id", "cluster", "similarity", "clusters"])}

    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> Figures:
        """Train, refine over all rows, cluster the centroids, and tell the shards."""
        sources = sources_of(
            inputs, (), self.embeddings, self.embedding_column, assume_same_space=True
        )
        rows_folder = storage.join(folder.scratch, "rows")
        scattered = Comparison(method="all")
        files = build_index(
            sources, rows_folder, engine, comparison=scattered, seed=inputs.seed
        ).files
        by_shard = BatchExchange.of(inputs.pool, storage.join(folder.scratch, "by-shard"))
        lowest, items, figures = self._lowest(files, folder, by_shard, engine, inputs.seed)
        levels: list[Level] = []
        if lowest is not None:
            levels, above = self._upper(lowest, folder, engine, inputs.seed)
            figures = _joined_figures([figures, *above], levels)
            _write_centroids(levels, folder, engine, sources[0].dataset.attributes.get("space"))
        task = _TellShards(self, inputs.pool, folder, by_shard, items, tuple(levels))
        decide_shards(task, engine)
        return figures

    def _lowest(
        self,
        files: RowFiles,
        folder: StageFolder,
        by_shard: BatchExchange,
        engine: Engine,
        seed: int,
    ) -> tuple[Level | None, int, dict[str, Any]]:
        """The lowest level, and how many items tell the shards of it."""
        if not files.num_rows:
            logger.warning("cluster: no row of the pool has a direction; there are no clusters")
            return None, 0, {}
        size, root = self.sizes[0], storage.join(folder.scratch, "levels")
        if size.count * size.split > files.num_rows:
            raise ConfigError(
                f"levels: {self.levels[0]} asks for {size.count * size.split} clusters, but "
                f"{files.num_rows} rows have a direction; ask for fewer clusters than rows"
            )
        fit = self.fit_of(0, files, seed, threads_of(engine))
        indexed, figures = find_clusters(files, fit, root, engine)
        assignment = Assignment(files, indexed, fit.threads)
        if size.split > 1:
            split_root = storage.join(root, "split")
            rows, items = split_clusters(assignment, size.split, fit, split_root, by_shard, engine)
            return Level(rows), items, figures
        task, items = _Assign(assignment, by_shard), files.num_partitions
        run_file_tasks(engine, task, items, by_shard.folder, "assign to clusters")
        rows = centroid_rows(indexed.centroids, storage.join(root, "rows"), engine)
        return Level(rows), items, figures

    def _upper(
        self, lowest: Level, folder: StageFolder, engine: Engine, seed: int
    ) -> tuple[list[Level], list[dict[str, Any]]]:
        levels: list[Level] = [lowest]
        figures: list[dict[str, Any]] = []
        for number in range(1, len(self.levels)):
            root = storage.join(folder.scratch, "levels", f"level-{number + 1}")
            fit = self.fit_of(number, levels[-1].rows, seed, threads_of(engine))
            level, found = level_above(levels[-1].rows, fit, root, engine)
            levels.append(level)
            figures.append(found)
        return levels, figures


@dataclass(frozen=True)
class LevelSize:
    """Clusters of one level, and into how many each of them is split."""

    count: int
    split: int = 1


def parse_level(level: int | str) -> LevelSize:
    """Read 5000, or "5000x100": 5000 clusters, each split into 100.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(level, int):
        return LevelSize(level)
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", level.strip())
    if match is None:
        raise ValueError(f"a level is a number, or like 100000x100 where it is split, not {level}")
    return LevelSize(int(match[1]), int(match[2] or 1))


def _at(value: int | tuple[int, ...] | None, number: int, otherwise: int) -> int:
    if value is None:
        return otherwise
    return value[number] if isinstance(value, tuple) else value


def _joined_figures(figures: Sequence[dict[str, Any]], levels: Sequence[Level]) -> dict[str, Any]:
    """Figures of all levels."""
    return {
        "clusters": [level.count for level in levels],
        "mean_cosine_by_pass": [round(one, 6) for one in figures[0]["mean_cosine_by_pass"]],
        "assignment": [one["assignment"] for one in figures],
    }


def _write_centroids(
    levels: Sequence[Level], folder: StageFolder, engine: Engine, space: str | None
) -> None:
    """Write the centroids of all levels as a data set, the shards of the lowest level first."""
    parts = tuple(
        (number, part)
        for number, level in enumerate(levels)
        for part in range(level.rows.num_partitions)
    )
    task = _WriteCentroids(tuple(levels), parts, folder.output(CENTROIDS))
    root = storage.join(folder.scratch, "centroids")
    summaries = run_file_tasks(engine, task, len(parts), root, "write centroids")
    infos = [ShardInfo.model_validate(summary) for summary in summaries]
    commit(task.output, task.table(0).schema, infos, {"stage": folder.stage, "space": space})


@dataclass(frozen=True)
class _WriteCentroids(FileTask[None, dict[str, Any]]):
    """One shard of centroids."""

    levels: tuple[Level, ...]
    parts: tuple[tuple[int, int], ...]
    """(level from 0, file) of each shard."""
    output: str

    def __call__(self, item: int, opened: None) -> TaskResult[dict[str, Any]]:
        info = write_shard(self.output, item, self.table(item))
        return TaskResult([storage.join(self.output, info.name)], info.model_dump(mode="json"))

    def table(self, item: int) -> pa.Table:
        number, part = self.parts[item]
        files = self.levels[number].rows
        rows, first = files.vectors(part), files.starts[part]
        flat = pa.array(np.ascontiguousarray(rows).reshape(-1))
        return pa.table(
            {
                "level": np.full(len(rows), number + 1, np.int32),
                "cluster": np.arange(first, first + len(rows), dtype=np.int32),
                "embedding": pa.FixedSizeListArray.from_arrays(flat, files.width),
            }
        )


@dataclass(frozen=True)
class _Assign(FileTask[tuple[CentroidIndex, np.ndarray], None]):
    """The cluster of each row of one partition, sent to its shard."""

    of: Assignment
    by_shard: BatchExchange

    def open(self) -> tuple[CentroidIndex, np.ndarray]:
        return self.of.open(), self.of.indexed.centroids.load()

    def __call__(self, item: int, opened: tuple[CentroidIndex, np.ndarray]) -> TaskResult[None]:
        index, centroids = opened
        found = [
            (nearest, exact_similarities(rows, centroids[nearest]))
            for _, rows, nearest in self.of.blocks(index, item, self.of.files.num_partitions)
        ]
        none = (np.empty(0, np.int32), np.empty(0, np.float32))
        clusters, cosines = (np.concatenate(side) for side in zip(none, *found, strict=True))
        places = self.of.files.rows(item)
        columns = {"shard": places["shard"], "row": places["row"], "cluster": clusters}
        self.by_shard.send(item, pa.table({**columns, "similarity": cosines}))
        return TaskResult([self.by_shard.mapped_path(item)], None)


@dataclass(frozen=True)
class _TellShards(DecideBatch[Any, Any]):
    """Rows are told their clusters of all levels."""

    by_shard: BatchExchange
    num_items: int
    levels: tuple[Level, ...]

    def open(self) -> Any:
        return [level.owners() for level in self.levels[1:]]

    def read(self, batch: int) -> pa.Table | None:
        """The lowest cluster of each row; None where there are no clusters."""
        return self.by_shard.read(batch, self.num_items) if self.levels else None

    def decide(self, shard: Shard, found: pa.Table | None, opened: Any) -> None:
        """Drop rows without direction; give the rest its clusters."""
        bad = np.zeros(shard.num_rows, bool)
        bad[read_bad_rows(storage.join(self.folder.scratch, "rows"), 0, shard.index)] = True
        reject(shard, bad, "bad_vector")
        leaf, cosine = np.zeros(shard.num_rows, np.int32), np.zeros(shard.num_rows, np.float32)
        if found is not None:
            found = of_shard(found, shard.index)
            rows = np.asarray(found["row"])
            leaf[rows] = np.asarray(found["cluster"])
            cosine[rows] = np.asarray(found["similarity"])
        path = [leaf]
        for owners in opened:
            path.append(owners[path[-1]])
        shard.emit(
            CLUSTERS,
            {"cluster": leaf, "similarity": cosine, "clusters": np.stack(path, axis=1).tolist()},
        )
