"""Drops near-duplicates: one row of each component of the similarity graph stays (paper, A.3).

With `against`, also drops what leaks from the named sets, as the single verb `curate dedup` does.
"""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation import storage
from curation.neighbors.join import Joined
from curation.neighbors.judges import KeepOne
from curation.neighbors.layout import Comparison, lay_out, self_join, sources_of
from curation.neighbors.review import Reviewed, check_largest, connect, review
from curation.neighbors.row_files import RowFiles, write_array
from curation.neighbors.vectors import default_threshold
from curation.neighbors.verdicts import Verdicts, decide_shards
from curation.schema import schema_of
from curation.stage import DatasetStage, Engine, StageFolder, StageInputs
from curation.stages.leaks import find_leaks


class NearDedup(DatasetStage):
    """Keeps the best original of each component of near-duplicates."""

    reasons = ("near_duplicate", "leak:NAME", "bad_vector")

    embeddings: str
    """Name of the side-car with the vectors."""
    embedding_column: str = "embedding"
    """Its column of vectors."""
    threshold: float | None = Field(default=None, ge=-1, le=1)
    """Cosine above which two rows are duplicates; the encoder's own where left out."""
    linkage: Literal["components", "representative"] = "components"
    """components: one row a component. representative: also rows that no kept row is close to."""
    max_component_share: float = Field(default=0.01, gt=0, le=1)
    """A component with a larger share of the pool (and over 1,000 rows) fails the run."""
    against: tuple[str, ...] = ()
    """Names of sets whose images must not be in the pool; empty where `leaks` does that."""
    against_threshold: float | None = Field(default=None, ge=-1, le=1)
    """Cosine above which a row leaks; the encoder's own where left out."""
    assume_same_space: bool = False
    """Compare embeddings whose spaces are unknown or differ."""
    comparison: Comparison = Comparison()
    """How rows are compared: exhaustively, or by lists with a measured recall."""

    def needs(self) -> tuple[str, ...]:
        """Columns that the stage reads."""
        return (self.embedding_column,)

    def set_names(self) -> tuple[str, ...]:
        """Names of the sets that the stage reads."""
        return self.against

    def extras(self) -> pa.Schema:
        """Component, twin and cosine of every row."""
        return schema_of(["component", "component_size", "twin", "twin_set", "similarity", "path"])

    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> dict[str, Any]:
        """Join, connect, keep one row a component, then look for leaks among those kept."""
        sources = sources_of(
            inputs,
            self.against,
            self.embeddings,
            self.embedding_column,
            assume_same_space=self.assume_same_space,
        )
        threshold = default_threshold(sources[0], self.threshold, "dedup")
        layout = lay_out(
            sources,
            storage.join(folder.scratch, "rows"),
            engine,
            comparison=self.comparison,
            seed=inputs.seed,
        )
        files = layout.files
        root = storage.join(folder.scratch, "duplicates")
        active = None
        if self.against:
            active = write_active(files, storage.join(root, "active.bin"), [])
        joined, figures = self_join(layout, threshold, root, engine, active)
        reviewed, found = self._review(joined, inputs, root, engine)
        figures |= found
        verdicts = Verdicts(storage.join(folder.scratch, "rows"), threshold, reviewed)
        figures |= {"threshold": threshold, **size_figures(inputs)}
        if self.against:
            limit = default_threshold(sources[0], self.against_threshold, "leak")
            survivors = write_active(
                files,
                storage.join(folder.scratch, "leaks", "active.bin"),
                reviewed.dropped(),
                with_sets=True,
            )
            leaks, found = find_leaks(
                layout, limit, storage.join(folder.scratch, "leaks"), inputs, engine, survivors
            )
            verdicts = replace(verdicts, leaks=leaks, leak_threshold=limit, set_names=self.against)
            figures |= {"against_threshold": limit, "leaks": found}
        decide_shards(self, inputs.pool, folder, verdicts, engine)
        return figures

    def _review(
        self, joined: Joined, inputs: StageInputs, root: str, engine: Engine
    ) -> tuple[Reviewed, dict[str, Any]]:
        graph, sizes = connect(joined, storage.join(root, "labels.bin"))
        if self.linkage == "components":
            check_largest(sizes, inputs.pool.num_rows, self.max_component_share)
        judge = KeepOne(joined.join.threshold, self.linkage)
        reviewed = review(graph, judge, root, inputs.pool.num_shards, engine)
        worst = [one for fact in reviewed.facts for one in fact["least_alike"]]
        worst.sort(key=lambda one: (one["lowest_similarity"], one["component"]))
        return reviewed, {
            "components": sizes.num_components,
            "rows_in_components": sizes.num_members,
            "largest_component": sizes.largest,
            "least_alike": worst[:5],
        }


def write_active(
    files: RowFiles, path: str, dropped: list[np.ndarray], *, with_sets: bool = False
) -> str:
    """Write which positions take part in a join: the pool's less the dropped, or the sets' too.

    One byte a row in the driver. dropped: (B,) int64 positions each.
    """
    active = np.ones(files.num_rows, bool)
    if not with_sets:
        for partition in range(files.num_partitions):
            start = files.starts[partition]
            of_pool = np.asarray(files.rows(partition)["set"]) == 0
            active[start : start + len(of_pool)] = of_pool
    for positions in dropped:
        active[positions] = False
    write_array(path, active)
    return path


def size_figures(inputs: StageInputs) -> dict[str, Any]:
    """Say by which rule representatives were chosen."""
    known = {"original_width", "original_height"} <= set(inputs.pool.columns)
    rule = ["most original pixels"] if known else []
    rule += ["most bytes"] if "num_bytes" in inputs.pool.columns else []
    return {"representatives_by": [*rule, "smallest id"]}
