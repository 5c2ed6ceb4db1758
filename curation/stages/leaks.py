"""Drops what leaks from benchmarks: whole components that hold a benchmark image (paper, A.3)."""

from typing import Any

import pyarrow as pa
from pydantic import Field

from curation import storage
from curation.neighbors.dedup.judge_components import (
    ComponentVerdicts,
    JudgeLeaks,
    judge_components,
)
from curation.neighbors.dedup.threshold_graph import connect
from curation.neighbors.dedup.verdicts import DecideByVerdicts, Verdicts
from curation.neighbors.index.vector_index import (
    Comparison,
    VectorIndex,
    build_index,
    self_join,
    sources_of,
)
from curation.neighbors.rows.shard_batches import decide_shards
from curation.neighbors.rows.vectors import default_threshold
from curation.schema import schema_of
from curation.stage import DatasetStage, Engine, Figures, StageFolder, StageInputs


class Leaks(DatasetStage):
    """Drops every component of the leak graph that holds a benchmark image."""

    version = 5
    reasons = ("leak:NAME", "bad_vector")
    on_sets = True
    compares_rows = True
    checks_benchmarks = True

    embeddings: str
    """Name of the side-car with the vectors."""
    embedding_column: str = "embedding"
    """Its column of vectors."""
    threshold: float | None = Field(default=None, ge=-1, le=1)
    """Cosine above which two rows are joined; the encoder's own where left out."""
    against: tuple[str, ...] = Field(min_length=1)
    """Names of the benchmarks."""
    assume_same_space: bool = False
    """Compare embeddings whose spaces are unknown or differ."""
    comparison: Comparison = Comparison()
    """How rows are compared: exhaustively, or by lists with a measured recall."""

    def required_columns(self) -> tuple[str, ...]:
        """Columns that the stage reads."""
        return (self.embedding_column,)

    def set_names(self) -> tuple[str, ...]:
        """Names of the sets that the stage reads."""
        return self.against

    def decision_columns(self) -> pa.Schema:
        """The nearest benchmark image of a leak, and whether it leaks directly or by a chain."""
        return schema_of(["twin", "twin_set", "similarity", "path"])

    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> Figures:
        """Join the survivors and the benchmarks, and drop the components that leak."""
        sources = sources_of(
            inputs,
            self.against,
            self.embeddings,
            self.embedding_column,
            assume_same_space=self.assume_same_space,
        )
        threshold = default_threshold(sources[0], self.threshold, "leak")
        rows = storage.join(folder.scratch, "rows")
        index = build_index(
            sources,
            rows,
            engine,
            comparison=self.comparison,
            seed=inputs.seed,
            alike=threshold,
        )
        leaks, figures = find_leaks(
            index, threshold, storage.join(folder.scratch, "leaks"), inputs, engine
        )
        verdicts = Verdicts(rows, leaks=leaks, leak_threshold=threshold, set_names=self.against)
        decide_shards(DecideByVerdicts(self, inputs.pool, folder, verdicts), engine)
        return {"threshold": threshold, **figures}


def find_leaks(
    index: VectorIndex,
    threshold: float,
    folder: str,
    inputs: StageInputs,
    engine: Engine,
    active: str | None = None,
    exempt: str | None = None,
) -> tuple[ComponentVerdicts, dict[str, Any]]:
    """Verdicts on the rows that leak, and figures. active, exempt: see `self_join`."""
    joined, figures = self_join(index, threshold, folder, engine, active, exempt)
    graph, _ = connect(joined, storage.join(folder, "labels.bin"))
    judge = JudgeLeaks(threshold)
    verdicts, leaking = judge_components(graph, judge, folder, inputs.pool, engine)
    return verdicts, {"leaking_components": sum(leaking), **figures}
