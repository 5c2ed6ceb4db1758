"""`curate dedup` and `curate retrieve` on embeddings, ours or foreign."""

from typing import Any

from curation.config import parse_settings
from curation.dataset import open_foreign
from curation.errors import ConfigError, SchemaError
from curation.pool import Pool
from curation.registry import load_stage
from curation.stage import DECISIONS, Engine, StageInputs
from pipelines.verbs.stages import parse_changes, run_single

_LAYER = "embeddings"

Columns = tuple[str, str]
"""Names of the id column and of the column of vectors."""


def run_dedup(
    embeddings: str,
    out: str,
    against: list[str],
    settings: dict[str, Any],
    changes: list[str],
    columns: Columns,
    engine: Engine,
) -> None:
    """`curate dedup`."""
    sets = dict(_named_set(text, columns) for text in against)
    values = {
        **settings,
        **parse_changes(changes),
        "embeddings": _LAYER,
        "embedding_column": columns[1],
        "against": list(sets),
    }
    stage = parse_settings(load_stage("near_dedup", "curate dedup"), values, "curate dedup")
    inputs = StageInputs(embedding_pool(embeddings, columns), sets)
    run_single(stage, inputs, out, DECISIONS, engine)


def run_retrieve(
    pool: str,
    out: str,
    seeds: list[str],
    settings: dict[str, Any],
    changes: list[str],
    columns: Columns,
    seed: int,
    engine: Engine,
) -> None:
    """`curate retrieve`."""
    rules = [parse_seeds(text) for text in seeds]
    sets = {rule["set"]: embedding_pool(path, columns, rule["set"]) for rule, path in rules}
    values = {
        **settings,
        **parse_changes(changes),
        "embeddings": _LAYER,
        "embedding_column": columns[1],
        "seeds": [rule for rule, _ in rules],
    }
    stage = parse_settings(load_stage("retrieve", "curate retrieve"), values, "curate retrieve")
    inputs = StageInputs(embedding_pool(pool, columns), sets, seed)
    run_single(stage, inputs, out, "hits", engine)


def embedding_pool(path: str, columns: Columns, name: str = "pool") -> Pool:
    """Embeddings as a pool of one side-car.

    Raises:
        SchemaError: the id column or the column of vectors is missing.
    """
    dataset = open_foreign(path, id_column=columns[0])
    if columns[1] not in dataset.columns:
        raise SchemaError(
            f"{path}: no column '{columns[1]}'; found: {', '.join(dataset.columns)}; "
            "name the vectors' with --embedding-column"
        )
    return Pool(name, {_LAYER: dataset})


def parse_seeds(text: str) -> tuple[dict[str, Any], str]:
    """Read NAME=EMB:sample:K or NAME=EMB:cluster:PER_CLUSTER[:MIN_HITS:CAP], from the right.

    Raises:
        ConfigError: it is neither.
    """
    name, equals, rest = text.partition("=")
    parts = rest.split(":")
    for rule, keys in (
        ("sample", ("k",)),
        ("cluster", ("per_cluster", "min_hits", "cap")),
        ("cluster", ("per_cluster",)),
    ):
        numbers = parts[-len(keys) :]
        path, kind = ":".join(parts[: -len(keys) - 1]), parts[-len(keys) - 1 :][0]
        if name and equals and path and kind == rule and all(n.isdigit() for n in numbers):
            values = dict(zip(keys, (int(n) for n in numbers), strict=True))
            return {"set": name, "rule": rule, **values}, path
    raise ConfigError(
        f"--seeds {text}: write NAME=EMB:sample:K or NAME=EMB:cluster:PER_CLUSTER[:MIN_HITS:CAP]"
    )


def _named_set(text: str, columns: Columns) -> tuple[str, Pool]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"--against {text}: write NAME=EMBEDDINGS")
    return name, embedding_pool(path, columns, name)
