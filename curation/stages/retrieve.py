"""Retrieves from the pool what is like the seed sets (paper, §3 and A.4).

rule sample: the k nearest images of every seed. rule cluster: images of every cluster that holds
at least `min_hits` seeds. One row a hit goes to `hits`; rows of the pool without one are dropped.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field, model_validator

from curation import storage
from curation.dataset import Dataset
from curation.errors import SpaceError
from curation.neighbors.clusters.centroids import Centroids, copy_centroids, train_centroids
from curation.neighbors.index.vector_index import (
    SEARCHED,
    Comparison,
    VectorIndex,
    arrange_queries,
    build_index,
    sources_of,
)
from curation.neighbors.retrieval.cluster_rule import ClusterRule
from curation.neighbors.retrieval.hit_files import HITS, DecideByHits, HitFiles, write_hits
from curation.neighbors.retrieval.sample_rule import Collision, SampleRule
from curation.neighbors.retrieval.seed_rule import SeedRule
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.rows.shard_batches import decide_shards
from curation.schema import schema_of
from curation.stage import DatasetStage, Engine, Figures, StageFolder, StageInputs


class Retrieve(DatasetStage):
    """Keeps the images of the pool that seed sets retrieve."""

    version = 5
    reasons = ("not_retrieved",)
    compares_rows = True

    embeddings: str
    """Name of the side-car with the vectors, in the pool and in every seed set."""
    embedding_column: str = "embedding"
    """Its column of vectors."""
    seeds: tuple[SeedRule, ...] = Field(min_length=1)
    """Seed sets and their rules."""
    clusters: int = Field(default=100_000, ge=1)
    """Clusters of the pool for rule cluster; fewer where the pool has fewer rows."""
    centroids: str | None = None
    """The centroids of an earlier `cluster`, in place of training: its first level's serve."""
    on_collision: Collision = "keep"
    """sample: keep: an image may be hit by several seeds. next: take the next nearest free one."""
    assume_same_space: bool = False
    """Compare embeddings whose spaces are unknown or differ."""
    comparison: Comparison = Comparison()
    """How seeds are compared with the pool: exhaustively, or by lists with a measured recall."""

    @model_validator(mode="after")
    def _one_rule_a_set(self) -> "Retrieve":
        names = [rule.set for rule in self.seeds]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"set '{twice[0]}' has two rules; allowed is one a set")
        return self

    def required_columns(self) -> tuple[str, ...]:
        """Columns that the stage reads."""
        return (self.embedding_column,)

    def fingerprint(self) -> str:
        """The content of the centroids that are given."""
        if self.centroids is None:
            return ""
        return Dataset.open(self.centroids).manifest.content_digest

    def set_names(self) -> tuple[str, ...]:
        """The seed sets."""
        return tuple(rule.set for rule in self.seeds)

    def decision_columns(self) -> pa.Schema:
        """The best hit of each retrieved image."""
        return schema_of(["seed_set", "rule", "seed_id", "rank", "similarity", "cluster"])

    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> Figures:
        """Search, cluster, write the hits, and decide on the shards of the pool."""
        names = [rule.set for rule in self.seeds]
        sources = sources_of(
            inputs,
            names,
            self.embeddings,
            self.embedding_column,
            assume_same_space=self.assume_same_space,
        )
        if self.centroids is not None and not self.assume_same_space:
            _check_centroids(Dataset.open(self.centroids), sources[0].dataset)
        pool = build_index(
            sources[:1],
            storage.join(folder.scratch, "rows"),
            engine,
            comparison=self.comparison,
            seed=inputs.seed,
            rows_per_list=SEARCHED,
        )
        seeds = [
            arrange_queries(
                source, pool.files, storage.join(folder.scratch, f"seeds-{name}"), engine
            )
            for name, source in zip(names, sources[1:], strict=True)
        ]
        scratch = storage.join(folder.scratch, "hits")
        hits = HitFiles.planned(self.seeds, seeds, pool.files, inputs.pool, scratch)
        figures = self._find(pool, seeds, hits, folder.scratch, engine)
        write_hits(hits, folder.output(HITS), engine, {"stage": folder.stage})
        decide_shards(DecideByHits(self, inputs.pool, folder, hits), engine)
        return {"sets": figures}

    def _find(
        self,
        pool: VectorIndex,
        seeds: Sequence[RowFiles],
        hits: HitFiles,
        folder: str,
        engine: Engine,
    ) -> dict[str, Any]:
        """Find and write the hits of all sets; give the figures of each."""
        if not pool.files.num_rows:
            hits.write_none()
            return {}
        figures: dict[str, Any] = {}
        clustered: dict[int, SeedRule] = {}
        for number, rule in enumerate(self.seeds):
            if rule.rule == "cluster":
                clustered[number] = rule
                continue
            root = storage.join(folder, f"search-{number}")
            search = SampleRule(pool, seeds[number], rule.k, self.on_collision, root)
            figures[rule.set] = search.run(hits.writer(number), engine)
        if clustered:
            root = storage.join(folder, "clusters")
            centroids = self._centroids(pool, root, engine)
            draw = ClusterRule(pool.files, centroids, clustered, pool.seed, root)
            figures |= draw.run(dict(enumerate(seeds)), hits, engine)
        return figures

    def _centroids(self, pool: VectorIndex, folder: str, engine: Engine) -> Centroids:
        if self.centroids is not None:
            return copy_centroids(self.centroids, pool.files.width, folder)
        return train_centroids(pool.files, self.clusters, folder, engine, seed=pool.seed)


def _check_centroids(centroids: Dataset, pool: Dataset) -> None:
    """Refuse centroids of another space than the pool's, where both say theirs."""
    theirs, ours = centroids.attributes.get("space"), pool.attributes.get("space")
    if theirs is not None and ours is not None and theirs != ours:
        raise SpaceError(
            f"{centroids.path}: centroids of embedding space {theirs}, but {pool.path} has {ours}; "
            "cluster the embeddings that are searched"
        )
