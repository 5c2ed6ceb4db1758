"""Drops near-duplicates: one row of each component of the similarity graph stays (paper, A.3).

With `against`, also drops what leaks from the named sets, as the single verb `curate dedup` does.
With a base, rows that earlier deliveries kept take part: they all stay, are not compared with each
other, and what is like them goes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation import storage
from curation.neighbors.dedup.component_rules import KeepOne
from curation.neighbors.dedup.judge_components import Reviewed, check_largest, connect, review
from curation.neighbors.dedup.verdicts import BASE, DecideByVerdicts, Verdicts
from curation.neighbors.index.vector_index import Comparison, build_index, self_join, sources_of
from curation.neighbors.join.join import Joined
from curation.neighbors.join.listed_pairs import PAIRS, write_pairs
from curation.neighbors.rows.row_files import RowFiles, write_array
from curation.neighbors.rows.shard_batches import decide_shards
from curation.neighbors.rows.vectors import default_threshold
from curation.schema import schema_of
from curation.stage import DatasetStage, Engine, StageFolder, StageInputs
from curation.stages.leaks import find_leaks


class NearDedup(DatasetStage):
    """Keeps the best original of each component of near-duplicates."""

    version = 4
    reasons = ("near_duplicate", "leak:NAME", "bad_vector")
    compares_with_previous = True

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
    neighbors: int = Field(default=0, ge=0)
    """Most similar other rows listed for each row in the output `pairs`; 0: none are listed."""
    comparison: Comparison = Comparison()
    """How rows are compared: exhaustively, or by lists with a measured recall."""

    def required_columns(self) -> tuple[str, ...]:
        """Columns that the stage reads."""
        return (self.embedding_column,)

    def set_names(self) -> tuple[str, ...]:
        """Names of the sets that the stage reads."""
        return self.against

    def decision_columns(self) -> pa.Schema:
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
        index = build_index(
            sources,
            storage.join(folder.scratch, "rows"),
            engine,
            comparison=self.comparison,
            seed=inputs.seed,
            alike=threshold,
        )
        files = index.files
        root = storage.join(folder.scratch, "duplicates")
        active, apart, first_base = None, None, 1 + len(self.against)
        if self.against:
            others = range(first_base, len(sources))
            active = write_active(files, storage.join(root, "active.bin"), [0, *others])
        if inputs.base:
            apart = write_apart(files, storage.join(root, "apart.bin"), first_base)
        joined, figures = self_join(index, threshold, root, engine, active, apart, self.neighbors)
        if self.neighbors:
            base_set, attributes = BASE if inputs.base else None, {"stage": folder.stage}
            pairs = write_pairs(joined, folder.output(PAIRS), base_set, engine, attributes)
            figures["listed_pairs"] = pairs
        reviewed, found = self._review(joined, inputs, root, engine)
        figures |= found
        verdicts = Verdicts(storage.join(folder.scratch, "rows"), threshold, reviewed)
        verdicts = replace(verdicts, set_names=self.against)
        figures |= {"threshold": threshold, **size_figures(inputs)}
        if self.against:
            limit = default_threshold(sources[0], self.against_threshold, "leak")
            root = storage.join(folder.scratch, "leaks")
            path = storage.join(root, "active.bin")
            survivors = write_active(files, path, range(first_base), reviewed.dropped())
            leaks, found = find_leaks(index, limit, root, inputs, engine, survivors, apart)
            verdicts = replace(verdicts, leaks=leaks, leak_threshold=limit)
            figures |= {"against_threshold": limit, "leaks": found}
        decide_shards(DecideByVerdicts(self, inputs.pool, folder, verdicts), engine)
        return figures

    def _review(
        self, joined: Joined, inputs: StageInputs, root: str, engine: Engine
    ) -> tuple[Reviewed, dict[str, Any]]:
        graph, sizes = connect(joined, storage.join(root, "labels.bin"))
        old_rows = sum(pool.num_rows for pool in inputs.base)
        if self.linkage == "components":
            check_largest(sizes, inputs.pool.num_rows + old_rows, self.max_component_share)
        first_base = 1 + len(self.against) if inputs.base else None
        judge = KeepOne(joined.join.threshold, self.linkage, first_base)
        reviewed = review(graph, judge, root, inputs.pool, engine)
        worst = [one for fact in reviewed.facts for one in fact["least_alike"]]
        worst.sort(key=lambda one: (one["lowest_similarity"], one["component"]))
        return reviewed, {
            "components": sizes.num_components,
            "rows_in_components": sizes.num_members,
            "largest_component": sizes.largest,
            "least_alike": worst[:5],
            **({"base_rows": old_rows} if inputs.base else {}),
        }


def write_active(
    files: RowFiles, path: str, sets: Sequence[int], dropped: Iterable[np.ndarray] = ()
) -> str:
    """Write which positions take part in a join: those of some sets, less the dropped.

    One byte a row in the driver. dropped: (B,) int64 positions each.
    """
    active = np.empty(files.num_rows, bool)
    for partition in range(files.num_partitions):
        own = slice(*files.starts[partition : partition + 2])
        active[own] = np.isin(np.asarray(files.rows(partition)["set"]), list(sets))
    for positions in dropped:
        active[positions] = False
    write_array(path, active)
    return path


def write_apart(files: RowFiles, path: str, first_base: int) -> str:
    """Write which positions are not compared with each other: those of the base.

    But a row of the base stands for identical ones of the pool, and is then compared as they are.
    """
    apart = np.empty(files.num_rows, bool)
    for partition in range(files.num_partitions):
        rows = files.rows(partition)
        first, sets = np.asarray(rows["first"]), np.asarray(rows["set"])
        stands_in = np.zeros(len(sets), bool)
        stands_in[first[sets == 0]] = True
        own = slice(*files.starts[partition : partition + 2])
        apart[own] = (sets >= first_base) & ~stands_in[first]
    write_array(path, apart)
    return path


def size_figures(inputs: StageInputs) -> dict[str, Any]:
    """Say by which rule representatives were chosen."""
    known = {"original_width", "original_height"} <= set(inputs.pool.columns)
    rule = ["most original pixels"] if known else []
    rule += ["most bytes"] if "num_bytes" in inputs.pool.columns else []
    return {"representatives_by": [*rule, "smallest id"]}
