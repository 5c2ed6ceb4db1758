"""Verbs that run one stage on explicit inputs and outputs."""

from collections.abc import Sequence
from typing import Any, get_args

import pyarrow as pa

from curation import storage
from curation.config import apply_changes, laid_over, parse_settings
from curation.dataset import Dataset, open_foreign
from curation.digest import digest_of
from curation.errors import ConfigError, SchemaError, SpaceError
from curation.identity import SET_NAME_VERSION, checked_set_name, set_name_of
from curation.lost_files import require_files
from curation.pool import Pool, UnionPool
from curation.registry import load_stage
from curation.same_ids import SameIds
from curation.sources.places import RAW, is_packed
from curation.stage import ABOUT, DECISIONS, Engine, Stage, StageFolder, StageInputs
from curation.stages.embed import Embed
from curation.stages.filters import Filters
from curation.stages.ingest import Ingest
from curation.stages.pack import Pack
from curation.stages.select import Select
from embedder.encoder import Precision
from pipelines.cli.verdicts import about, check_about, kept_by
from pipelines.operate import console
from pipelines.run.settling import Settling
from pipelines.run.stage_runner import run_stage

Settings = dict[str, Any]
_HOSTS_SHOWN = 10
_NAMED = {"set_name_version": SET_NAME_VERSION}
"""How ids were made, beside what the manifest's stage says of it."""


def run_single(
    stage: Stage,
    inputs: StageInputs,
    out: str,
    primary: str,
    engine: Engine,
    elsewhere: dict[str, str] | None = None,
    facts: dict[str, Any] | None = None,
) -> dict[str, Dataset]:
    """Run one stage with its main output at the root of `out`; print a line on it.

    elsewhere: outputs that lie in folders of their own. facts: what is true of all outputs.
    """
    console.set_up_logging(False)
    for pool in (inputs.pool, *inputs.sets.values(), *inputs.base):
        require_files(pool.datasets())
    others, known = (tuple((some or {}).items()) for some in (elsewhere, facts))
    folder = StageFolder(out.rstrip("/"), stage.name(), primary, others, known)
    stage = _settling(out, engine).settle(stage)
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


def _settling(out: str, engine: Engine) -> Settling:
    return Settling(engine, storage.join(out, "_settled", "settings.json"))


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str)


def build(name: str, changes: list[str], **settings: Any) -> Stage:
    """Build a stage from settings and KEY=VALUE changes."""
    kind = load_stage(name, "--set")
    values = laid_over(settings, parse_changes(changes))
    return parse_settings(kind, values, f"--set of '{name}'")


def with_options(verb: str, settings: Settings, changed: Settings, given: Settings) -> Settings:
    """Settings of a verb, with the changes that --set asks for.

    given: settings that other options say.

    Raises:
        ConfigError: --set changes one of `given`, which would be lost.
    """
    for key in sorted(given.keys() & changed.keys()):
        raise ConfigError(f"curate {verb}: --set {key}: is said by the verb's own options")
    return {**laid_over(settings, changed), **given}


def parse_changes(changes: list[str]) -> Settings:
    """Read KEY=VALUE texts; values are YAML, dots in keys lead into inner settings."""
    values: Settings = {}
    apply_changes(values, changes)
    return values


def run_ingest(
    settings: Settings, set_name: str | None, changes: list[str], out: str, engine: Engine
) -> None:
    """`curate ingest`."""
    values = laid_over(settings, parse_changes(changes))
    if values.get("images") is not None:
        values = {"source_set": _set_name(str(values["images"]), set_name), **values}
    elif set_name is not None:
        values = {"source_set": checked_set_name(set_name, "--set-name"), **values}
    stage = parse_settings(Ingest, values, "curate ingest")
    run_single(stage, StageInputs(Pool("pool", {})), out, "rows", engine, facts=_NAMED)


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
    if Dataset.is_finished(storage.join(rows, RAW)):
        raise SchemaError(f"{rows}: holds images, not URLs; give it to canonicalize, or to embed")
    if Dataset.is_finished(rows):
        pool = Pool.of(Dataset.open(rows))
    else:
        pool = _ingested(Ingest(urls=rows), out, engine)
    facts = {ABOUT: about(rows_of(pool), engine)}
    if retry_failed is not None:
        pool = _failed_before(pool, retry_failed, out, engine)
    outputs = run_single(stage, StageInputs(pool), out, "raw", engine, facts=facts)
    _print_hosts(summarise_hosts(outputs["fetches"]))


def _print_hosts(hosts: pa.Table) -> None:
    """The hosts with the most rows."""
    if not hosts.num_rows:
        return
    title = f"by host ({min(_HOSTS_SHOWN, hosts.num_rows)} of {hosts.num_rows:,})"
    columns = (column.to_pylist() for column in hosts.slice(0, _HOSTS_SHOWN).columns)
    console.print_rows(hosts.column_names, list(zip(*columns, strict=True)), title)


def _failed_before(pool: Pool, previous: str, out: str, engine: Engine) -> Pool:
    """Only the rows that an earlier download of the same rows may fetch now.

    Raises:
        SchemaError: the earlier download was of other rows.
    """
    from curation.fetching.retry import retryable_rows

    decisions = Dataset.open(storage.join(previous, f"_{DECISIONS}"))
    check_about(decisions, pool, rows_of(pool), engine)
    return pool.with_stage({}, retryable_rows(decisions, storage.join(out, "_retried")))


def run_canonicalize(
    raw: str, out: str, changes: list[str], set_name: str | None, engine: Engine
) -> None:
    """`curate canonicalize`."""
    stage = build("canonicalize", changes)
    pool = _raw_pool(raw, out, engine, set_name=set_name)
    run_single(stage, StageInputs(pool), out, "images", engine)


def run_filter(
    images: str, out: str, filters: str, changes: list[str], set_name: str | None, engine: Engine
) -> None:
    """`curate filter`."""
    from curation.fetching.hosts import summarise_verdicts

    stage = _filters(filters, changes)
    pool = images_pool(images, out, engine, set_name=set_name)
    facts = {ABOUT: about(images_of(pool), engine)}
    outputs = run_single(stage, StageInputs(pool), out, DECISIONS, engine, facts=facts)
    if "source" in pool.columns:
        _print_hosts(summarise_verdicts(pool, outputs[DECISIONS]))


def _filters(text: str, changes: list[str]) -> Filters:
    """The filters named in order, with the settings of each.

    Raises:
        ConfigError: a name that is no filter or stands there twice, or a setting that cannot be.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    settings: dict[str, Settings] = {name: {} for name in names}
    if len(settings) < len(names):
        raise ConfigError(f"--filters {text}: names a filter twice; name each once, in order")
    for name, values in parse_changes(changes).items():
        if name not in settings or not isinstance(values, dict):
            raise ConfigError(f"--set {name}: write FILTER.KEY=VALUE; filters: {', '.join(names)}")
        settings[name] = values
    for name, values in settings.items():
        parse_settings(load_stage(name, "--filters"), values, f"--set of '{name}'")
    chain = [{name: values} for name, values in settings.items()]
    return parse_settings(Filters, {"filters": chain}, "curate filter")


def run_embed(
    images: str,
    out: str,
    encoder: str | None,
    like: str | None,
    settings: Settings,
    changes: list[str],
    set_name: str | None,
    engine: Engine,
) -> None:
    """`curate embed`."""
    if (encoder is None) == (like is None):
        raise ConfigError("curate embed: give either --encoder NAME or --like EMBEDDINGS")
    name = encoder or _encoder_of(str(like))
    given = {"encoders": {"embedding": name}}
    values = with_options("embed", settings, parse_changes(changes), given)
    stage = parse_settings(Embed, values, "curate embed")
    # An unknown encoder, a missing file or another space is an error before any work.
    if like is None:
        settled = _settling(out, engine).settle(stage)
    else:
        settled = _in_space_of(str(like), stage, engine)
    pool = images_pool(images, out, engine, set_name=set_name)
    facts = {ABOUT: about(images_of(pool), engine)}
    run_single(settled, StageInputs(pool), out, "embedding", engine, facts=facts)


def _in_space_of(embeddings: str, stage: Embed, engine: Engine) -> Embed:
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


def run_select(images: list[str], keep: list[str], out: str, engine: Engine) -> None:
    """`curate select`."""
    named = dict(once_each([named_path(text, "IMAGES") for text in images], "IMAGES"))
    verdicts: dict[str, list[str]] = {name: [] for name in named}
    for name, path in (named_path(text, "--keep") for text in keep):
        if name not in verdicts:
            raise ConfigError(f"--keep {name}=…: no images of that name; {', '.join(named)} are")
        verdicts[name].append(path)
    pools = [
        _kept(images_pool(path, out, engine, name, name), verdicts[name], out, engine)
        for name, path in named.items()
    ]
    union = UnionPool("union", {}, None, tuple(pools))
    run_single(Select(), StageInputs(union), out, "manifest", engine)


def run_pack(
    images: str,
    keep: list[str],
    rows_per_tar: int,
    out: str,
    set_name: str | None,
    engine: Engine,
) -> None:
    """`curate pack`."""
    pool = _kept(images_pool(images, out, engine, set_name=set_name), keep, out, engine)
    refuse_clashes((pool,), "sha256", out, engine)
    run_single(Pack(rows_per_tar=rows_per_tar), StageInputs(pool), out, "packed", engine)


def refuse_clashes(pools: Sequence[Pool], column: str, out: str, engine: Engine) -> None:
    """Refuse sets that hold one id for different images. column: what tells images apart.

    Raises:
        DatasetError: names two sets and an id.
    """
    union = UnionPool("sets", {}, None, tuple(pools))
    folder = storage.join(out, "_scratch", f"ids-{digest_of(union.fingerprint([column]))}")
    SameIds(union, column).without_repeats(engine, folder)
    storage.remove(folder)


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


def images_pool(
    path: str, out: str, engine: Engine, name: str = "pool", set_name: str | None = None
) -> Pool:
    """The images of a finished data set, or of a folder of files, tars or Parquet.

    A folder is ingested and canonicalized below `out` first. set_name: of a folder; by default its
    own name.
    """
    if Dataset.is_finished(path) and "image" in Dataset.open(path).columns:
        images = Dataset.open(path)
        require_files([images])
        return Pool.of(images, name)
    raw = _raw_pool(path, out, engine, name, set_name)
    folder = StageFolder(storage.join(out, f"_images-{name}"), "canonicalize")
    watcher = console.ConsoleWatcher()
    stage = build("canonicalize", [])
    _, outputs = run_stage(stage, StageInputs(raw), folder, engine, watcher)
    decisions = outputs.pop(DECISIONS)
    return raw.with_stage(outputs, decisions)


def images_of(pool: Pool) -> Dataset:
    """The side-car that holds the images of a pool."""
    return next(one for one in reversed(pool.layers.values()) if "image" in one.columns)


def rows_of(pool: Pool) -> Dataset:
    """The side-car that says where the rows of a pool are from."""
    return next(iter(pool.layers.values()))


def _raw_pool(
    path: str, out: str, engine: Engine, name: str = "pool", set_name: str | None = None
) -> Pool:
    """Images as they were fetched: what download or ingest wrote, or a folder that is ingested.

    Raises:
        SchemaError: a data set without such images.
    """
    if not Dataset.is_finished(path) or is_packed(Dataset.open(path)):
        stage = Ingest(images=path, source_set=_set_name(path, set_name))
        return _ingested(stage, out, engine, name)
    dataset, raw = Dataset.open(path), storage.join(path, RAW)
    if "raw" in dataset.columns:
        return Pool.of(dataset, name)
    if Dataset.is_finished(raw):  # `curate ingest --images` lays the bytes beside the rows
        return Pool(name, {"rows": dataset, "raw": Dataset.open(raw)})
    raise SchemaError(
        f"{path}: holds no images as they were fetched; found: {', '.join(dataset.columns)}; give "
        "the output of download or of ingest --images, or a folder of images"
    )


def _set_name(path: str, given: str | None) -> str:
    return set_name_of(path) if given is None else checked_set_name(given, "--set-name")


def _ingested(stage: Ingest, out: str, engine: Engine, name: str = "pool") -> Pool:
    root = storage.join(out, f"_ingest-{name}")
    folder = StageFolder(root, "ingest", facts=tuple(_NAMED.items()))
    pool = Pool(name, {})
    _, outputs = run_stage(stage, StageInputs(pool), folder, engine, console.ConsoleWatcher())
    decisions = outputs.pop(DECISIONS)
    return pool.with_stage(outputs, decisions)


def _kept(pool: Pool, decisions: Sequence[str], out: str, engine: Engine) -> Pool:
    """Only the images that all of some decisions keep."""
    return kept_by(pool, images_of(pool), decisions, out, engine)


def _encoder_of(embeddings: str) -> str:
    dataset = open_foreign(embeddings)
    if "encoder" not in dataset.attributes:
        raise ConfigError(f"{embeddings}: does not say which encoder made it; use --encoder")
    return str(dataset.attributes["encoder"])


def named_path(text: str, what: str) -> tuple[str, str]:
    """Read NAME=PATH.

    Raises:
        ConfigError: it is not, or the name can be none.
    """
    name, equals, path = text.partition("=")
    if not (equals and path):
        raise ConfigError(f"{what} {text}: write NAME=PATH")
    return checked_set_name(name, what), path


def once_each(named: Sequence[tuple[str, Any]], what: str) -> Sequence[tuple[str, Any]]:
    """Give what is named as it is.

    Raises:
        ConfigError: two have one name, so that one of them would be lost.
    """
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{what} {name}: stands there twice; give each set its own name")
    return named
