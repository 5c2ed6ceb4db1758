"""Commands that make pages: the report, the server, and the threshold lab."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.audit import names_damage
from pipelines.cli.options import Json, LabOptions, RunFolder, Seed, ServerOptions

if TYPE_CHECKING:
    from socket import socket
    from types import ModuleType


class Calibrated(StrEnum):
    """Which threshold is calibrated."""

    dedup = "dedup"
    leaks = "leaks"
    nsfw = "nsfw"


@names_damage
def report(
    work: RunFolder,
    out: Annotated[str | None, typer.Option("--out", help="The page to write.")] = None,
) -> None:
    """Write the HTML report of a run: one self-contained page.

    Example:

        curate report build/demo --out report.html
    """
    from curation import storage
    from curation.lock import locked
    from pipelines.audit.seal import REPORT, seal_again
    from pipelines.operate import console
    from pipelines.web.report.page import write_page

    page = storage.join(work, REPORT)
    if out not in (None, page):
        console.print_line(write_page(work, str(out)))
        return
    with locked(work):
        console.print_line(write_page(work, page))
        seal_again(work, REPORT)


@names_damage
def serve(
    work: Annotated[str, typer.Argument(help="Work folder of a run, or any data set.")],
    server: ServerOptions = ServerOptions(),
) -> None:
    """Show the report live, for sets too large for one page; nothing is changed.

    The first start sorts the rows into WORK/_catalog.duckdb. Whoever reaches the port sees the
    images: listen beyond this machine only behind something that asks who they are.

    Example:

        curate serve build/demo
    """
    from pipelines.web.serving.catalog_file import catalog_of

    app = _server_module("serve")
    work = work.rstrip("/")
    names = app.names_of(server.host, server.allow_host or [])
    file = catalog_of(work, server.catalog)
    with app.listening(server.host, server.port) as listener:
        _print_address(work, listener)
        app.serve(app.make_app(work, file, names), listener)


def calibrate(
    kind: Annotated[Calibrated, typer.Argument(help="Which threshold.")],
    work: RunFolder,
    bins: Annotated[int, typer.Option("--bins", min=2, max=100, help="Number of score bins.")] = 12,
    per_bin: Annotated[int, typer.Option("--per-bin", min=1, help="Questions in each.")] = 15,
    ratings: Annotated[
        str | None,
        typer.Option("--ratings", "--judgements", help="Parquet file of the answers."),
    ] = None,
    truth: Annotated[
        int | None, typer.Option("--truth", min=2, help="Edit so many images; measure recall.")
    ] = None,
    server: LabOptions = LabOptions(),
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
    import numpy as np

    from curation import storage
    from curation.errors import DatasetError
    from pipelines.audit.work_folder import WorkFolder
    from pipelines.operate import console
    from pipelines.web.calibration.lab import Lab
    from pipelines.web.calibration.questions import Kind, draw
    from pipelines.web.calibration.ratings import Ratings
    from pipelines.web.serving.catalog import Catalog
    from pipelines.web.serving.catalog_file import catalog_of

    work = work.rstrip("/")
    if truth is not None:
        _measure_known_edits(kind, work, truth, seed, as_json=json)
        return
    serving = None if json else _server_module("calibrate")
    if not WorkFolder.is_one(work):
        raise DatasetError(f"{work}: no finished run lies there (no run.json)")
    folder, file = WorkFolder(work), catalog_of(work, server.catalog)
    answers = ratings or storage.join(work, "calibration", f"{kind}.parquet")

    def lab_on(catalog: Catalog) -> Lab:
        sample = draw(catalog, folder, Kind(kind), bins, per_bin, np.random.default_rng(seed))
        return Lab(folder, catalog, sample, Ratings(answers), seed)

    if serving is None:
        with Catalog(file) as catalog:
            console.print_json(lab_on(catalog).figures())
        return
    from pipelines.web.calibration.app import add_lab

    app = serving.make_app(work, file, serving.names_of(server.host, server.allow_host or []))
    add_lab(app, lab_on(app.state.site.catalog))
    with serving.listening(server.host, server.port) as listener:
        _print_address(work, listener, "/calibrate")
        serving.serve(app, listener)


def _measure_known_edits(
    kind: Calibrated, work: str, images: int, seed: int, *, as_json: bool
) -> None:
    from curation.errors import ConfigError
    from pipelines.audit.work_folder import WorkFolder
    from pipelines.cli.tables import print_truth
    from pipelines.operate import console
    from pipelines.web.calibration.truth import recall_by_edit

    if kind is Calibrated.nsfw:
        raise ConfigError("curate calibrate nsfw: no edit makes a picture so; judge a sample")
    found = recall_by_edit(WorkFolder(work), kind is Calibrated.leaks, images, seed)
    if as_json:
        console.print_json(found)
    else:
        print_truth(found)


def _server_module(command: str) -> "ModuleType":
    """The module of the server.

    Raises:
        ConfigError: it needs packages that are not installed.
    """
    from curation.errors import ConfigError

    try:
        from pipelines.web.serving import app
    except ImportError as error:
        raise ConfigError(
            f"curate {command}: {error.name} is missing; pip install 'lvd-curate[serve]'"
        ) from error
    return app


def _print_address(work: str, listener: "socket", page: str = "") -> None:
    """Where to look, for a person and for who starts the server from a script."""
    from pipelines.operate import console

    host, port = listener.getsockname()[:2]
    console.print_line(f"{work}: http://{host}:{port}{page} (Ctrl-C ends it)")
