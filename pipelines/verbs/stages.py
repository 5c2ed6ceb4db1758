"""Verbs that run one stage on explicit inputs and outputs."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from curation import storage
from curation.config import apply_change, laid_over, parse_settings
from curation.dataset import Dataset, open_foreign
from curation.errors import ConfigError, SchemaError
from curation.pool import Pool, UnionPool
from curation.registry import load_stage
from curation.stage import DECISIONS, Engine, Stage, StageFolder, StageInputs
from curation.stages.embed import Embed
from curation.stages.filters import Filters
from curation.stages.ingest import Ingest
from curation.stages.pack import Pack
from curation.stages.select import Select
from pipelines import console
from pipelines.stage_runner import run_stage

Settings = dict[str, Any]
_HOSTS_SHOWN = 10


def run_single(
    stage: Stage,
    inputs: StageInputs,
    out: str,
    primary: str,
    engine: Engine,
    elsewhere: dict[str, str] | None = None,
) -> dict[str, Dataset]:
    """Run one stage with its main output at the root of `out`; print a line on it.

    elsewhere: outputs that lie in folders of their own.
    """
    console.set_up_logging(False)
    others = tuple((elsewhere or {}).items())
    folder = StageFolder(out.rstrip("/"), stage.name(), primary, others)
    watcher = console.ConsoleWatcher()
    record, outputs = run_stage(stage, inputs, folder, engine, watcher)
    console.print_pairs(
        {
            "rows in": record.rows_in,
            **{f"dropped: {reason}": count for reason, count in record.dropped.items()},
            "rows out": record.rows_out,
            **{name: value for name, value in record.figures.items() if _is_plain(value)},
            "output": out,
            "content digest": Dataset.open(folder.output(primary)).manifest.content_digest,
        },
        title=stage.name(),
    )
    return outputs


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str)


def build(name: str, changes: list[str], **settings: Any) -> Stage:
    """Build a stage from settings and KEY=VALUE changes."""
    kind = load_stage(name, "--set")
    values = laid_over(settings, parse_changes(changes))
    return parse_settings(kind, values, f"--set of '{name}'")


def parse_changes(changes: list[str]) -> Settings:
    """Read KEY=VALUE texts; values are YAML, dots in keys lead into inner settings."""
    values: Settings = {}
    for change in changes:
        apply_change(values, change)
    return values


def run_ingest(settings: Settings, changes: list[str], out: str, engine: Engine) -> None:
    """`curate ingest`."""
    values = laid_over(settings, parse_changes(changes))
    stage = parse_settings(Ingest, values, "curate ingest")
    run_single(stage, StageInputs(Pool("pool", {})), out, "rows", engine)


def run_download(
    rows: str,
    out: str,
    retry_failed: str | None,
    settings: Settings,
    changes: list[str],
    engine: Engine,
) -> None:
    """`curate download`."""
    from curation.fetching.hosts import summarise_hosts

    stage = build("download", changes, **settings)
    if Dataset.is_finished(rows):
        pool = Pool.of(Dataset.open(rows))
    else:
        pool = _ingested(Ingest(urls=rows), out, engine)
    if retry_failed is not None:
        pool = _failed_before(pool, retry_failed, out)
    outputs = run_single(stage, StageInputs(pool), out, "raw", engine)
    _print_hosts(summarise_hosts(outputs["fetches"]))


def _print_hosts(hosts: pa.Table) -> None:
    """The hosts with the most rows."""
    if not hosts.num_rows:
        return
    title = f"by host ({min(_HOSTS_SHOWN, hosts.num_rows)} of {hosts.num_rows:,})"
    columns = (column.to_pylist() for column in hosts.slice(0, _HOSTS_SHOWN).columns)
    console.print_rows(hosts.column_names, list(zip(*columns, strict=True)), title)


def _failed_before(pool: Pool, previous: str, out: str) -> Pool:
    """Only the rows that an earlier download of the same rows may fetch now.

    Raises:
        SchemaError: the earlier download was of other rows.
    """
    from curation.fetching.retry import retryable_rows

    decisions = Dataset.open(storage.join(previous, f"_{DECISIONS}"))
    if decisions.num_shards != pool.num_shards:
        raise SchemaError(
            f"{previous}: has {decisions.num_shards} shards, the rows have {pool.num_shards}; "
            "give a download of the same rows"
        )
    return pool.with_stage({}, retryable_rows(decisions, storage.join(out, "_retried")))


def run_canonicalize(raw: str, out: str, changes: list[str], engine: Engine) -> None:
    """`curate canonicalize`."""
    stage = build("canonicalize", changes)
    run_single(stage, StageInputs(_raw_pool(raw, out, engine)), out, "images", engine)


def run_filter(images: str, out: str, filters: str, changes: list[str], engine: Engine) -> None:
    """`curate filter`."""
    from curation.fetching.hosts import summarise_verdicts

    names = [name.strip() for name in filters.split(",") if name.strip()]
    settings: dict[str, Settings] = {name: {} for name in names}
    for name, values in parse_changes(changes).items():
        if name not in settings or not isinstance(values, dict):
            raise ConfigError(f"--set {name}: write FILTER.KEY=VALUE; filters: {', '.join(names)}")
        settings[name] = values
    stage = Filters(filters=tuple({name: values} for name, values in settings.items()))
    pool = images_pool(images, out, engine)
    outputs = run_single(stage, StageInputs(pool), out, DECISIONS, engine)
    if "source" in pool.columns:
        _print_hosts(summarise_verdicts(pool, outputs[DECISIONS]))


def run_embed(
    images: str,
    out: str,
    encoder: str | None,
    like: str | None,
    settings: Settings,
    engine: Engine,
) -> None:
    """`curate embed`."""
    if (encoder is None) == (like is None):
        raise ConfigError("curate embed: give either --encoder NAME or --like EMBEDDINGS")
    name = encoder or _encoder_of(str(like))
    stage = parse_settings(Embed, {**settings, "encoders": {"embedding": name}}, "curate embed")
    stage.outputs()  # an unknown encoder or a missing file is an error before any work
    pool = images_pool(images, out, engine)
    run_single(stage, StageInputs(pool), out, "embedding", engine)


def run_select(images: list[str], keep: list[str], out: str, engine: Engine) -> None:
    """`curate select`."""
    verdicts = dict(_named(text, "--keep") for text in keep)
    named = [_named(text, "IMAGES") for text in images]
    unknown = set(verdicts) - {name for name, _ in named}
    if unknown:
        raise ConfigError(f"--keep {unknown.pop()}=…: no images of that name are given")
    pools = [
        _kept(images_pool(path, out, engine, name), verdicts.get(name)) for name, path in named
    ]
    union = UnionPool("union", {}, None, tuple(pools))
    run_single(Select(), StageInputs(union), out, "manifest", engine)


def run_pack(images: str, keep: str | None, rows_per_tar: int, out: str, engine: Engine) -> None:
    """`curate pack`."""
    pool = _kept(images_pool(images, out, engine), keep)
    run_single(Pack(rows_per_tar=rows_per_tar), StageInputs(pool), out, "packed", engine)


def print_encoders(names: Sequence[str], as_json: bool) -> None:
    """`curate encoders`."""
    from embedder.encoder import check_encoder, list_encoders

    statuses = [check_encoder(name) for name in names] if names else list_encoders()
    if as_json:
        console.print_json([vars(status) for status in statuses])
        return
    console.print_rows(
        ("encoder", "works here", "note", "licence"),
        [(s.name, "yes" if s.works else "no", s.note, s.licence) for s in statuses],
    )


def images_pool(path: str, out: str, engine: Engine, name: str = "pool") -> Pool:
    """The images of a finished data set, or of a folder of files, tars or Parquet.

    A folder is ingested and canonicalized below `out` first.
    """
    if Dataset.is_finished(path) and "image" in Dataset.open(path).columns:
        return Pool.of(Dataset.open(path), name)
    raw = _raw_pool(path, out, engine, name)
    folder = StageFolder(storage.join(out, f"_images-{name}"), "canonicalize")
    watcher = console.ConsoleWatcher()
    stage = build("canonicalize", [])
    _, outputs = run_stage(stage, StageInputs(raw), folder, engine, watcher)
    decisions = outputs.pop(DECISIONS)
    return raw.with_stage(outputs, decisions)


def _raw_pool(path: str, out: str, engine: Engine, name: str = "pool") -> Pool:
    if Dataset.is_finished(path):
        return Pool.of(Dataset.open(path), name)
    source = "web" if name == "pool" else name
    return _ingested(Ingest(images=path, source_set=source), out, engine, name)


def _ingested(stage: Ingest, out: str, engine: Engine, name: str = "pool") -> Pool:
    folder = StageFolder(storage.join(out, f"_ingest-{name}"), "ingest")
    pool = Pool(name, {})
    _, outputs = run_stage(stage, StageInputs(pool), folder, engine, console.ConsoleWatcher())
    decisions = outputs.pop(DECISIONS)
    return pool.with_stage(outputs, decisions)


def _kept(pool: Pool, decisions: str | None) -> Pool:
    """Only the rows with keep = true in some decisions.

    Raises:
        SchemaError: the decisions are not about these images.
    """
    if decisions is None:
        return pool
    verdicts = Dataset.open(decisions)
    if verdicts.num_shards != pool.num_shards:
        raise SchemaError(
            f"{decisions}: has {verdicts.num_shards} shards, the images have {pool.num_shards}; "
            "give decisions that were made on these images"
        )
    return pool.with_stage({}, verdicts)


def _encoder_of(embeddings: str) -> str:
    dataset = open_foreign(embeddings)
    if "encoder" not in dataset.attributes:
        raise ConfigError(f"{embeddings}: does not say which encoder made it; use --encoder")
    return str(dataset.attributes["encoder"])


def _named(text: str, what: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise ConfigError(f"{what} {text}: write NAME=PATH")
    return name, path
