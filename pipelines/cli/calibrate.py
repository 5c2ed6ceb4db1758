"""The threshold lab: `curate calibrate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from curation import storage
from curation.errors import ConfigError, DatasetError
from pipelines.audit.work_folder import WorkFolder
from pipelines.cli.audit import server_module
from pipelines.operate import console

if TYPE_CHECKING:
    from pipelines.web.calibration.lab import Lab
    from pipelines.web.serving.catalog import Catalog


@dataclass(frozen=True)
class Asked:
    """What is calibrated, and where its parts lie."""

    kind: str
    work: str
    bins: int
    per_bin: int
    judgements: str | None
    catalog: str | None
    seed: int


def serve_questions(asked: Asked, host: str, port: int, allowed: Sequence[str] = ()) -> None:
    """Serve the questions and take the answers."""
    server = server_module("calibrate")
    from pipelines.web.calibration.app import add_lab

    names = server.names_of(host, allowed)
    folder, file = _run_and_catalog(asked)
    app = server.make_app(folder.path, file, names)
    add_lab(app, _lab(asked, folder, app.state.audit.catalog))
    with server.listening(host, port) as listener:
        shown, chosen = listener.getsockname()[:2]
        console.print_line(f"{folder.path}: http://{shown}:{chosen}/calibrate (Ctrl-C ends it)")
        server.serve(app, listener)


def print_figures(asked: Asked) -> None:
    """What follows from the answers so far."""
    from pipelines.web.serving.catalog import Catalog

    folder, file = _run_and_catalog(asked)
    with Catalog(file) as catalog:
        console.print_json(_lab(asked, folder, catalog).figures())


def print_truth(kind: str, work: str, images: int, seed: int, as_json: bool) -> None:
    """How many known edits are found."""
    from pipelines.web.calibration.truth import recall_by_edit

    if kind == "nsfw":
        raise ConfigError("curate calibrate nsfw: no edit makes a picture so; judge a sample")
    found = recall_by_edit(WorkFolder(work.rstrip("/")), kind == "leaks", images, seed)
    if as_json:
        console.print_json(found)
        return
    _print_truth(found)


def _print_truth(found: dict[str, Any]) -> None:
    own = found["threshold"]
    console.print_rows(
        ("edit", "found", "95 %", "least alike", "median"),
        [
            (
                one["edit"],
                f"{one['recall']:.1%}",
                f"{one['recall_low']:.1%} to {one['recall_high']:.1%}",
                f"{one['lowest']:.4f}",
                f"{one['median']:.4f}",
            )
            for one in found["edits"]
        ],
        title=f"known edits of {found['images']} images, found above {own:g} ({found['encoder']})",
    )
    console.print_rows(
        ("threshold", "edits found", "precision", "innocents above"),
        [
            (f"{p['threshold']:g}", *(f"{p[n]:.2%}" for n in ("recall", "precision", "innocents")))
            for p in found["curve"]
            if p["threshold"] == own or round(p["threshold"] * 20, 6).is_integer()
        ],
        title="what another threshold would find",
    )


def _run_and_catalog(asked: Asked) -> tuple[WorkFolder, str]:
    from pipelines.web.serving.catalog_file import catalog_of

    path = asked.work.rstrip("/")
    if not WorkFolder.is_one(path):
        raise DatasetError(f"{path}: no finished run lies there (no run.json)")
    return WorkFolder(path), catalog_of(path, asked.catalog)


def _lab(asked: Asked, folder: WorkFolder, catalog: "Catalog") -> "Lab":
    from pipelines.web.calibration.judgements import Judgements
    from pipelines.web.calibration.lab import Lab
    from pipelines.web.calibration.questions import Kind, draw

    default = storage.join(folder.path, "calibration", f"{asked.kind}.parquet")
    rng = np.random.default_rng(asked.seed)
    sample = draw(catalog, folder, Kind(asked.kind), asked.bins, asked.per_bin, rng)
    return Lab(folder, catalog, sample, Judgements.at(asked.judgements or default), asked.seed)
