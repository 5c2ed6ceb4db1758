"""`curate dedup` and `curate retrieve` on embeddings, ours or foreign."""

import re
from typing import Any

import pyarrow as pa

from curation import storage
from curation.config import laid_over, parse_settings
from curation.dataset import Dataset, commit, open_foreign, write_shard
from curation.errors import ConfigError, SchemaError
from curation.neighbors.listed import PAIRS
from curation.pool import Pool
from curation.registry import load_stage
from curation.schema import ID, make_id
from curation.stage import DECISIONS, Engine, StageInputs
from pipelines.base import kept_by_dedup, record_inputs
from pipelines.disk_budget import parse_bytes
from pipelines.verbs.stages import parse_changes, run_single

_LAYER = "embeddings"

Columns = tuple[str, str]
"""Names of the id column and of the column of vectors."""


def memory_gb(text: str | None) -> dict[str, Any]:
    """The setting that --memory gives."""
    return {} if text is None else {"memory_gb": parse_bytes(text, "--memory") / 1e9}


def comparison(recall: float | None, memory: str | None) -> dict[str, Any]:
    """How rows are compared, as far as --recall and --memory say so."""
    asked = {} if recall is None else {"recall": recall}
    return {"comparison": {**asked, **memory_gb(memory)}}


def run_dedup(
    embeddings: str,
    out: str,
    against: list[str],
    settings: dict[str, Any],
    changes: list[str],
    columns: Columns,
    engine: Engine,
    base: tuple[str | None, str | None] = (None, None),
    pairs: str | None = None,
) -> None:
    """`curate dedup`.

    base: the output of an earlier one, and its embeddings where they have moved.
    pairs: folder of the listed pairs, as many a row as the settings say.
    """
    sets = dict(_named_set(text, columns, out) for text in against)
    values = {
        **laid_over(settings, parse_changes(changes)),
        "embeddings": _LAYER,
        "embedding_column": columns[1],
        "against": list(sets),
    }
    stage = parse_settings(load_stage("near_dedup", "curate dedup"), values, "curate dedup")
    pool = embedding_pool(embeddings, columns, out)
    inputs = StageInputs(pool, sets, base=_kept_before(*base, columns, out))
    run_single(stage, inputs, out, DECISIONS, engine, {PAIRS: pairs} if pairs else None)
    record_inputs(out.rstrip("/"), embeddings, pool.layer(_LAYER), columns[1], base[0])


def _kept_before(
    base: str | None, embeddings: str | None, columns: Columns, out: str
) -> tuple[Pool, ...]:
    """What an earlier dedup kept.

    Raises:
        ConfigError: embeddings without the decisions on them.
    """
    if base is None and embeddings is not None:
        raise ConfigError("--base-embeddings: goes with --base, the decisions on these embeddings")
    if base is None:
        return ()
    moved = embedding_pool(embeddings, columns, out, "base").layer(_LAYER) if embeddings else None
    return kept_by_dedup(base, moved, _LAYER, columns[1])


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
    sets = {rule["set"]: embedding_pool(path, columns, out, rule["set"]) for rule, path in rules}
    values = {
        **laid_over(settings, parse_changes(changes)),
        "embeddings": _LAYER,
        "embedding_column": columns[1],
        "seeds": [rule for rule, _ in rules],
    }
    stage = parse_settings(load_stage("retrieve", "curate retrieve"), values, "curate retrieve")
    inputs = StageInputs(embedding_pool(pool, columns, out), sets, seed)
    run_single(stage, inputs, out, "hits", engine)


def run_cluster(
    embeddings: str,
    out: str,
    levels: str,
    settings: dict[str, Any],
    changes: list[str],
    columns: Columns,
    seed: int,
    engine: Engine,
) -> None:
    """`curate cluster`."""
    counts = [count.strip() for count in levels.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", count) for count in counts):
        raise ConfigError(
            f"--levels {levels}: write numbers that fall, such as 5000,500,50; the first may be "
            "split: 100000x100,500000"
        )
    values = {
        **laid_over(settings, parse_changes(changes)),
        "embeddings": _LAYER,
        "embedding_column": columns[1],
        "levels": [int(count) if count.isdigit() else count for count in counts],
    }
    stage = parse_settings(load_stage("cluster", "curate cluster"), values, "curate cluster")
    inputs = StageInputs(embedding_pool(embeddings, columns, out), seed=seed)
    run_single(stage, inputs, out, "clusters", engine)


def run_balance(
    clusters: str, out: str, target: int, multiplier: int, seed: int, engine: Engine
) -> None:
    """`curate balance`."""
    values = {"target": target, "multiplier": multiplier}
    stage = parse_settings(load_stage("balance", "curate balance"), values, "curate balance")
    pool = Pool("pool", {"clusters": Dataset.open(clusters)})
    run_single(stage, StageInputs(pool, seed=seed), out, DECISIONS, engine)


def embedding_pool(path: str, columns: Columns, out: str, name: str = "pool") -> Pool:
    """Embeddings as a pool of one side-car.

    Foreign rows whose ids are not ours get one: the hash of their own, which stays beside it as
    `source` in OUT/_input-NAME.

    Raises:
        SchemaError: the id column or the column of vectors is missing.
    """
    dataset = open_foreign(path, id_column=columns[0])
    if columns[1] not in dataset.columns:
        raise SchemaError(
            f"{path}: no column '{columns[1]}'; found: {', '.join(dataset.columns)}; "
            "name the vectors' with --embedding-column"
        )
    if columns[0] != ID or not _has_our_ids(dataset):
        dataset = _with_our_ids(dataset, columns, storage.join(out, f"_input-{name}"))
    return Pool(name, {_LAYER: dataset})


def _has_our_ids(dataset: Dataset) -> bool:
    """Whether the first row of a data set has an id like ours."""
    for index, shard in enumerate(dataset.manifest.shards):
        if shard.num_rows:
            first = dataset.read_shard(index, [ID])[ID][0].as_py()
            return isinstance(first, str) and re.fullmatch("[0-9a-f]{32}", first) is not None
    return True


def _with_our_ids(dataset: Dataset, columns: Columns, folder: str) -> Dataset:
    """A copy of foreign embeddings under ids of ours, shard by shard."""
    infos = []
    schema = None
    for index in range(dataset.num_shards):
        table = dataset.read_shard(index, columns)
        sources = [str(value) for value in table[columns[0]].to_pylist()]
        renamed = pa.table(
            {
                ID: pa.array([make_id(source) for source in sources], pa.string()),
                "source": pa.array(sources, pa.string()),
                columns[1]: table[columns[1]],
            }
        )
        schema = renamed.schema
        infos.append(write_shard(folder, index, renamed))
    return commit(folder, schema or pa.schema([]), infos, dataset.attributes)


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


def _named_set(text: str, columns: Columns, out: str) -> tuple[str, Pool]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"--against {text}: write NAME=EMBEDDINGS")
    return name, embedding_pool(path, columns, out, name)
