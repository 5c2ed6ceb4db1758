"""`curate dedup` and `curate retrieve` on embeddings, ours or foreign."""

import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from curation import storage
from curation.config import parse_settings
from curation.dataset import Dataset, commit, open_foreign, write_shard
from curation.errors import ConfigError, SchemaError
from curation.identity import checked_set_name
from curation.neighbors.join.listed_pairs import PAIRS
from curation.pool import Pool
from curation.registry import load_stage
from curation.schema import ID, make_id
from curation.stage import ABOUT, DECISIONS, Engine, Stage, StageInputs
from pipelines.cli.stages import (
    named_path,
    once_each,
    parse_changes,
    refuse_clashes,
    run_single,
    with_options,
)
from pipelines.operate.disk_budget import parse_bytes
from pipelines.run.previous_runs import kept_by_dedup, record_inputs

_LAYER, _POOL = "embeddings", "pool"
_OWN_IDS = "own_ids"
"""Attribute of copies of foreign embeddings: their ids are those of one file, and of no source."""
_KNOWN = ("original_width", "original_height", "num_bytes")
"""What foreign embeddings may say of images, by which representatives are chosen."""

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
    named = [named_path(text, "--against") for text in against]
    paths = once_each([(_POOL, embeddings), *named], "--against")
    given = {"embedding_column": columns[1], "against": [name for name, _ in named]}
    stage = _stage("dedup", "near_dedup", settings, changes, given)
    sets = _pools(paths, columns, out, engine)
    pool = sets.pop(_POOL)
    inputs = StageInputs(pool, sets, base=_kept_before(*base, columns, out))
    elsewhere = {PAIRS: pairs} if pairs else None
    run_single(stage, inputs, out, DECISIONS, engine, elsewhere, facts=_facts(pool))
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
    named = [(rule["set"], path) for rule, path in rules]
    paths = once_each([(_POOL, pool), *named], "--seeds")
    given = {"embedding_column": columns[1], "seeds": [rule for rule, _ in rules]}
    stage = _stage("retrieve", "retrieve", settings, changes, given)
    sets = _pools(paths, columns, out, engine)
    rows = sets.pop(_POOL)
    run_single(stage, StageInputs(rows, sets, seed), out, "hits", engine, facts=_facts(rows))


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
    given = {
        "embedding_column": columns[1],
        "levels": [int(count) if count.isdigit() else count for count in counts],
    }
    stage = _stage("cluster", "cluster", settings, changes, given)
    pool = embedding_pool(embeddings, columns, out)
    run_single(stage, StageInputs(pool, seed=seed), out, "clusters", engine, facts=_facts(pool))


def run_balance(
    clusters: str, out: str, target: int, multiplier: int, seed: int, engine: Engine
) -> None:
    """`curate balance`."""
    values = {"target": target, "multiplier": multiplier}
    stage = parse_settings(load_stage("balance", "curate balance"), values, "curate balance")
    pool = Pool("pool", {"clusters": Dataset.open(clusters)})
    run_single(stage, StageInputs(pool, seed=seed), out, DECISIONS, engine, facts=_facts(pool))


def _stage(
    verb: str, name: str, settings: dict[str, Any], changes: list[str], given: dict[str, Any]
) -> Stage:
    """Build a stage on the vectors. given: settings that only options of the verb say.

    Raises:
        ConfigError: a setting that cannot be, or one of `given` changed by --set.
    """
    given = {"embeddings": _LAYER, **given}
    values = with_options(verb, settings, parse_changes(changes), given)
    return parse_settings(load_stage(name, f"curate {verb}"), values, f"curate {verb}")


def _pools(
    paths: Sequence[tuple[str, str]], columns: Columns, out: str, engine: Engine
) -> dict[str, Pool]:
    """The embeddings of several sets, by name.

    Raises:
        DatasetError: two of them hold one id of ours for different images.
    """
    pools = {name: embedding_pool(path, columns, out, name) for name, path in paths}
    ours = [one for one in pools.values() if not one.layer(_LAYER).attributes.get(_OWN_IDS)]
    images = {pool.layer(_LAYER).attributes.get(ABOUT) for pool in ours}
    if len(ours) > 1 and (len(images) > 1 or None in images):
        refuse_clashes(ours, columns[1], out, engine)
    return pools


def _facts(pool: Pool) -> dict[str, Any]:
    """Which images the rows are about, where the vectors or clusters say so."""
    known = next(iter(pool.layers.values())).attributes
    return {ABOUT: known[ABOUT]} if ABOUT in known else {}


def embedding_pool(path: str, columns: Columns, out: str, name: str = _POOL) -> Pool:
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
    known = [name for name in _KNOWN if name in dataset.columns]
    tables = (_renamed(dataset, index, columns, known) for index in range(dataset.num_shards))
    infos, schema = [], pa.schema([])
    for index, table in enumerate(tables):
        schema = table.schema
        infos.append(write_shard(folder, index, table))
    return commit(folder, schema, infos, {**dataset.attributes, _OWN_IDS: True})


def _renamed(dataset: Dataset, index: int, columns: Columns, known: list[str]) -> pa.Table:
    """One shard under ids of ours; the ids that it had are its sources.

    Raises:
        SchemaError: a row has no id.
    """
    table = dataset.read_shard(index, [*columns, *known])
    own = table[columns[0]]
    if own.null_count:
        row = own.to_pylist().index(None)
        raise SchemaError(
            f"{dataset.shard_path(index)}: row {row} has no id ('{columns[0]}' is null); give "
            "every row an id of its own, or leave the row out"
        )
    sources = [str(value) for value in own.to_pylist()]
    ids = pa.array([make_id(source) for source in sources], pa.string())
    named = {ID: ids, "source": pa.array(sources, pa.string()), columns[1]: table[columns[1]]}
    return pa.table({**named, **{name: table[name] for name in known}})


_COUNT = re.compile("[0-9]{1,12}")


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
        if equals and path and kind == rule and all(_COUNT.fullmatch(n) for n in numbers):
            values = dict(zip(keys, (int(n) for n in numbers), strict=True))
            return {"set": checked_set_name(name, "--seeds"), "rule": rule, **values}, path
    raise ConfigError(
        f"--seeds {text}: write NAME=EMB:sample:K or NAME=EMB:cluster:PER_CLUSTER[:MIN_HITS:CAP]"
        ", with whole numbers from 1 to 12 digits"
    )
