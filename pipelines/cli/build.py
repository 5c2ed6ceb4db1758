"""Commands that run one stage on explicit inputs: from lists and folders to packed images."""

from typing import Annotated

import typer

from pipelines.cli.options import (
    Changes,
    Images,
    Json,
    Out,
    SetName,
    ShardOptions,
    StageOptions,
)


def ingest(
    out: Out,
    urls: Annotated[str | None, typer.Option("--urls", help="Lists of URLs.")] = None,
    archives: Annotated[
        str | None, typer.Option("--archives", help="WARC or WAT files: images of their pages.")
    ] = None,
    images: Annotated[
        str | None, typer.Option("--images", help="Folder of images, tars, Parquet; a work folder.")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option("--image-column", help="Column of the images in Parquet files.")
    ] = None,
    url_column: Annotated[str, typer.Option("--url-column", help="Column of the URL.")] = "url",
    columns: Annotated[
        str | None,
        typer.Option("--columns", help="Names for CSV and TSV without a header: alt,url (CC3M)."),
    ] = None,
    set_name: SetName = None,
    rows_per_shard: Annotated[int, typer.Option("--rows-per-shard", min=1)] = 10_000,
    changes: Changes = None,
    engine: StageOptions = StageOptions(),
) -> None:
    """Give every URL or image its id; drop repeated ones and those on lists.

    Examples:

        curate ingest --urls urls.parquet --out rows

        curate ingest --urls Train_GCC-training.tsv --columns alt,url --out cc3m

        curate ingest --archives crawl/ --out rows --set lists.blocked.ut1=blacklists/
    """
    from curation.config import laid_over, parse_settings
    from curation.identity import checked_set_name
    from curation.pool import Pool
    from curation.stage import StageInputs
    from curation.stages.ingest import Ingest
    from pipelines.cli.inputs import HOW_IDS_ARE_MADE, chosen_set_name
    from pipelines.cli.single_stage import parse_changes, run_single

    settings = {
        "urls": urls,
        "archives": archives,
        "images": images,
        "image_column": image_column,
        "url_column": url_column,
        "columns": [] if columns is None else [name.strip() for name in columns.split(",")],
        "rows_per_shard": rows_per_shard,
    }
    values = laid_over(settings, parse_changes(changes))
    if values.get("images") is not None:
        values = {"source_set": chosen_set_name(str(values["images"]), set_name), **values}
    elif set_name is not None:
        values = {"source_set": checked_set_name(set_name, "--set-name"), **values}
    stage = parse_settings(Ingest, values, "curate ingest")
    inputs = StageInputs(Pool("pool", {}))
    run_single(stage, inputs, out, "rows", engine.runner(), facts=HOW_IDS_ARE_MADE)


def download(
    rows: Annotated[str, typer.Argument(help="Output of ingest, or a list of URLs.")],
    out: Out,
    retry_failed: Annotated[
        str | None,
        typer.Option("--retry-failed", help="Fetch only what failed in this earlier output."),
    ] = None,
    user_agent: Annotated[
        str | None,
        typer.Option("--user-agent", help="Who crawls, and where to reach you: public crawls say."),
    ] = None,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Fetch from loopback and private addresses.")
    ] = False,
    changes: Changes = None,
    engine: ShardOptions = ShardOptions(),
) -> None:
    """Fetch images politely and safely; every URL ends as a row with one reason.

    Examples:

        curate download urls.parquet --out raw --user-agent "mybot (me@example.org)"

        curate download rows --out raw --engine ray --workers 16

        curate download rows --out raw2 --retry-failed raw
    """
    from curation import storage
    from curation.dataset import Dataset
    from curation.errors import SchemaError
    from curation.fetching.hosts import summarize_hosts
    from curation.fetching.retry import retryable_rows
    from curation.pool import Pool
    from curation.sources.places import RAW
    from curation.stage import ABOUT, DECISIONS, StageInputs
    from curation.stages.ingest import Ingest
    from pipelines.cli.inputs import ingested, rows_of
    from pipelines.cli.single_stage import build_stage, print_hosts, run_single
    from pipelines.cli.verdicts import about, check_about

    given = {"user_agent": user_agent, "allow_private": allow_private or None}
    settings = {name: value for name, value in given.items() if value is not None}
    stage, runner = build_stage("download", changes, settings), engine.runner()
    if Dataset.is_finished(storage.join(rows, RAW)):
        raise SchemaError(f"{rows}: holds images, not URLs; give it to canonicalize, or to embed")
    if Dataset.is_finished(rows):
        pool = Pool.of(Dataset.open(rows))
    else:
        pool = ingested(Ingest(urls=rows), out, runner)
    facts = {ABOUT: about(rows_of(pool), runner.engine)}
    if retry_failed is not None:
        before = Dataset.open(storage.join(retry_failed, f"_{DECISIONS}"))
        check_about(before, pool, rows_of(pool), runner.engine)
        pool = pool.with_stage({}, retryable_rows(before, storage.join(out, "_retried")))
    outputs = run_single(stage, StageInputs(pool), out, "raw", runner, facts=facts)
    print_hosts(summarize_hosts(outputs["fetches"]))


def canonicalize(
    raw: Annotated[
        str, typer.Argument(help="Output of download or ingest --images, or a folder of images.")
    ],
    out: Out,
    changes: Changes = None,
    set_name: SetName = None,
    engine: ShardOptions = ShardOptions(),
) -> None:
    """Decode once, turn upright, convert to sRGB, shrink, and hash.

    Example:

        curate canonicalize raw --out images --set max_side=512
    """
    from curation.stage import StageInputs
    from pipelines.cli.inputs import raw_pool
    from pipelines.cli.single_stage import build_stage, run_single

    stage, runner = build_stage("canonicalize", changes), engine.runner()
    pool = raw_pool(raw, out, runner, set_name=set_name)
    run_single(stage, StageInputs(pool), out, "images", runner)


def filter_images(
    images: Images,
    out: Out,
    filters: Annotated[
        str, typer.Option("--filters", help="Filters in order, by the names of their stages.")
    ] = "quality,nsfw",
    changes: Changes = None,
    set_name: SetName = None,
    engine: ShardOptions = ShardOptions(),
) -> None:
    """Drop useless and unsafe images: id, keep, reason, score, threshold, a column a score.

    Examples:

        curate filter images --out verdicts

        curate filter photos/ --out verdicts --filters quality,nsfw,faces --set nsfw.threshold=0.5
    """
    from curation.fetching.hosts import summarize_verdicts
    from curation.stage import ABOUT, DECISIONS, StageInputs
    from pipelines.cli.inputs import images_of, images_pool
    from pipelines.cli.single_stage import chain_filters, print_hosts, run_single
    from pipelines.cli.verdicts import about

    stage, runner = chain_filters(filters, changes), engine.runner()
    pool = images_pool(images, out, runner, set_name=set_name)
    facts = {ABOUT: about(images_of(pool), runner.engine)}
    outputs = run_single(stage, StageInputs(pool), out, DECISIONS, runner, facts=facts)
    if "source" in pool.columns:
        print_hosts(summarize_verdicts(pool, outputs[DECISIONS]))


def embed(
    images: Images,
    out: Out,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="Name of the encoder; see `curate encoders`.")
    ] = None,
    like: Annotated[
        str | None, typer.Option("--like", help="Embed into the space of these embeddings.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    allow_hub: Annotated[
        bool, typer.Option("--allow-hub", help="Fetch weights that are not here from a hub.")
    ] = False,
    changes: Changes = None,
    set_name: SetName = None,
    engine: ShardOptions = ShardOptions(),
) -> None:
    """Embed images: id, source, embedding (unit rows of float16).

    Examples:

        curate embed images --encoder lite-copy --out emb

        curate embed photos/ --like emb --out photos-emb

        curate embed images --encoder sscd:FILE --out emb --engine ray --set gpus=1
    """
    from curation.config import parse_settings
    from curation.errors import ConfigError
    from curation.stage import ABOUT, StageInputs
    from curation.stages.embed import Embed
    from pipelines.cli.inputs import images_of, images_pool
    from pipelines.cli.single_stage import run_single, settling_in, with_options
    from pipelines.cli.vectors import encoder_of, in_space_of
    from pipelines.cli.verdicts import about

    if (encoder is None) == (like is None):
        raise ConfigError("curate embed: give either --encoder NAME or --like EMBEDDINGS")
    name = encoder or encoder_of(str(like))
    settings = {"device": device, "allow_hub": allow_hub}
    values = with_options("embed", settings, changes, {"encoders": {"embedding": name}})
    stage, runner = parse_settings(Embed, values, "curate embed"), engine.runner()
    # An unknown encoder, a missing file or another space is an error before any work.
    if like is None:
        settled = settling_in(out, runner.engine).settle(stage)
    else:
        settled = in_space_of(like, stage, runner.engine)
    pool = images_pool(images, out, runner, set_name=set_name)
    facts = {ABOUT: about(images_of(pool), runner.engine)}
    run_single(settled, StageInputs(pool), out, "embedding", runner, facts=facts)


def select(
    images: Annotated[
        list[str],
        typer.Argument(help="Outputs of canonicalize, in order of precedence: NAME=IMAGES."),
    ],
    out: Out,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep", help="NAME=DECISIONS: take only images with keep = true. May be repeated."
        ),
    ] = None,
    engine: StageOptions = StageOptions(),
) -> None:
    """Join sets of images into one manifest, each image once.

    Example:

        curate select seeds=seed-images web=images --keep web=verdicts --out manifest
    """
    from curation.errors import ConfigError
    from curation.pool import UnionPool
    from curation.stage import StageInputs
    from curation.stages.select import Select
    from pipelines.cli.inputs import images_pool, named_paths, refuse_repeats
    from pipelines.cli.single_stage import run_single
    from pipelines.cli.verdicts import kept_by

    named = named_paths(images, "IMAGES")
    refuse_repeats([name for name, _ in named], "IMAGES")
    verdicts: dict[str, list[str]] = {name: [] for name, _ in named}
    for name, path in named_paths(keep, "--keep"):
        if name not in verdicts:
            raise ConfigError(f"--keep {name}=…: no images of that name; {', '.join(verdicts)} are")
        verdicts[name].append(path)
    runner = engine.runner()
    pools = tuple(
        kept_by(images_pool(path, out, runner, name, name), verdicts[name], out, runner.engine)
        for name, path in named
    )
    union = UnionPool("union", {}, None, pools)
    run_single(Select(), StageInputs(union), out, "manifest", runner)


def pack(
    images: Images,
    out: Out,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep", help="Decisions: pack only images that all of them keep. May be repeated."
        ),
    ] = None,
    rows_per_tar: Annotated[int, typer.Option("--rows-per-tar", min=1)] = 10_000,
    set_name: SetName = None,
    engine: StageOptions = StageOptions(),
) -> None:
    """Write images into tars with an index, for training by byte range.

    Example:

        curate pack images --keep verdicts --keep safe --out packed
    """
    from curation.stage import StageInputs
    from curation.stages.pack import Pack
    from pipelines.cli.inputs import images_pool, refuse_clashes
    from pipelines.cli.single_stage import run_single
    from pipelines.cli.verdicts import kept_by

    runner = engine.runner()
    pool = images_pool(images, out, runner, set_name=set_name)
    pool = kept_by(pool, keep or [], out, runner.engine)
    refuse_clashes((pool,), "sha256", out, runner.engine)
    run_single(Pack(rows_per_tar=rows_per_tar), StageInputs(pool), out, "packed", runner)


def encoders(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]…", help="Encoders to load, such as sscd:FILE."),
    ] = None,
    json: Json = False,
) -> None:
    """List the encoders, which of them work here, and why others do not.

    Examples:

        curate encoders

        curate encoders sscd:sscd_disc_mixup.torchscript.pt dinov2:vitl14
    """
    from embedder.encoder import check_encoder, list_encoders
    from pipelines.operate import console

    statuses = [check_encoder(name) for name in names] if names else list_encoders()
    if json:
        console.print_json([vars(status) for status in statuses])
        return
    console.print_rows(
        ("encoder", "works here", "note", "license"),
        [(s.name, "yes" if s.works else "no", s.note, s.license) for s in statuses],
    )
