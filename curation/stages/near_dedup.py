"""Drops near-duplicates: one row of each component of the similarity graph stays (paper, A.3).

With `against`, also drops what leaks from the named sets, as the single verb `curate dedup` does.
With a base, rows that earlier deliveries kept take part: they all stay, are not compared with each
other, and what is like them goes.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import AfterValidator, Field

from curation import storage
from curation.neighbors.dedup.component_rules import COMPONENT_RULES
from curation.neighbors.dedup.judge_components import (
    LEAST_ALIKE_SHOWN,
    ComponentVerdicts,
    JudgeDuplicates,
    judge_components,
)
from curation.neighbors.dedup.pool_threshold import PoolThreshold, choose_threshold
from curation.neighbors.dedup.row_masks import write_active, write_exempt
from curation.neighbors.dedup.threshold_graph import check_largest, connect, largest_allowed
from curation.neighbors.dedup.verdicts import BASE, DecideByVerdicts, Verdicts
from curation.neighbors.index.vector_index import Comparison, build_index, self_join, sources_of
from curation.neighbors.join.join import Joined
from curation.neighbors.join.listed_pairs import PAIRS, write_pairs
from curation.neighbors.rows.shard_batches import decide_shards
from curation.neighbors.rows.vectors import VectorSource, default_threshold
from curation.schema import schema_of
from curation.stage import DatasetStage, Engine, Figures, StageFolder, StageInputs
from curation.stages.leaks import find_leaks


def _known_rule(name: str) -> str:
    if name not in COMPONENT_RULES:
        raise ValueError(f"there is no rule '{name}'; allowed: {', '.join(COMPONENT_RULES)}")
    return name


class NearDedup(DatasetStage):
    """Keeps the best original of each component of near-duplicates."""

    version = 5
    reasons = ("near_duplicate", "leak:NAME", "bad_vector")
    compares_with_previous = True
    compares_rows = True
    checks_benchmarks = True

    embeddings: str
    """Name of the side-car with the vectors."""
    embedding_column: str = "embedding"
    """Its column of vectors."""
    threshold: Annotated[float, Field(ge=-1, le=1)] | Literal["auto"] | None = None
    """Cosine above which two rows are duplicates. auto: the one above which a row of this pool has
    0.001 unrelated rows. Left out: the encoder's own, or that of auto where the encoder's own would
    join unrelated rows into components that are not allowed."""
    linkage: Annotated[
        str, AfterValidator(_known_rule), Field(json_schema_extra={"enum": [*COMPONENT_RULES]})
    ] = "components"
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

    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> Figures:
        """Join, connect, keep one row a component, then look for leaks among those kept."""
        sources = sources_of(
            inputs,
            self.against,
            self.embeddings,
            self.embedding_column,
            assume_same_space=self.assume_same_space,
        )
        chosen = self._chosen_threshold(sources, inputs, folder, engine)
        threshold = chosen.value
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
        active, exempt, first_base = None, None, 1 + len(self.against)
        if self.against:
            others = range(first_base, len(sources))
            active = write_active(files, storage.join(root, "active.bin"), [0, *others])
        if inputs.base:
            exempt = write_exempt(files, storage.join(root, "exempt.bin"), first_base)
        joined, figures = self_join(index, threshold, root, engine, active, exempt, self.neighbors)
        if self.neighbors:
            base_set, attributes = BASE if inputs.base else None, {"stage": folder.stage}
            pairs = write_pairs(joined, folder.output(PAIRS), base_set, engine, attributes)
            figures["listed_pairs"] = pairs
        duplicates, found = self._judged(joined, inputs, chosen, root, engine)
        figures |= chosen.figures | found
        verdicts = Verdicts(storage.join(folder.scratch, "rows"), threshold, duplicates)
        verdicts = replace(verdicts, set_names=self.against)
        figures |= {"threshold": threshold, **size_figures(inputs)}
        if self.against:
            limit = default_threshold(sources[0], self.against_threshold, "leak")
            root = storage.join(folder.scratch, "leaks")
            path = storage.join(root, "active.bin")
            survivors = write_active(files, path, range(first_base), duplicates.dropped())
            leaks, found = find_leaks(index, limit, root, inputs, engine, survivors, exempt)
            verdicts = replace(verdicts, leaks=leaks, leak_threshold=limit)
            figures |= {"against_threshold": limit, "leaks": found}
        decide_shards(DecideByVerdicts(self, inputs.pool, folder, verdicts), engine)
        return figures

    def _chosen_threshold(
        self,
        sources: tuple[VectorSource, ...],
        inputs: StageInputs,
        folder: StageFolder,
        engine: Engine,
    ) -> PoolThreshold:
        """The threshold, before rows are indexed and joined by it."""
        num_rows = sum(pool.num_rows for pool in (inputs.pool, *inputs.base))
        is_guarded = COMPONENT_RULES[self.linkage].is_guarded
        return choose_threshold(
            [sources[0], *sources[1 + len(self.against) :]],
            self.threshold,
            largest_allowed(num_rows, self.max_component_share) if is_guarded else num_rows,
            storage.join(folder.scratch, "unrelated"),
            engine,
            inputs.seed,
        )

    def _judged(
        self,
        joined: Joined,
        inputs: StageInputs,
        chosen: PoolThreshold,
        root: str,
        engine: Engine,
    ) -> tuple[ComponentVerdicts, dict[str, Any]]:
        """Verdicts on the members of components, and figures."""
        graph, sizes = connect(joined, storage.join(root, "labels.bin"))
        old_rows = sum(pool.num_rows for pool in inputs.base)
        rule = COMPONENT_RULES[self.linkage]
        if rule.is_guarded:
            num_rows = inputs.pool.num_rows + old_rows
            check_largest(sizes, num_rows, self.max_component_share, chosen.proposed)
        first_base = 1 + len(self.against) if inputs.base else None
        judge = JudgeDuplicates(rule, joined.join.threshold, first_base)
        verdicts, summaries = judge_components(graph, judge, root, inputs.pool, engine)
        least_alike = [one for summary in summaries for one in summary]
        least_alike.sort(key=lambda one: (one["lowest_similarity"], one["component"]))
        return verdicts, {
            "components": sizes.num_components,
            "rows_in_components": sizes.num_members,
            "largest_component": sizes.largest,
            "least_alike": least_alike[:LEAST_ALIKE_SHOWN],
            **({"base_rows": old_rows} if inputs.base else {}),
        }


def size_figures(inputs: StageInputs) -> dict[str, Any]:
    """Say by which rule representatives were chosen."""
    known = {"original_width", "original_height"} <= set(inputs.pool.columns)
    rule = ["most original pixels"] if known else []
    rule += ["most bytes"] if "num_bytes" in inputs.pool.columns else []
    return {"representatives_by": [*rule, "smallest id"]}
