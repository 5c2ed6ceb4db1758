"""The command line. Every verb imports what it needs when it runs, so that --help is quick."""

import os
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

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


Out = Annotated[str, typer.Option("--out", help="Folder or URL of the output.")]
Work = Annotated[str, typer.Option("--work", help="Work folder of a run.")]
Kind = Annotated[EngineName, typer.Option("--engine", help="This machine, or a Ray cluster.")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Tasks that run at once.")]
Address = Annotated[str | None, typer.Option("--address", help="Address of a Ray cluster.")]
Seed = Annotated[int, typer.Option("--seed", help="Seeds every random choice.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key: KEY=VALUE. May be repeated.")
]
IdColumn = Annotated[str, typer.Option("--id-column", help="Column of ids in foreign Parquet.")]
VectorColumn = Annotated[
    str, typer.Option("--embedding-column", help="Column of vectors in foreign Parquet.")
]


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of one that ships.")],
    work: Work,
    engine: Kind = EngineName.local,
    workers: Workers = 1,
    address: Address = None,
    changes: Changes = None,
    json: Json = False,
) -> None:
    """Run a whole recipe: from a list of URLs to a manifest, a report and a checkpoint.

    Finished work is kept: the same command goes on where a killed run stopped.

    Examples:

        curate run demo --work build/demo

        curate run my.yaml --work /data/run1 --engine ray --workers 32 --set paths.urls=/data/urls
    """
    from pipelines.verbs import run as verb

    verb.run_recipe(recipe, work, _engine(engine, workers, address), changes or [], json)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of one that ships.")],
    images: Annotated[float, typer.Option("--images", min=1, help="Rows of the pool: 1.2e9.")],
    sample: Annotated[
        int, typer.Option("--sample", min=8, help="Rows of your own data to measure on.")
    ] = 1000,
    cores: Annotated[int, typer.Option("--cores", min=1, help="Cores of the cluster.")] = 1,
    changes: Changes = None,
    json: Json = False,
) -> None:
    """Predict hours and disk of a recipe, stage by stage, from a sample of your own data.

    Runs the recipe up to the packed shards on a quarter of the sample and on all of it, so that
    what a stage costs once is told from what it costs a row.

    Examples:

        curate plan demo --images 1e6

        curate plan my.yaml --images 1.2e9 --sample 2000 --cores 640
    """
    from pipelines.verbs import plan as verb

    verb.print_plan(recipe, images, sample, cores, changes or [], json)


@app.command()
def ingest(
    out: Out,
    urls: Annotated[str | None, typer.Option("--urls", help="Lists of URLs.")] = None,
    archives: Annotated[
        str | None, typer.Option("--archives", help="WARC or WAT files: images of their pages.")
    ] = None,
    images: Annotated[str | None, typer.Option("--images", help="Folder of images.")] = None,
    url_column: Annotated[str, typer.Option("--url-column", help="Column of the URL.")] = "url",
    set_name: Annotated[str, typer.Option("--set-name", help="Name of the set.")] = "web",
    rows_per_shard: Annotated[int, typer.Option("--rows-per-shard", min=1)] = 10_000,
    changes: Changes = None,
    engine: Kind = EngineName.local,
    workers: Workers = 1,
    address: Address = None,
) -> None:
    """Give every URL or image its id; drop repeated ones and those on lists.

    Examples:

        curate ingest --urls urls.parquet --out rows

        curate ingest --archives crawl/ --out rows --set lists.blocked.ut1=blacklists/
    """
    from pipelines.verbs import stages as verb

    settings = {
        "urls": urls,
        "archives": archives,
        "images": images,
        "url_column": url_column,
        "source_set": set_name,
        "rows_per_shard": rows_per_shard,
    }
    verb.run_ingest(settings, changes or [], out, _engine(engine, workers, address))


@app.command()
def download(
    rows: Annotated[str, typer.Argument(help="Output of ingest, or a list of URLs.")],
    out: Out,
    retry_failed: Annotated[
        str | None,
        typer.Option("--retry-failed", help="Fetch only what failed in this earlier output."),
    ] = None,
    changes: Changes = None,
    engine: Kind = EngineName.local,
    workers: Workers = 1,
    address: Address = None,
) -> None:
    """Fetch images politely and safely; every URL ends as a row with one reason.

    Examples:

        curate download urls.parquet --out raw --set user_agent="mybot (me@example.org)"

        curate download rows --out raw --engine ray --workers 16

        curate download rows --out raw2 --retry-failed raw
    """
    from pipelines.verbs import stages as verb

    runner = _engine(engine, workers, address)
    verb.run_download(rows, out, retry_failed, changes or [], runner)


@app.command()
def canonicalize(
    raw: Annotated[str, typer.Argument(help="Output of download, or a folder of images.")],
    out: Out,
    changes: Changes = None,
    engine: Kind = EngineName.local,
    workers: Workers = 1,
    address: Address = None,
) -> None:
    """Decode once, turn upright, convert to sRGB, shrink, and hash.

    Example:

        curate canonicalize raw --out images --set max_side=512
    """
    from pipelines.verbs import stages as verb

    verb.run_canonicalize(raw, out, changes or [], _engine(engine, workers, address))


@app.command("filter")
def filter_images(
    images: Annotated[str, typer.Argument(help="Output of canonicalize, or a folder of images.")],
    out: Out,
    filters: Annotated[
        str, typer.Option("--filters", help="Filters in order, by the names of their stages.")
    ] = "quality,nsfw",
    changes: Changes = None,
    engine: Kind = EngineName.local,
    workers: Workers = 1,
    address: Address = None,
) -> None:
    """Drop useless and unsafe images: id, keep, reason, score, threshold, a column a score.

    Examples:

        curate filter images --out verdicts

        curate filter photos/ --out verdicts --filters quality,nsfw,faces --set nsfw.threshold=0.5
    """
    from pipelines.verbs import stages as verb

    verb.run_filter(images, out, filters, changes or [], _engine(engine, workers, address))


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
    engine: Kind = EngineName.local,
    workers: Workers = 1,
    address: Address = None,
) -> None:
    """Embed images: id, source, embedding (unit rows of float16).

    Examples:

        curate embed images --encoder lite-copy --out emb

        curate embed photos/ --like emb --out photos-emb
    """
    from pipelines.verbs import stages as verb

    settings = {"device": device, "allow_hub": allow_hub}
    verb.run_embed(images, out, encoder, like, settings, _engine(engine, workers, address))


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
    max_component_share: Annotated[
        float, typer.Option("--max-component-share", help="Largest share of one component.")
    ] = 0.01,
    engine: Kind = EngineName.local,
    workers: Workers = 1,
    address: Address = None,
) -> None:
    """Find near duplicates, and leaks of evaluation sets: one verdict an image.

    Writes id, keep, reason (near_duplicate, leak:NAME or bad_vector), component, component_size,
    twin, twin_set and similarity. The thresholds default to the encoder's own.

    Examples:

        curate dedup emb --out verdicts

        curate dedup emb --against imagenet-val=val-emb --threshold 0.6 --out verdicts
    """
    from pipelines.verbs import neighbours as verb

    settings = {
        "threshold": threshold,
        "against_threshold": against_threshold,
        "assume_same_space": assume_same_space,
        "max_component_share": max_component_share,
    }
    columns = (id_column, embedding_column)
    runner = _engine(engine, workers, address)
    verb.run_dedup(embeddings, out, against or [], settings, changes or [], columns, runner)


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
    changes: Changes = None,
    id_column: IdColumn = "id",
    embedding_column: VectorColumn = "embedding",
    assume_same_space: Annotated[
        bool, typer.Option("--assume-same-space", help="Compare foreign embeddings.")
    ] = False,
    seed: Seed = 0,
    engine: Kind = EngineName.local,
    workers: Workers = 1,
    address: Address = None,
) -> None:
    """Retrieve images of the pool that resemble curated seed images: one row a hit.

    Example:

        curate retrieve emb --seeds in1k=in1k-emb:sample:32 --seeds pets=pets-emb:cluster:10000
        --out hits
    """
    from pipelines.verbs import neighbours as verb

    settings: dict[str, object] = {"assume_same_space": assume_same_space}
    if clusters is not None:
        settings["centroids"] = f"{clusters.rstrip('/')}/_centroids"
    columns = (id_column, embedding_column)
    runner = _engine(engine, workers, address)
    verb.run_retrieve(pool, out, seeds, settings, changes or [], columns, seed, runner)


@app.command()
def cluster(
    embeddings: Annotated[str, typer.Argument(help="Output of embed, or any Parquet of vectors.")],
    out: Out,
    levels: Annotated[
        str, typer.Option("--levels", help="Clusters of each level, the lowest first: 5000,500.")
    ],
    changes: Changes = None,
    id_column: IdColumn = "id",
    embedding_column: VectorColumn = "embedding",
    seed: Seed = 0,
    engine: Kind = EngineName.local,
    workers: Workers = 1,
    address: Address = None,
) -> None:
    """Cluster embeddings by k-means out of core, with levels of clusters above.

    Example:

        curate cluster emb --levels 1000,100 --out clusters
    """
    from pipelines.verbs import neighbours as verb

    columns = (id_column, embedding_column)
    runner = _engine(engine, workers, address)
    verb.run_cluster(embeddings, out, levels, changes or [], columns, seed, runner)


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
    workers: Workers = 1,
    address: Address = None,
) -> None:
    """Draw a sample to which every cluster of each level gives as equally as it can.

    Example:

        curate balance clusters --target 100000 --out sample
    """
    from pipelines.verbs import neighbours as verb

    runner = _engine(engine, workers, address)
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
        typer.Option("--keep", help="NAME=DECISIONS: take only images with keep = true."),
    ] = None,
    engine: Kind = EngineName.local,
    workers: Workers = 1,
    address: Address = None,
) -> None:
    """Join sets of images into one manifest, each image once.

    Example:

        curate select seeds=seed-images web=images --keep web=verdicts --out manifest
    """
    from pipelines.verbs import stages as verb

    verb.run_select(images, keep or [], out, _engine(engine, workers, address))


@app.command()
def pack(
    images: Annotated[str, typer.Argument(help="Output of canonicalize, or a folder of images.")],
    out: Out,
    keep: Annotated[
        str | None, typer.Option("--keep", help="Decisions: pack only images with keep = true.")
    ] = None,
    rows_per_tar: Annotated[int, typer.Option("--rows-per-tar", min=1)] = 10_000,
    engine: Kind = EngineName.local,
    workers: Workers = 1,
    address: Address = None,
) -> None:
    """Write images into tars with an index, for training by byte range.

    Example:

        curate pack images --keep verdicts --out packed
    """
    from pipelines.verbs import stages as verb

    verb.run_pack(images, keep, rows_per_tar, out, _engine(engine, workers, address))


@app.command()
def stats(
    path: Annotated[str, typer.Argument(help="A work folder, a manifest or any data set.")],
    by: Annotated[
        str | None, typer.Option("--by", help="Count by host, source_set, seed_set, any column.")
    ] = None,
    csv: Annotated[str | None, typer.Option("--csv", help="Write the figures as CSV.")] = None,
    json: Json = False,
) -> None:
    """Count rows, reasons, sizes and scores of a run or a data set.

    Examples:

        curate stats build/demo --json

        curate stats build/demo/manifest --by host
    """
    from pipelines.verbs import audit as verb

    verb.print_stats(path, json, by, csv)


@app.command()
def sql(
    work: Annotated[str, typer.Argument(help="Work folder of a run.")],
    query: Annotated[
        str | None, typer.Argument(help="One SELECT in DuckDB's SQL; none: list the views.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows shown.")] = 100,
    json: Json = False,
) -> None:
    """Ask a run in SQL: decisions, rows, images, fetches, hits, manifest, packed, stages.

    Examples:

        curate sql build/demo

        curate sql build/demo "select reason, count(*) from decisions where not keep group by 1"
    """
    from pipelines.verbs import audit as verb

    verb.print_answer(work, query, limit, json)


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
    from pipelines.verbs import audit as verb

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
    from pipelines.verbs import audit as verb

    verb.write_report(work, out)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="A work folder or any data set.")],
    json: Json = False,
) -> None:
    """Check every file's hash, the content digests, unique ids, and that rows add up.

    Example:

        curate verify build/demo
    """
    from pipelines.verbs import audit as verb

    if not verb.print_verification(path, json):
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
    from pipelines.verbs import audit as verb

    verb.print_diff(old, new, json)


@app.command()
def certificate(
    work: Annotated[str, typer.Argument(help="Work folder of a run.")],
    out: Annotated[str | None, typer.Option("--out", help="Write it as Markdown.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", min=-1, max=1, help="Cosine of a leak; the run's by default."),
    ] = None,
    engine: Kind = EngineName.local,
    workers: Workers = 1,
    address: Address = None,
    json: Json = False,
) -> None:
    """Certify how near the finished set comes to every benchmark image; exit 1 if any leaks.

    Example:

        curate certificate build/demo --out certificate.md
    """
    from pipelines.verbs import audit as verb

    if not verb.print_certificate(work, out, threshold, _engine(engine, workers, address), json):
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
    from pipelines.verbs import audit as verb

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
    from pipelines.verbs import audit as verb

    verb.forget_images(work, {"ids": ids, "urls": urls, "hashes": hashes}, near, json)


@app.command()
def pretrain(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of one that ships.")],
    data: Annotated[
        str, typer.Option("--data", help="A manifest, packed shards or a folder of images.")
    ],
    out: Out,
    changes: Changes = None,
) -> None:
    """Pretrain DINOv2 on a manifest; the same command resumes a stopped run.

    Example:

        curate pretrain demo --data build/demo/manifest --out build/demo/pretrain
    """
    from pipelines.verbs import training as verb

    verb.run_pretrain(config, data, out, changes or [])


@app.command()
def distill(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of one that ships.")],
    data: Annotated[
        str, typer.Option("--data", help="A manifest, packed shards or a folder of images.")
    ],
    out: Out,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Folder of the teacher's pretraining run.")
    ] = None,
    changes: Changes = None,
) -> None:
    """Distill a pretrained model into a smaller one; the same command resumes a stopped run.

    Example:

        curate distill tiny --teacher build/demo/pretrain --data build/demo/manifest --out small
    """
    from pipelines.verbs import training as verb

    verb.run_distill(config, data, out, teacher, changes or [])


@app.command()
def evaluate(
    task: Annotated[str, typer.Argument(help="The task: knn.")],
    backbone: Annotated[str, typer.Option("--backbone", help="Backbone that pretrain made.")],
    train: Annotated[str, typer.Option("--train", help="Folder with a folder a class.")],
    test: Annotated[str, typer.Option("--test", help="The same, to classify.")],
    json: Json = False,
) -> None:
    """Evaluate frozen features.

    Example:

        curate evaluate knn --backbone pretrain/backbone.safetensors --train train --test val
    """
    from pipelines.verbs import training as verb

    verb.print_evaluation(task, backbone, train, test, json)


@app.command()
def encoders(json: Json = False) -> None:
    """List the encoders, and which of them work here.

    Example:

        curate encoders
    """
    from pipelines.verbs import stages as verb

    verb.print_encoders(json)


def _engine(kind: EngineName, workers: int, address: str | None) -> "Engine":
    if kind is EngineName.ray or address:
        from pipelines.ray_engine import RayEngine

        return RayEngine(None if address else workers, address=address)
    from pipelines.local_engine import LocalEngine

    return LocalEngine(workers)


def main() -> None:
    """Run a verb; every error of ours becomes one line and an exit code."""
    # Threads that spin while they wait starve each other where cores are shared: a training step
    # took six times as long. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from embedder.errors import CurateError, EncoderError

    try:
        app()
    except CurateError as error:
        from curation.errors import ConfigError
        from pipelines.console import print_error

        print_error(str(error))
        sys.exit(2 if isinstance(error, ConfigError | EncoderError) else 1)
    except KeyboardInterrupt:
        sys.stderr.write("curate: stopped; run the same command again to go on\n")
        sys.exit(130)
