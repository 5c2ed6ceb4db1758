"""The command line. Every verb imports what it needs when it runs, so that --help is quick."""

import os
import shlex
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.options import OneValueEach

if TYPE_CHECKING:
    from curation.stage import Engine

app = typer.Typer(
    name="curate",
    help="Turn a pool of web images into a self-supervised pretraining set, and train on it.\n\n"
    "Start with: curate run demo --work build/demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


class EngineName(StrEnum):
    """Where the work runs."""

    local = "local"
    ray = "ray"


class Linkage(StrEnum):
    """What stays of images that are alike."""

    components = "components"
    representative = "representative"


class OnCollision(StrEnum):
    """What a seed gets whose neighbour another seed has already."""

    keep = "keep"
    next = "next"


Out = Annotated[str, typer.Option("--out", help="Folder or URL of the output.")]
Work = Annotated[str, typer.Option("--work", help="Work folder of a run.")]
Kind = Annotated[EngineName, typer.Option("--engine", help="This machine, or a Ray cluster.")]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Tasks that run at once: 1 here, all of a cluster."),
]
MaxFailed = Annotated[
    int,
    typer.Option("--max-failed-shards", min=0, help="Shards of a stage that may keep failing."),
]
Address = Annotated[str | None, typer.Option("--address", help="Address of a Ray cluster.")]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        "--time-limit", min=1, help="Seconds after which a shard is taken to hang. [its stage's]"
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seeds every random choice.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key: KEY=VALUE. May be repeated.")
]
AllowChanged = Annotated[
    bool,
    typer.Option(
        "--allow-changed",
        help="Go on with other data or settings; log and card say so.",
    ),
]
Recall = Annotated[
    float | None,
    typer.Option(
        "--recall", min=0, max=1, help="Share of the pairs to be found in a large pool. [0.99]"
    ),
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", help="What tasks on one machine may hold at once. [4GB]"),
]
IdColumn = Annotated[str, typer.Option("--id-column", help="Column of ids in foreign Parquet.")]
SetName = Annotated[
    str | None,
    typer.Option(
        "--set-name",
        "--source-set",
        help="Set of a folder of files, part of their ids. [the folder's own name]",
    ),
]
VectorColumn = Annotated[
    str, typer.Option("--embedding-column", help="Column of vectors in foreign Parquet.")
]


AllowHost = Annotated[
    list[str] | None,
    typer.Option("--allow-host", help="Name that browsers use, where --host is not this machine."),
]


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of one that ships.")],
    work: Work,
    engine: Kind = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    time_limit: TimeLimit = None,
    max_failed_shards: MaxFailed = 0,
    max_disk: Annotated[
        str | None, typer.Option("--max-disk", help="Most that DIR may hold, such as 200GB.")
    ] = None,
    plan_file: Annotated[
        str | None, typer.Option("--plan", help="A plan to compare with: curate plan --out.")
    ] = None,
    changes: Changes = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Work folder of an earlier run: only what is new is taken."),
    ] = None,
    json: Json = False,
) -> None:
    """Run a whole recipe: from a list of URLs to a manifest, a report and a checkpoint.

    Finished work is kept: the same command goes on where a killed run stopped.

    Examples:

        curate run demo --work build/demo

        curate run my.yaml --work /data/run1 --engine ray --workers 32 --set paths.urls=/data/urls

        curate run my.yaml --work /data/run2 --base /data/run1 --set paths.urls=/data/more-urls
    """
    from pipelines.cli import run as verb

    runner = _engine(engine, workers, address, time_limit, max_failed_shards)
    limits = verb.RunLimits(max_disk, plan_file)
    verb.run_recipe(recipe, work, runner, changes or [], json, base, limits)


@app.command()
def preflight(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of one that ships.")],
    work: Work,
    engine: Kind = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    changes: Changes = None,
    base: Annotated[str | None, typer.Option("--base", help="As for `curate run`.")] = None,
    json: Json = False,
) -> None:
    """Open every stage of a recipe on every node and compare what they find; exit 1 refuses.

    Example:

        curate preflight my.yaml --work /data/run1 --engine ray --set paths.urls=/data/urls
    """
    from pipelines.cli import operation as verb

    runner = _engine(engine, workers, address, None)
    if not verb.print_preflight(recipe, work, runner, changes or [], base, json):
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of one that ships.")],
    images: Annotated[float, typer.Option("--images", min=1, help="Rows of the pool: 1.2e9.")],
    sample: Annotated[
        int, typer.Option("--sample", min=8, help="Rows of your own data to measure on.")
    ] = 1000,
    cores: Annotated[
        int | None, typer.Option("--cores", min=1, help="Cores of a node; none: one worker here.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="A YAML file of rates, or 20x8xV100,cpus=40.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Write it, for `curate run --plan` and the report.")
    ] = None,
    changes: Changes = None,
    json: Json = False,
) -> None:
    """Predict hours, memory and disk of a recipe, stage by stage, from a sample of your data.

    Runs the recipe up to the packed shards on a quarter of the sample and on all of it, so that
    what a stage costs once is told from what it costs a row.

    Examples:

        curate plan demo --images 1e6

        curate plan my.yaml --images 1.2e9 --sample 2000 --cores 40 --cluster 20x8xV100
    """
    from pipelines.cli import plan as verb
    from pipelines.operate.hardware import Cluster, read_cluster

    machines = Cluster(cpus=cores) if cores else None
    if cluster:
        machines = read_cluster(cluster, cores)
    stages = verb.make_plan(recipe, images, sample, machines, changes or [])
    verb.print_plan(stages, images, machines, out, json)


@app.command()
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
    engine: Kind = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    time_limit: TimeLimit = None,
) -> None:
    """Give every URL or image its id; drop repeated ones and those on lists.

    Examples:

        curate ingest --urls urls.parquet --out rows

        curate ingest --urls Train_GCC-training.tsv --columns alt,url --out cc3m

        curate ingest --archives crawl/ --out rows --set lists.blocked.ut1=blacklists/
    """
    from pipelines.cli import stages as verb

    settings = {
        "urls": urls,
        "archives": archives,
        "images": images,
        "image_column": image_column,
        "url_column": url_column,
        "columns": [] if columns is None else [name.strip() for name in columns.split(",")],
        "rows_per_shard": rows_per_shard,
    }
    runner = _engine(engine, workers, address, time_limit)
    verb.run_ingest(settings, set_name, changes or [], out, runner)


@app.command()
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
    engine: Kind = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    time_limit: TimeLimit = None,
    max_failed_shards: MaxFailed = 0,
) -> None:
    """Fetch images politely and safely; every URL ends as a row with one reason.

    Examples:

        curate download urls.parquet --out raw --user-agent "mybot (me@example.org)"

        curate download rows --out raw --engine ray --workers 16

        curate download rows --out raw2 --retry-failed raw
    """
    from pipelines.cli import stages as verb

    runner = _engine(engine, workers, address, time_limit, max_failed_shards)
    given = {"user_agent": user_agent, "allow_private": allow_private or None}
    settings = {name: value for name, value in given.items() if value is not None}
    verb.run_download(rows, out, retry_failed, settings, changes or [], runner)


@app.command()
def canonicalize(
    raw: Annotated[
        str, typer.Argument(help="Output of download or ingest --images, or a folder of images.")
    ],
    out: Out,
    changes: Changes = None,
    set_name: SetName = None,
    engine: Kind = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    time_limit: TimeLimit = None,
    max_failed_shards: MaxFailed = 0,
) -> None:
    """Decode once, turn upright, convert to sRGB, shrink, and hash.

    Example:

        curate canonicalize raw --out images --set max_side=512
    """
    from pipelines.cli import stages as verb

    runner = _engine(engine, workers, address, time_limit, max_failed_shards)
    verb.run_canonicalize(raw, out, changes or [], set_name, runner)


@app.command("filter")
def filter_images(
    images: Annotated[str, typer.Argument(help="Output of canonicalize, or a folder of images.")],
    out: Out,
    filters: Annotated[
        str, typer.Option("--filters", help="Filters in order, by the names of their stages.")
    ] = "quality,nsfw",
    changes: Changes = None,
    set_name: SetName = None,
    engine: Kind = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    time_limit: TimeLimit = None,
    max_failed_shards: MaxFailed = 0,
) -> None:
    """Drop useless and unsafe images: id, keep, reason, score, threshold, a column a score.

    Examples:

        curate filter images --out verdicts

        curate filter photos/ --out verdicts --filters quality,nsfw,faces --set nsfw.threshold=0.5
    """
    from pipelines.cli import stages as verb

    runner = _engine(engine, workers, address, time_limit, max_failed_shards)
    verb.run_filter(images, out, filters, changes or [], set_name, runner)


@app.command()
def embed(
    images: Annotated[str, typer.Argument(help="Output of canonicalize, or a folder of images.")],
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
    engine: Kind = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    time_limit: TimeLimit = None,
    max_failed_shards: MaxFailed = 0,
) -> None:
    """Embed images: id, source, embedding (unit rows of float16).

    Examples:

        curate embed images --encoder lite-copy --out emb

        curate embed photos/ --like emb --out photos-emb

        curate embed images --encoder sscd:FILE --out emb --engine ray --set gpus=1
    """
    from pipelines.cli import stages as verb

    settings = {"device": device, "allow_hub": allow_hub}
    runner = _engine(engine, workers, address, time_limit, max_failed_shards)
    verb.run_embed(images, out, encoder, like, settings, changes or [], set_name, runner)


@app.command()
def dedup(
    embeddings: Annotated[str, typer.Argument(help="Output of embed, or any Parquet of vectors.")],
    out: Out,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="NAME=EMB of an evaluation set; may be repeated."),
    ] = None,
    threshold: Annotated[float | None, typer.Option("--threshold", min=-1, max=1)] = None,
    against_threshold: Annotated[
        float | None, typer.Option("--against-threshold", min=-1, max=1)
    ] = None,
    changes: Changes = None,
    id_column: IdColumn = "id",
    embedding_column: VectorColumn = "embedding",
    assume_same_space: Annotated[
        bool, typer.Option("--assume-same-space", help="Compare foreign embeddings.")
    ] = False,
    linkage: Annotated[
        Linkage,
        typer.Option(
            "--linkage", help="What stays: one of each component, or all that no kept one is near."
        ),
    ] = Linkage.components,
    max_component_share: Annotated[
        float, typer.Option("--max-component-share", help="Largest share of one component.")
    ] = 0.01,
    recall: Recall = None,
    memory: Memory = None,
    pairs: Annotated[
        str | None,
        typer.Option("--pairs", help="New folder for the most similar other rows of each row."),
    ] = None,
    neighbors: Annotated[
        int, typer.Option("--neighbors", min=1, help="With --pairs: rows listed at most for a row.")
    ] = 64,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Output of an earlier dedup: what it kept stays, and wins."),
    ] = None,
    base_embeddings: Annotated[
        str | None,
        typer.Option("--base-embeddings", help="Its embeddings, where they have moved."),
    ] = None,
    engine: Kind = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    time_limit: TimeLimit = None,
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
    from pipelines.cli import neighbours as verb

    settings = {
        "threshold": threshold,
        "against_threshold": against_threshold,
        "assume_same_space": assume_same_space,
        "linkage": linkage.value,
        "max_component_share": max_component_share,
        "neighbors": neighbors if pairs else 0,
        **verb.comparison(recall, memory),
    }
    columns = (id_column, embedding_column)
    runner = _engine(engine, workers, address, time_limit)
    earlier = (base, base_embeddings)
    verb.run_dedup(
        embeddings, out, against or [], settings, changes or [], columns, runner, earlier, pairs
    )


@app.command()
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
    recall: Recall = None,
    memory: Memory = None,
    changes: Changes = None,
    id_column: IdColumn = "id",
    embedding_column: VectorColumn = "embedding",
    assume_same_space: Annotated[
        bool, typer.Option("--assume-same-space", help="Compare foreign embeddings.")
    ] = False,
    seed: Seed = 0,
    engine: Kind = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    time_limit: TimeLimit = None,
) -> None:
    """Retrieve images of the pool that resemble curated seed images: one row a hit.

    Example:

        curate retrieve emb --seeds in1k=in1k-emb:sample:32 --seeds pets=pets-emb:cluster:10000
        --out hits
    """
    from pipelines.cli import neighbours as verb

    settings = {
        "assume_same_space": assume_same_space,
        "on_collision": on_collision.value,
        **verb.comparison(recall, memory),
    }
    if clusters is not None:
        settings["centroids"] = f"{clusters.rstrip('/')}/_centroids"
    columns = (id_column, embedding_column)
    runner = _engine(engine, workers, address, time_limit)
    verb.run_retrieve(pool, out, seeds, settings, changes or [], columns, seed, runner)


@app.command()
def cluster(
    embeddings: Annotated[str, typer.Argument(help="Output of embed, or any Parquet of vectors.")],
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
    id_column: IdColumn = "id",
    embedding_column: VectorColumn = "embedding",
    seed: Seed = 0,
    engine: Kind = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    time_limit: TimeLimit = None,
) -> None:
    """Cluster embeddings by k-means out of core, with levels of clusters above.

    Example:

        curate cluster emb --levels 1000,100 --out clusters
    """
    from pipelines.cli import neighbours as verb

    columns = (id_column, embedding_column)
    runner = _engine(engine, workers, address, time_limit)
    settings = verb.memory_gb(memory)
    verb.run_cluster(embeddings, out, levels, settings, changes or [], columns, seed, runner)


@app.command()
def balance(
    clusters: Annotated[str, typer.Argument(help="Output of cluster.")],
    out: Out,
    target: Annotated[int, typer.Option("--target", min=1, help="Rows to draw.")],
    multiplier: Annotated[
        int, typer.Option("--multiplier", min=1, help="How often one row may be drawn.")
    ] = 1,
    seed: Seed = 0,
    engine: Kind = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    time_limit: TimeLimit = None,
) -> None:
    """Draw a sample to which every cluster of each level gives as equally as it can.

    Example:

        curate balance clusters --target 100000 --out sample
    """
    from pipelines.cli import neighbours as verb

    runner = _engine(engine, workers, address, time_limit)
    verb.run_balance(clusters, out, target, multiplier, seed, runner)


@app.command()
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
    engine: Kind = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    time_limit: TimeLimit = None,
) -> None:
    """Join sets of images into one manifest, each image once.

    Example:

        curate select seeds=seed-images web=images --keep web=verdicts --out manifest
    """
    from pipelines.cli import stages as verb

    verb.run_select(images, keep or [], out, _engine(engine, workers, address, time_limit))


@app.command()
def pack(
    images: Annotated[str, typer.Argument(help="Output of canonicalize, or a folder of images.")],
    out: Out,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep", help="Decisions: pack only images that all of them keep. May be repeated."
        ),
    ] = None,
    rows_per_tar: Annotated[int, typer.Option("--rows-per-tar", min=1)] = 10_000,
    set_name: SetName = None,
    engine: Kind = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    time_limit: TimeLimit = None,
) -> None:
    """Write images into tars with an index, for training by byte range.

    Example:

        curate pack images --keep verdicts --keep safe --out packed
    """
    from pipelines.cli import stages as verb

    runner = _engine(engine, workers, address, time_limit)
    verb.run_pack(images, keep or [], rows_per_tar, out, set_name, runner)


@app.command()
def stats(
    path: Annotated[str, typer.Argument(help="A work folder, a manifest or any data set.")],
    by: Annotated[
        str | None,
        typer.Option("--by", help="By host, source, seed_set, cluster, any column."),
    ] = None,
    csv: Annotated[str | None, typer.Option("--csv", help="Write the figures as CSV.")] = None,
    json: Json = False,
) -> None:
    """Count rows, reasons, sizes and scores of a run or a data set.

    Examples:

        curate stats build/demo --json

        curate stats build/demo/manifest --by host
    """
    from pipelines.cli import audit as verb

    verb.print_stats(path, json, by, csv)


@app.command()
def sql(
    work: Annotated[str, typer.Argument(help="Work folder of a run.")],
    query: Annotated[
        str | None, typer.Argument(help="One SELECT in DuckDB's SQL; none: list the views.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows shown.")] = 100,
    allow_files: Annotated[
        bool, typer.Option("--allow-files", help="Let it read files outside the work folder.")
    ] = False,
    json: Json = False,
) -> None:
    """Ask a run in SQL: decisions, rows, images, fetches, hits, manifest, packed, stages.

    Examples:

        curate sql build/demo

        curate sql build/demo "select reason, count(*) from decisions where not keep group by 1"
    """
    from pipelines.cli import audit as verb

    verb.print_answer(work, query, limit, json, allow_files=allow_files)


@app.command()
def explain(
    image: Annotated[str, typer.Argument(help="An id, a URL, or a file of your own.")],
    work: Work,
    json: Json = False,
) -> None:
    """Tell one image's whole life: every stage's verdict, its rule, score and threshold.

    Of a file on this machine: whether the set holds it or a near copy of it.

    Examples:

        curate explain http://127.0.0.1:18700/bomb.png --work build/demo

        curate explain my-photo.jpg --work build/demo
    """
    from pipelines.cli import audit as verb

    verb.print_explanation(image, work, json)


@app.command()
def report(
    work: Annotated[str, typer.Argument(help="Work folder of a run.")],
    out: Annotated[str | None, typer.Option("--out", help="The page to write.")] = None,
) -> None:
    """Write the HTML report of a run: one self-contained page.

    Example:

        curate report build/demo --out report.html
    """
    from pipelines.cli import audit as verb

    verb.write_report(work, out)


@app.command()
def serve(
    work: Annotated[str, typer.Argument(help="Work folder of a run, or any data set.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    allow_host: AllowHost = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8750,
    catalog: Annotated[
        str | None, typer.Option("--catalog", help="File of the sorted lists, made if absent.")
    ] = None,
) -> None:
    """Show the report live, for sets too large for one page; nothing is changed.

    The first start sorts the rows into WORK/_catalog.duckdb. Whoever reaches the port sees the
    images: listen beyond this machine only behind something that asks who they are.

    Example:

        curate serve build/demo
    """
    from pipelines.cli import audit as verb

    verb.serve(work, host, port, catalog, allow_host or [])


class Calibrated(StrEnum):
    """Which threshold is calibrated."""

    dedup = "dedup"
    leaks = "leaks"
    nsfw = "nsfw"


@app.command()
def calibrate(
    kind: Annotated[Calibrated, typer.Argument(help="Which threshold.")],
    work: Annotated[str, typer.Argument(help="Work folder of a run.")],
    bins: Annotated[int, typer.Option("--bins", min=2, max=100, help="Parts of the score.")] = 12,
    per_bin: Annotated[int, typer.Option("--per-bin", min=1, help="Questions in each.")] = 15,
    judgements: Annotated[
        str | None, typer.Option("--judgements", help="Parquet file of the answers.")
    ] = None,
    truth: Annotated[
        int | None, typer.Option("--truth", min=2, help="Edit so many images; measure recall.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    allow_host: AllowHost = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8751,
    catalog: Annotated[
        str | None, typer.Option("--catalog", help="File of the sorted lists, made if absent.")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Judge a sample of pairs or images by click, and see what each threshold would do.

    Serves the questions on this machine; the answers lie in WORK/calibration/KIND.parquet. With
    --json, prints what follows from the answers so far; with --truth, how many known edits of the
    run's own images are found, by kind of edit.

    Examples:

        curate calibrate dedup build/demo

        curate calibrate dedup build/demo --truth 200
    """
    from pipelines.cli import calibrate as verb

    if truth is not None:
        verb.print_truth(kind.value, work, truth, seed, json)
        return
    asked = verb.Asked(kind.value, work, bins, per_bin, judgements, catalog, seed)
    if json:
        verb.print_figures(asked)
    else:
        verb.serve_questions(asked, host, port, allow_host or [])


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="A work folder or any data set.")],
    shard: Annotated[
        str | None, typer.Option("--shard", help="Check this shard of a data set alone.")
    ] = None,
    json: Json = False,
) -> None:
    """Check every file's hash, the content digests, unique ids, and that rows add up.

    --shard checks one, and shows the path of hashes that leads from it to `files_digest`.

    Example:

        curate verify build/demo
    """
    from pipelines.cli import audit as verb

    sound = (
        verb.print_verification(path, json)
        if shard is None
        else verb.print_proof(path, shard, json)
    )
    if not sound:
        raise typer.Exit(1)


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help="Work folder of the earlier run.")],
    new: Annotated[str, typer.Argument(help="Work folder of the later run.")],
    json: Json = False,
) -> None:
    """Tell what changed between two builds, and why: settings, rows, images that left or came.

    Example:

        curate diff build/monday build/tuesday
    """
    from pipelines.cli import audit as verb

    verb.print_diff(old, new, json)


@app.command()
def certificate(
    work: Annotated[str, typer.Argument(help="Work folder of a run.")],
    out: Annotated[str | None, typer.Option("--out", help="Write it as Markdown.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", min=-1, max=1, help="Cosine of a leak; the run's by default."),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", help="Judge by another encoder than the run's own."),
    ] = None,
    scratch: Annotated[
        str | None, typer.Option("--scratch", help="Where tables lie. [WORK/work/certificate]")
    ] = None,
    engine: Kind = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    time_limit: TimeLimit = None,
    json: Json = False,
) -> None:
    """Certify how near the finished set comes to every benchmark image; exit 1 if any leaks.

    Example:

        curate certificate build/demo --out certificate.md

        curate certificate build/demo --encoder dinov2:vits14:FILE --threshold 0.8
    """
    from pipelines.cli import audit as verb

    how = {"threshold": threshold, "encoder": encoder, "scratch": scratch}
    runner = _engine(engine, workers, address, time_limit)
    if not verb.print_certificate(work, out, how, runner, json):
        raise typer.Exit(1)


@app.command()
def card(
    work: Annotated[str, typer.Argument(help="Work folder of a run.")],
    out: Out,
) -> None:
    """Write the data card of a set: README.md for people, croissant.json for machines.

    Example:

        curate card build/demo --out build/demo/card
    """
    from pipelines.cli import audit as verb

    verb.write_card(work, out)


@app.command()
def forget(
    work: Annotated[str, typer.Argument(help="Work folder of a run.")],
    ids: Annotated[str | None, typer.Option("--ids", help="File with an id a line.")] = None,
    urls: Annotated[str | None, typer.Option("--urls", help="File with a URL a line.")] = None,
    hashes: Annotated[
        str | None, typer.Option("--hashes", help="File with a SHA-256 or pixel hash a line.")
    ] = None,
    near: Annotated[bool, typer.Option("--near", help="Their copies, too.")] = False,
    json: Json = False,
) -> None:
    """Take images out of every table, packed shard and report of a finished run.

    Leaves tombstones in WORK/forgotten, which `blocklist` reads in later builds, and lists the
    checkpoints that may have seen the images.

    Example:

        curate forget build/demo --urls requests.txt --near
    """
    from pipelines.cli import audit as verb

    verb.forget_images(work, {"ids": ids, "urls": urls, "hashes": hashes}, near, json)


@app.command()
def status(
    work: Annotated[str, typer.Argument(help="Work folder of a run, finished or not.")],
    json: Json = False,
) -> None:
    """Tell what a run is doing, from another terminal or machine: stage, speed, time left.

    Example:

        curate status build/demo
    """
    from pipelines.cli import operation as verb

    verb.print_status(work, json)


@app.command()
def clean(
    work: Annotated[str, typer.Argument(help="Work folder of a finished run.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    json: Json = False,
) -> None:
    """Remove what a finished run no longer needs: stages of other settings, scratch.

    Example:

        curate clean build/demo --dry-run
    """
    from pipelines.cli import operation as verb

    verb.clean_work(work, dry_run, json)


@app.command()
def pretrain(
    data: Annotated[
        str, typer.Option("--data", help="A work folder, manifest, packed shards or images.")
    ],
    config: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of one that ships.")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder of the run.")] = None,
    config_file: Annotated[
        str | None, typer.Option("--config", help="The same, as an option.")
    ] = None,
    continued: Annotated[
        str | None,
        typer.Option("--continue", help="Run or checkpoint to go on from at another resolution."),
    ] = None,
    changes: Changes = None,
    allow_changed: AllowChanged = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Take two steps; show settings, schedules, time, memory."),
    ] = False,
) -> None:
    """Pretrain DINOv2 on a manifest; the same command resumes a stopped run.

    Examples:

        curate pretrain demo --data build/demo/manifest --out build/demo/pretrain

        curate pretrain vits14 --data build/demo/manifest --dry-run

        curate pretrain highres_518 --continue runs/vitl14 --data manifest --out runs/vitl14-518
    """
    from curation.errors import ConfigError
    from pipelines.cli import training as verb

    if config and config_file:
        raise ConfigError(f"curate pretrain {config}: and --config {config_file}; give one of them")
    if dry_run:
        verb.rehearse_pretrain(config or config_file, data, out, continued, changes or [])
        return
    if out is None:
        raise typer.BadParameter("is missing: name the folder of the run", param_hint="--out")
    verb.run_pretrain(
        config or config_file, data, out, continued, changes or [], allow_changed=allow_changed
    )


@app.command()
def distill(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of one that ships.")],
    data: Annotated[
        str, typer.Option("--data", help="A work folder, manifest, packed shards or images.")
    ],
    out: Out,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Folder of the teacher's pretraining run.")
    ] = None,
    changes: Changes = None,
    allow_changed: AllowChanged = False,
) -> None:
    """Distill a pretrained model into a smaller one; the same command resumes a stopped run.

    Example:

        curate distill tiny --teacher build/demo/pretrain --data build/demo/manifest --out small
    """
    from pipelines.cli import training as verb

    verb.run_distill(config, data, out, teacher, changes or [], allow_changed=allow_changed)


@app.command()
def evaluate(
    task: Annotated[
        str,
        typer.Argument(
            help="knn, linear, logreg, retrieval, segmentation, depth, artifacts; or table."
        ),
    ],
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", "--backbone", help="An encoder, or a file with a backbone."),
    ] = None,
    train: Annotated[
        str | None, typer.Option("--train", help="Data to learn from, or its embeddings.")
    ] = None,
    test: Annotated[
        str | None, typer.Option("--test", help="Data to test on, or its embeddings.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder of results: one Parquet row a run.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=1, help="Side in pixels; the model's own.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    allow_hub: Annotated[
        bool, typer.Option("--allow-hub", help="Fetch weights from a hub where needed.")
    ] = False,
    changes: Changes = None,
    json: Json = False,
) -> None:
    """Evaluate any encoder on frozen features, and set the result beside the paper's.

    Examples:

        curate evaluate knn --encoder runs/vits14/backbone.safetensors --train train --test val

        curate evaluate linear --encoder dinov2:vitl14:w.pth --train in1k/train --test in1k/val

        curate evaluate segmentation --encoder w.pth --train ade20k:ADE --test ade20k:ADE

        curate evaluate table --out results
    """
    from pipelines.cli import evaluation as verb

    paths = {"encoder": encoder, "train": train, "test": test, "out": out}
    options = {
        "image_size": image_size,
        "device": device,
        "allow_hub": allow_hub,
        "changes": changes or [],
    }
    verb.run_evaluation(task, paths, options, json)


@app.command()
def show(
    kind: Annotated[str, typer.Argument(help="pca, attention or knn.")],
    images: Annotated[list[str], typer.Argument(help="Images, folders of them, tars.")],
    out: Annotated[str, typer.Option("--out", help="A page (.html) or a picture (.png).")],
    encoder: Annotated[
        str, typer.Option("--encoder", "--backbone", help="An encoder, or a file with a backbone.")
    ],
    among: Annotated[
        str | None, typer.Option("--among", help="knn: images to search; these by default.")
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="knn: neighbours shown.")] = 6,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=1, help="Short side in pixels.")
    ] = None,
) -> None:
    """Show what a model sees: components of its patches, attention, nearest neighbours.

    Examples:

        curate show pca photos/ --encoder backbone.safetensors --image-size 448 --out page.html

        curate show knn query.jpg --among photos/ --encoder lite-semantic --out neighbours.png
    """
    from pipelines.cli import show as verb

    verb.run_show(kind, images, out, encoder, among, k, image_size)


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder of a run, one of its checkpoints, or a file of weights.")
    ],
    out: Out,
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="Checkpoint of the run; its last.")
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="safetensors, onnx, huggingface or timm.")
    ] = "safetensors",
    data: Annotated[
        str | None,
        typer.Option("--data", help="Work folder or manifest that it learned from, for the card."),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--licence", help="Licence of the weights; that of the file, else unknown."),
    ] = None,
) -> None:
    """Write a backbone for others: for transformers, timm, ONNX runtimes; with a model card.

    Examples:

        curate export build/demo/pretrain --format huggingface --out model --data build/demo

        curate export runs/vits14 --step 5000 --out model

        curate export dinov2_vits14_pretrain.pth --format onnx --out model
    """
    from pipelines.cli import export as verb

    verb.run_export(checkpoint, format, out, data, licence, step)


@app.command()
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
    from pipelines.cli import stages as verb

    verb.print_encoders(names or [], json)


for _registered in app.registered_commands:
    _registered.cls = OneValueEach


def _engine(
    kind: EngineName,
    workers: int | None,
    address: str | None,
    time_limit: float | None,
    max_failed_shards: int = 0,
) -> "Engine":
    engine: Engine
    if kind is EngineName.ray or address:
        from pipelines.engines.ray_engine import RayEngine

        engine = RayEngine(workers, address=address)
    else:
        from pipelines.engines.local_engine import LocalEngine

        engine = LocalEngine(workers or 1)
    engine.max_failed_shards, engine.time_limit_s = max_failed_shards, time_limit
    return engine


_INTERRUPTED = 130
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What the command line does not allow; typer keeps the tree of its errors to itself."""


def _usage(error: Any) -> str:
    """What is wrong with a command line, and where help is."""
    verb = error.ctx.command_path.partition(" ")[2] if error.ctx else ""
    place, words = (f"{verb}: ", f"curate {verb}") if verb else ("", "curate")
    return f"{place}{error.format_message().rstrip('.')}; see `{words} --help`"


def main() -> None:
    """Run a verb; every error of ours becomes one line and an exit code."""
    # Threads that spin while they wait starve each other where cores are shared: a training step
    # took six times as long. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from curation.errors import ConfigError, EngineError
    from embedder.errors import CurateError, EncoderError
    from pipelines.operate.console import let_all_be_written, print_error

    let_all_be_written()
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # that has shown the help by now
            print_error(_usage(error))
        sys.exit(2)
    except CurateError as error:
        retry = ""
        if isinstance(error, EngineError) and error.failures:
            command = shlex.join(["curate", *sys.argv[1:]])
            accepts = "  (--max-failed-shards N accepts some)" if error.can_be_accepted else ""
            retry = f"; retry them with: {command}{accepts}"
        print_error(f"{error}{retry}")
        sys.exit(2 if isinstance(error, ConfigError | EncoderError) else 1)
    if code == _INTERRUPTED:
        print_error("stopped; run the same command again to go on")
    sys.exit(code)
