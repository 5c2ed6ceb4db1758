"""Training and evaluation for commands and recipes: one writer a folder, a bar on the terminal."""

import contextlib
import os
from pathlib import Path

from pydantic import JsonValue

from curation.errors import ConfigError
from curation.lock import locked
from pipelines.operate.console import TrainingWatcher
from pretrain.config import TrainConfig


def train(
    settings: TrainConfig,
    data: str,
    out: str,
    *,
    quiet: bool = False,
    allow_changed: bool = False,
) -> dict[str, JsonValue]:
    """Train, showing how far it is; give the figures of the run.

    Raises:
        ConfigError: `out` is a file.
    """
    from pretrain.train import run

    if Path(out).is_file():
        raise ConfigError(f"--out {out}: is a file; name a folder")
    watcher = TrainingWatcher(settings.optim.steps, quiet=quiet)
    # Of the processes that torchrun starts, the first takes the lock.
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        with locked(out) if is_first else contextlib.nullcontext():
            result = run(settings, data, out, allow_changed=allow_changed, progress=watcher)
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


def evaluate_knn(backbone: str, train: str, test: str, k: tuple[int, ...]) -> dict[str, JsonValue]:
    """k-NN accuracy of a backbone on folders with a folder of images a class."""
    from pretrain.evaluation.knn import evaluate, labeled_folder

    labeled = labeled_folder(train)
    found = evaluate(backbone, labeled, labeled_folder(test), k=k)
    shown = ", ".join(f"k={n}: {found[f'knn_{n}']:.1%}" for n in k)
    classes = len({label for _, label in labeled})
    return {**found, "classes": classes, "text": f"{shown} ({classes} classes)"}
