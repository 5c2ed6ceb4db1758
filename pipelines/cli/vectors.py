"""Embeddings that commands are given: ours, or foreign ones under ids of ours; and their spaces."""

import re
from collections.abc import Sequence
from typing import Any, get_args

import pyarrow as pa

from curation import storage
from curation.config import parse_settings
from curation.dataset import Dataset, commit, open_foreign, write_shard
from curation.errors import ConfigError, SchemaError, SpaceError
from curation.identity import checked_set_name
from curation.pool import Pool
from curation.schema import ID, make_id
from curation.stage import ABOUT, Engine, Stage
from curation.stages.embed import Embed
from embedder.encoder import Precision
from pipelines.cli.inputs import refuse_clashes
from pipelines.cli.options import ColumnOptions
from pipelines.cli.single_stage import Settings, with_options
from pipelines.run.previous_runs import kept_by_dedup
from pipelines.run.run_record import POOL

EMBEDDINGS = "embeddings"
"""Name of the side-car of vectors."""
_OWN_IDS = "own_ids"
"""Attribute of copies of foreign embeddings: their ids are those of one file, and of no source."""
_KNOWN = ("original_width", "original_height", "num_bytes")
"""What foreign embeddings may say of images, by which representatives are chosen."""


def vector_stage(
    command: str,
    kind: type[Stage],
    settings: Settings,
    changes: Sequence[str] | None,
    columns: ColumnOptions,
    given: Settings,
) -> Stage:
    """Build a stage on the vectors. given: settings that only options of the command say.

    Raises:
        ConfigError: a setting that cannot be, or one of `given` changed by --set.
    """
    given = {"embeddings": EMBEDDINGS, "embedding_column": columns.embedding_column, **given}
    return parse_settings(
        kind, with_options(command, settings, changes, given), f"curate {command}"
    )


def embedding_pools(
    path: str, sets: Sequence[tuple[str, str]], columns: ColumnOptions, out: str, engine: Engine
) -> tuple[Pool, dict[str, Pool]]:
    """The embeddings of the pool, and those of sets by name.

    Raises:
        DatasetError: two of them hold one id of ours for different images.
    """
    named = [(POOL, path), *sets]
    pools = {name: embedding_pool(one, columns, out, name) for name, one in named}
    ours = [one for one in pools.values() if not one.layer(EMBEDDINGS).attributes.get(_OWN_IDS)]
    images = {pool.layer(EMBEDDINGS).attributes.get(ABOUT) for pool in ours}
    if len(ours) > 1 and (len(images) > 1 or None in images):
        refuse_clashes(ours, columns.embedding_column, out, engine)
    return pools.pop(POOL), pools


def kept_before(
    base: str, embeddings: str | None, columns: ColumnOptions, out: str
) -> tuple[Pool, ...]:
    """What an earlier dedup kept. embeddings: those that it was about, where they have moved."""
    moved = None
    if embeddings:
        moved = embedding_pool(embeddings, columns, out, "base").layer(EMBEDDINGS)
    return kept_by_dedup(base, moved, EMBEDDINGS, columns.embedding_column)


def facts_of(pool: Pool) -> Settings:
    """Which images the rows are about, where the vectors or clusters say so."""
    known = next(iter(pool.layers.values())).attributes
    return {ABOUT: known[ABOUT]} if ABOUT in known else {}


def embedding_pool(path: str, columns: ColumnOptions, out: str, name: str = POOL) -> Pool:
    """Embeddings as a pool of one side-car.

    Foreign rows whose ids are not ours get one: the hash of their own, which stays beside it as
    `source` in OUT/_input-NAME.

    Raises:
        SchemaError: the id column or the column of vectors is missing.
    """
    dataset = open_foreign(path, id_column=columns.id_column)
    if columns.embedding_column not in dataset.columns:
        raise SchemaError(
            f"{path}: no column '{columns.embedding_column}'; found: {', '.join(dataset.columns)}; "
            "name the vectors' with --embedding-column"
        )
    if columns.id_column != ID or not _has_our_ids(dataset):
        dataset = _with_our_ids(dataset, columns, storage.join(out, f"_input-{name}"))
    return Pool(name, {EMBEDDINGS: dataset})


def _has_our_ids(dataset: Dataset) -> bool:
    """Whether the first row of a data set has an id like ours."""
    for index, shard in enumerate(dataset.manifest.shards):
        if shard.num_rows:
            first = dataset.read_shard(index, [ID])[ID][0].as_py()
            return isinstance(first, str) and re.fullmatch("[0-9a-f]{32}", first) is not None
    return True


def _with_our_ids(dataset: Dataset, columns: ColumnOptions, folder: str) -> Dataset:
    """A copy of foreign embeddings under ids of ours, shard by shard."""
    known = [name for name in _KNOWN if name in dataset.columns]
    tables = (_renamed(dataset, index, columns, known) for index in range(dataset.num_shards))
    infos, schema = [], pa.schema([])
    for index, table in enumerate(tables):
        schema = table.schema
        infos.append(write_shard(folder, index, table))
    return commit(folder, schema, infos, {**dataset.attributes, _OWN_IDS: True})


def _renamed(dataset: Dataset, index: int, columns: ColumnOptions, known: list[str]) -> pa.Table:
    """One shard under ids of ours; the ids that it had are its sources.

    Raises:
        SchemaError: a row has no id.
    """
    table = dataset.read_shard(index, [columns.id_column, columns.embedding_column, *known])
    own = table[columns.id_column]
    if own.null_count:
        row, name = own.to_pylist().index(None), columns.id_column
        raise SchemaError(
            f"{dataset.shard_path(index)}: row {row} has no id ('{name}' is null); give "
            "every row an id of its own, or leave the row out"
        )
    sources = [str(value) for value in own.to_pylist()]
    ids = pa.array([make_id(source) for source in sources], pa.string())
    named = {
        ID: ids,
        "source": pa.array(sources, pa.string()),
        columns.embedding_column: table[columns.embedding_column],
    }
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


def parse_levels(text: str) -> list[int | str]:
    """Read numbers of clusters, the lowest level first.

    Raises:
        ConfigError: they are none.
    """
    counts = [count.strip() for count in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", count) for count in counts):
        raise ConfigError(
            f"--levels {text}: write numbers that fall, such as 5000,500,50; the first may be "
            "split: 100000x100,500000"
        )
    return [int(count) if count.isdigit() else count for count in counts]


def encoder_of(embeddings: str) -> str:
    """The encoder that made some embeddings.

    Raises:
        ConfigError: they do not say.
    """
    dataset = open_foreign(embeddings)
    if "encoder" not in dataset.attributes:
        raise ConfigError(f"{embeddings}: does not say which encoder made it; use --encoder")
    return str(dataset.attributes["encoder"])


def in_space_of(embeddings: str, stage: Embed, engine: Engine) -> Embed:
    """The stage in the precision that gives the space of some embeddings.

    Raises:
        SpaceError: none does: other weights, preprocessing or whitening.
    """
    attributes = open_foreign(embeddings).attributes
    space, recorded = attributes.get("space"), attributes.get("precision")
    tried = [str(recorded)] if recorded else list(get_args(Precision)[1:])
    if stage.precision != "auto":
        tried = [stage.precision]
    found = []
    for precision in tried:
        like = stage.replace(precision=precision).informed(engine)
        found.append(like.fingerprint())
        if space in (None, found[-1]):
            return like
    raise SpaceError(
        f"{embeddings}: is in space {space}, and its encoder gives {', '.join(found)} here "
        f"({', '.join(tried)}): other weights or another version of them"
    )
