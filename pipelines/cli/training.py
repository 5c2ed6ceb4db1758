"""`curate pretrain`, `distill` and `evaluate`, and the same as steps of a recipe."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation.errors import ConfigError
from curation.lock import locked
from pipelines.operate import console

if TYPE_CHECKING:
    from pretrain.config import PretrainConfig


def run_pretrain(
    config: str | None,
    data: str,
    out: str,
    continued: str | None,
    changes: list[str],
    *,
    allow_changed: bool = False,
) -> None:
    """`curate pretrain`.

    Raises:
        ConfigError: no config is named.
    """
    console.set_up_logging(True)
    settings = _pretrain_settings(config, changes, continued, out)
    result = _train(settings, data, out, allow_changed=allow_changed)
    console.print_pairs(result, title="pretrain")


def rehearse_pretrain(
    config: str | None, data: str, out: str | None, continued: str | None, changes: list[str]
) -> None:
    """`curate pretrain --dry-run`.

    Raises:
        ConfigError: no config is named.
    """
    console.set_up_logging(True)
    from pretrain.rehearsal import rehearse

    settings = _pretrain_settings(config, changes, continued, out)
    found = rehearse(settings, data)
    for line in settings.as_yaml().splitlines():
        console.print_line(line)
    names = list(found.schedules[0])
    rows = [[f"{row[name]:.4g}" for name in names] for row in found.schedules]
    console.print_rows(names, rows, title="schedules")
    hours = found.seconds_per_step * settings.optim.steps / 3600
    console.print_pairs(
        {
            "data": found.data["path"],
            "images": found.data["images"],
            "images a step": found.batch,
            "epochs": f"{found.batch * settings.optim.steps / found.data['images']:,.2f}",
            "seconds a step": f"{found.seconds_per_step:,.3f}",
            "hours in all": f"{hours:,.2f}",
            "peak memory, GB": f"{found.peak_bytes / 1e9:,.2f}",
        },
        title="dry run: nothing is written",
    )


def _pretrain_settings(
    config: str | None, changes: list[str], continued: str | None, out: str | None
) -> "PretrainConfig":
    if config is None:
        raise ConfigError("curate pretrain: name a config, a YAML file or one that ships")
    from pretrain.config import load_config
    from pretrain.continuing import load_continued_config

    if continued is None:
        return load_config(config, changes)
    return load_continued_config(config, changes, continued, out)


def pretrain_on(
    config: str, packed: str, out: str, changes: list[str], *, quiet: bool = False
) -> dict[str, Any]:
    """Pretrain, showing its progress; give the figures of the run."""
    from pretrain.config import load_config

    return _train(load_config(config, changes), packed, out, quiet=quiet)


def run_distill(
    config: str,
    data: str,
    out: str,
    teacher: str | None,
    changes: list[str],
    *,
    allow_changed: bool = False,
) -> None:
    """`curate distill`."""
    console.set_up_logging(True)
    from pretrain.config import load_distill_config

    settings = load_distill_config(config, changes)
    if teacher is not None:
        settings = settings.replace(teacher_run=str(Path(teacher).resolve()))
    result = _train(settings, data, out, allow_changed=allow_changed)
    console.print_pairs(result, title="distill")


def _train(
    settings: "PretrainConfig",
    packed: str,
    out: str,
    *,
    quiet: bool = False,
    allow_changed: bool = False,
) -> dict[str, Any]:
    from pretrain.train import run

    if Path(out).is_file():
        raise ConfigError(f"--out {out}: is a file; name a folder")
    watcher = console.TrainingWatcher(settings.optim.steps, quiet=quiet)
    try:
        with _only_writer(out):
            result = run(settings, packed, out, allow_changed=allow_changed, progress=watcher)
    finally:
        watcher.close()
    return {
        "steps": result.steps,
        "finished": result.finished,
        "first loss": result.first.get("loss"),
        "last loss": result.last.get("loss"),
        "unreadable images": result.bad_images,
        "backbone": str(result.backbone if result.finished else f"curate export {out}"),
        "log": str(result.log),
    }


def _only_writer(out: str) -> contextlib.AbstractContextManager[None]:
    """The lock of an output folder; of the processes that torchrun starts, the first takes it."""
    return locked(out) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext()


def evaluate_knn(backbone: str, train: str, test: str, k: tuple[int, ...]) -> dict[str, Any]:
    """k-NN accuracy of a backbone on folders with a folder of images a class."""
    from pretrain.evaluation.knn import evaluate, labeled_folder

    labelled = labeled_folder(train)
    found = evaluate(backbone, labelled, labeled_folder(test), k=k)
    shown = ", ".join(f"k={n}: {found[f'knn_{n}']:.1%}" for n in k)
    classes = len({label for _, label in labelled})
    return {**found, "classes": classes, "text": f"{shown} ({classes} classes)"}
