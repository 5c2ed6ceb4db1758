"""Commands of auditors: counts, questions, lives of images, proofs, and what is to be forgotten."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from pipelines.cli.options import Json, Out, RunFolder, StageOptions, Work

P = ParamSpec("P")


def names_damage(command: Callable[P, None]) -> Callable[P, None]:
    """Where a command stumbles over a run that is not what was sealed, say that in one line."""

    @functools.wraps(command)
    def asked(*args: P.args, **options: P.kwargs) -> None:
        try:
            command(*args, **options)
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            from curation.errors import DatasetError
            from pipelines.audit.seal import broken_seals
            from pipelines.audit.work_folder import WorkFolder

            given = (one for one in (*args, *options.values()) if isinstance(one, str))
            for work in filter(WorkFolder.is_one, given):
                broken = broken_seals(work, WorkFolder(work).record)
                if broken:
                    raise DatasetError(
                        f"{work}: cannot be read: {broken[0]}; `curate verify` names all damage"
                    ) from error
            raise

    return asked


@names_damage
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
    from pipelines.audit.stats import count_by_column, stats_of, write_csv
    from pipelines.cli.tables import print_dataset, print_run, print_table
    from pipelines.operate import console

    if by is not None:
        rows = count_by_column(path, by)
        found = {"path": path, "by": by, "values": rows}
    else:
        found = stats_of(path)
    if csv is not None:
        console.print_line(write_csv(found, csv))
    elif json:
        console.print_json(found)
    elif by is not None:
        print_table(rows, f"{path} by {by}")
    elif found["kind"] == "run":
        print_run(found)
    else:
        print_dataset(found)


@names_damage
def sql(
    work: RunFolder,
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
    from pipelines.audit.sql import ask, views_of
    from pipelines.cli.tables import print_table
    from pipelines.operate import console

    if query is None:
        views = views_of(work)
        if json:
            console.print_json(views)
        else:
            shown = {name: ", ".join(columns) for name, columns in views.items()}
            console.print_pairs(shown, title="views")
        return
    answer = ask(work, query, limit, allow_files=allow_files)
    if json:
        console.print_json(answer.rows)
        return
    print_table(answer.rows, "")
    if answer.more:
        console.print_line(f"the first {limit} rows; --limit shows more")


@names_damage
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
    from pipelines.audit.explain import explain as explain_image
    from pipelines.cli.tables import print_life, print_seen
    from pipelines.operate import console

    if Path(image).is_file():
        from pipelines.audit.seen import find_image

        found = find_image(Path(image), work)
        if json:
            console.print_json(found)
        else:
            print_seen(found)
        return
    lives = explain_image(image, work)
    if json:
        console.print_json(lives)
        return
    for life in lives:
        print_life(life)


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
    from pipelines.cli.tables import print_proof, print_verification

    if shard is None:
        from pipelines.audit.verify import verify as verify_all

        checked = verify_all(path)
        print_verification(path, checked, as_json=json)
        is_sound = not any(one.defects for one in checked)
    else:
        from pipelines.audit.verify_dataset import prove_shard

        proof = prove_shard(path.rstrip("/"), shard)
        print_proof(path, proof, as_json=json)
        is_sound = not proof.defects
    if not is_sound:
        raise typer.Exit(1)


@names_damage
def diff(
    old: Annotated[str, typer.Argument(help="Work folder of the earlier run.")],
    new: Annotated[str, typer.Argument(help="Work folder of the later run.")],
    json: Json = False,
) -> None:
    """Tell what changed between two builds, and why: settings, rows, images that left or came.

    Example:

        curate diff build/monday build/tuesday
    """
    from pipelines.audit.diff import diff as compare
    from pipelines.cli.tables import print_diff
    from pipelines.operate import console

    found = compare(old, new)
    if json:
        console.print_json(found)
    else:
        print_diff(found)


def certificate(
    work: RunFolder,
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
    engine: StageOptions = StageOptions(),
    json: Json = False,
) -> None:
    """Certify how near the finished set comes to every benchmark image; exit 1 if any leaks.

    Example:

        curate certificate build/demo --out certificate.md

        curate certificate build/demo --encoder dinov2:vits14:FILE --threshold 0.8
    """
    from curation import storage
    from pipelines.audit.certificate import certify, markdown
    from pipelines.cli.tables import plain
    from pipelines.operate import console

    found = certify(work, engine.start(), threshold=threshold, encoder=encoder, scratch=scratch)
    if out is not None:
        storage.write_bytes(out, markdown(found).encode())
    if json:
        console.print_json(found)
    else:
        names = ("benchmark", "images", "above", "nearest", "median")
        rows = [[plain(one[name]) for name in names] for one in found["benchmarks"]]
        console.print_rows(names, rows)
        for one in found["benchmarks"]:
            console.print_line(one["statement"])
    if any(one["above"] for one in found["benchmarks"]):
        raise typer.Exit(1)


@names_damage
def card(
    work: RunFolder,
    out: Out,
) -> None:
    """Write the data card of a set: README.md for people, croissant.json for machines.

    Example:

        curate card build/demo --out build/demo/card
    """
    from pipelines.audit.card import write_card
    from pipelines.operate import console

    for path in write_card(work, out):
        console.print_line(path)


def forget(
    work: RunFolder,
    ids: Annotated[str | None, typer.Option("--ids", help="File with an id a line.")] = None,
    urls: Annotated[str | None, typer.Option("--urls", help="File with a URL a line.")] = None,
    hashes: Annotated[
        str | None, typer.Option("--hashes", help="File with a SHA-256 or pixel hash a line.")
    ] = None,
    near: Annotated[
        bool, typer.Option("--near", help="Also remove near duplicates of them.")
    ] = False,
    json: Json = False,
) -> None:
    """Take images out of every table, packed shard and report of a finished run.

    Leaves tombstones in WORK/forgotten, which `blocklist` reads in later builds, and lists the
    checkpoints that may have seen the images.

    Example:

        curate forget build/demo --urls requests.txt --near
    """
    from curation import storage
    from curation.errors import ConfigError
    from pipelines.audit.forget import Kind
    from pipelines.audit.forget import forget as forget_images
    from pipelines.cli.tables import print_table
    from pipelines.operate import console

    lists: dict[Kind, str | None] = {"ids": ids, "urls": urls, "hashes": hashes}
    given = [(kind, path) for kind, path in lists.items() if path is not None]
    if len(given) != 1:
        raise ConfigError("curate forget: give one of --ids, --urls and --hashes")
    kind, path = given[0]
    names = storage.read_bytes(path).decode("utf-8", "replace").splitlines()
    done = forget_images(work, kind, names, near=near)
    if json:
        console.print_json(vars(done))
        return
    print_table([{k: r[k] for k in ("flow", "id", "sha256")} for r in done.rows], "forgotten")
    for text in done.not_found:
        console.print_line(f"never seen: {text}")
    for checkpoint in done.checkpoints:
        console.print_line(f"may have seen them: {checkpoint}")
    if done.rows:
        console.print_line(f"content digest now {done.content_digest}")
        folder = done.tombstones[0].rpartition("/")[0]
        console.print_line(
            f"later runs here or with this --base keep them out, others by 'forgotten: [{folder}]'"
        )
