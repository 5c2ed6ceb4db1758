"""Commands on embeddings, ours or foreign: duplicates, leaks, retrieval and clusters."""

from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

from pipelines.cli.options import (
    AssumeSameSpace,
    Changes,
    ColumnOptions,
    Embeddings,
    Memory,
    Out,
    Seed,
    StageOptions,
)


class OnCollision(StrEnum):
    """What to do when two seeds retrieve the same image."""

    keep = "keep"
    next = "next"


@dataclass(frozen=True)
class ComparisonOptions:
    """How rows are compared."""

    recall: Annotated[
        float | None,
        typer.Option(
            "--recall",
            min=0,
            max=1,
            help="Of the rows that have a partner, the share that finds its twin in a large pool; "
            "of the seeds, the share that finds all of its k nearest. [0.99]",
        ),
    ] = None
    memory: Memory = None

    def settings(self) -> dict[str, dict[str, float]]:
        """The settings of the comparison that these options give."""
        asked = {} if self.recall is None else {"recall": self.recall}
        return {"comparison": {**asked, **_memory_gb(self.memory)}}


def _cosine_or_auto(text: str | None) -> float | str | None:
    """Read --threshold.

    Raises:
        ConfigError: neither the word auto nor a cosine.
    """
    from curation.errors import ConfigError

    if text is None or text == "auto":
        return text
    with suppress(ValueError):
        if -1 <= float(text) <= 1:
            return float(text)
    raise ConfigError(f"--threshold {text}: expected auto, or a cosine from -1 to 1")


def dedup(
    embeddings: Embeddings,
    out: Out,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="NAME=EMB of an evaluation set; may be repeated."),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            "--threshold", metavar="COSINE|auto", help="auto: what suits the size of the pool."
        ),
    ] = None,
    against_threshold: Annotated[
        float | None, typer.Option("--against-threshold", min=-1, max=1)
    ] = None,
    changes: Changes = None,
    columns: ColumnOptions = ColumnOptions(),
    assume_same_space: AssumeSameSpace = False,
    linkage: Annotated[
        str,
        typer.Option(
            "--linkage",
            help="What stays: one image of each component (components), or every image that is "
            "not within the threshold of a kept one (representative).",
        ),
    ] = "components",
    max_component_share: Annotated[
        float, typer.Option("--max-component-share", help="Largest share of one component.")
    ] = 0.01,
    compared: ComparisonOptions = ComparisonOptions(),
    pairs: Annotated[
        str | None,
        typer.Option("--pairs", help="New folder for the most similar other rows of each row."),
    ] = None,
    neighbors: Annotated[
        int | None,
        typer.Option(
            "--neighbors", min=1, help="With --pairs: rows listed at most for a row. [64]"
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Output of an earlier dedup: what it kept stays, and wins."),
    ] = None,
    base_embeddings: Annotated[
        str | None,
        typer.Option("--base-embeddings", help="Its embeddings, where they have moved."),
    ] = None,
    engine: StageOptions = StageOptions(),
) -> None:
    """Find near duplicates, and leaks of evaluation sets: one verdict an image.

    Writes id, keep, reason (near_duplicate, leak:NAME or bad_vector), component, component_size,
    twin, twin_set and similarity. The thresholds default to the encoder's own.

    Examples:

        curate dedup emb --out verdicts

        curate dedup emb --against imagenet-val=val-emb --threshold 0.6 --out verdicts

        curate dedup more-emb --base verdicts --out more-verdicts

        curate dedup emb --pairs pairs --neighbors 64 --out verdicts
    """
    from curation.errors import ConfigError
    from curation.neighbors.join.listed_pairs import PAIRS
    from curation.stage import DECISIONS, StageInputs
    from curation.stages.near_dedup import NearDedup
    from pipelines.cli.inputs import named_paths, refuse_repeats
    from pipelines.cli.single_stage import run_single
    from pipelines.cli.vectors import (
        EMBEDDINGS,
        embedding_pools,
        facts_of,
        kept_before,
        vector_stage,
    )
    from pipelines.run.previous_runs import record_inputs

    settings = {
        "threshold": _cosine_or_auto(threshold),
        "against_threshold": against_threshold,
        "assume_same_space": assume_same_space,
        "linkage": linkage,
        "max_component_share": max_component_share,
        "neighbors": (neighbors or 64) if pairs else 0,
        **compared.settings(),
    }
    named = named_paths(against, "--against")
    refuse_repeats(["pool", *(name for name, _ in named)], "--against")
    given = {"against": [name for name, _ in named]}
    stage = vector_stage("dedup", NearDedup, settings, changes, columns, given)
    if base is None and base_embeddings is not None:
        raise ConfigError("--base-embeddings: goes with --base, the decisions on these embeddings")
    if neighbors is not None and pairs is None:
        raise ConfigError("--neighbors: goes with --pairs, the folder that lists them")
    runner = engine.runner()
    pool, sets = embedding_pools(embeddings, named, columns, out, runner.engine)
    earlier = kept_before(base, base_embeddings, columns, out) if base else ()
    run_single(
        stage,
        StageInputs(pool, sets, base=earlier),
        out,
        DECISIONS,
        runner,
        elsewhere={PAIRS: pairs} if pairs else None,
        facts=facts_of(pool),
    )
    read = pool.layer(EMBEDDINGS)
    record_inputs(out.rstrip("/"), embeddings, read, columns.embedding_column, base)


def retrieve(
    pool: Annotated[str, typer.Argument(help="Embeddings of the pool.")],
    out: Out,
    seeds: Annotated[
        list[str],
        typer.Option(
            "--seeds",
            help="NAME=EMB:sample:K or NAME=EMB:cluster:PER_CLUSTER[:MIN_HITS:CAP]; may be "
            "repeated. Parsed from the right: paths may hold colons.",
        ),
    ],
    clusters: Annotated[
        str | None,
        typer.Option("--clusters", help="Output of cluster, for cluster rules; else trained."),
    ] = None,
    on_collision: Annotated[
        OnCollision,
        typer.Option("--on-collision", help="next: every seed gets images of its own."),
    ] = OnCollision.keep,
    compared: ComparisonOptions = ComparisonOptions(),
    changes: Changes = None,
    columns: ColumnOptions = ColumnOptions(),
    assume_same_space: AssumeSameSpace = False,
    seed: Seed = 0,
    engine: StageOptions = StageOptions(),
) -> None:
    """Retrieve images of the pool that resemble curated seed images: one row a hit.

    Example:

        curate retrieve emb --seeds in1k=in1k-emb:sample:32 --seeds pets=pets-emb:cluster:10000
        --out hits
    """
    from curation.stage import StageInputs
    from curation.stages.retrieve import Retrieve
    from pipelines.cli.inputs import refuse_repeats
    from pipelines.cli.single_stage import run_single
    from pipelines.cli.vectors import embedding_pools, facts_of, parse_seeds, vector_stage

    settings = {
        "assume_same_space": assume_same_space,
        "on_collision": on_collision.value,
        **compared.settings(),
    }
    if clusters is not None:
        settings["centroids"] = f"{clusters.rstrip('/')}/_centroids"
    rules = [parse_seeds(text) for text in seeds]
    named = [(str(rule["set"]), path) for rule, path in rules]
    refuse_repeats(["pool", *(name for name, _ in named)], "--seeds")
    given = {"seeds": [rule for rule, _ in rules]}
    stage = vector_stage("retrieve", Retrieve, settings, changes, columns, given)
    runner = engine.runner()
    rows, sets = embedding_pools(pool, named, columns, out, runner.engine)
    run_single(stage, StageInputs(rows, sets, seed), out, "hits", runner, facts=facts_of(rows))


def cluster(
    embeddings: Embeddings,
    out: Out,
    levels: Annotated[
        str,
        typer.Option(
            "--levels",
            help="Clusters of each level, the lowest first: 5000,500. The lowest may be split: "
            "100000x100,500000 splits each of 100000 into 100.",
        ),
    ],
    memory: Memory = None,
    changes: Changes = None,
    columns: ColumnOptions = ColumnOptions(),
    seed: Seed = 0,
    engine: StageOptions = StageOptions(),
) -> None:
    """Cluster embeddings by k-means out of core, with levels of clusters above.

    Example:

        curate cluster emb --levels 1000,100 --out clusters
    """
    from curation.stage import StageInputs
    from curation.stages.cluster import Cluster
    from pipelines.cli.single_stage import run_single
    from pipelines.cli.vectors import embedding_pool, facts_of, parse_levels, vector_stage

    given = {"levels": parse_levels(levels)}
    stage = vector_stage("cluster", Cluster, _memory_gb(memory), changes, columns, given)
    pool = embedding_pool(embeddings, columns, out)
    inputs = StageInputs(pool, seed=seed)
    run_single(stage, inputs, out, "clusters", engine.runner(), facts=facts_of(pool))


def balance(
    clusters: Annotated[str, typer.Argument(help="Output of cluster.")],
    out: Out,
    target: Annotated[int, typer.Option("--target", min=1, help="Rows to draw.")],
    multiplier: Annotated[
        int, typer.Option("--multiplier", min=1, help="How often one row may be drawn.")
    ] = 1,
    seed: Seed = 0,
    engine: StageOptions = StageOptions(),
) -> None:
    """Draw a sample to which every cluster of each level gives as equally as it can.

    Example:

        curate balance clusters --target 100000 --out sample
    """
    from curation.config import parse_settings
    from curation.dataset import Dataset
    from curation.pool import Pool
    from curation.stage import DECISIONS, StageInputs
    from curation.stages.balance import Balance
    from pipelines.cli.single_stage import run_single
    from pipelines.cli.vectors import facts_of

    values = {"target": target, "multiplier": multiplier}
    stage = parse_settings(Balance, values, "curate balance")
    pool = Pool("pool", {"clusters": Dataset.open(clusters)})
    inputs = StageInputs(pool, seed=seed)
    run_single(stage, inputs, out, DECISIONS, engine.runner(), facts=facts_of(pool))


def _memory_gb(text: str | None) -> dict[str, float]:
    """The setting that --memory gives."""
    from pipelines.operate.disk_budget import parse_bytes

    return {} if text is None else {"memory_gb": parse_bytes(text, "--memory") / 1e9}
