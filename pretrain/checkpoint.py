"""Checkpoints of a run: whole or absent, the latest few kept.

Layout below the run's folder: `checkpoints/step-00000042/state.pt`. A folder is written under
another name and renamed when all of it is there.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from embedder.errors import CheckpointError

FORMAT_VERSION = 1


def checkpoint_folder(out: Path, step: int) -> Path:
    """Name the folder of the checkpoint after `step` steps."""
    return out / "checkpoints" / f"step-{step:08d}"


def saved_steps(out: Path) -> list[int]:
    """List the steps that have a whole checkpoint, in order."""
    found = (
        re.fullmatch(r"step-(\d+)", path.name) for path in (out / "checkpoints").glob("step-*")
    )
    return sorted(int(match[1]) for match in found if match)


def save(out: Path, step: int, state: dict[str, Any], about: dict[str, Any]) -> Path:
    """Write the checkpoint of a step; `about` holds what people and checks want to know of it."""
    target = checkpoint_folder(out, step)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.save(state, partial / "state.pt")
    about = {"format_version": FORMAT_VERSION, "step": step, **about}
    (partial / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target


def load(out: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint: (state, about).

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    folder = checkpoint_folder(out, step)
    try:
        about = json.loads((folder / "about.json").read_text())
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{folder}: damaged ({error}); remove it, and training goes on from the one before"
        ) from error
    if about["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: has format {about['format_version']}, this program reads {FORMAT_VERSION}"
        )
    return state, about


def prune(out: Path, keep: int, keep_every: int | None) -> None:
    """Remove all but the latest `keep` checkpoints and those at multiples of `keep_every`."""
    for step in saved_steps(out)[:-keep]:
        if keep_every is None or step % keep_every:
            shutil.rmtree(checkpoint_folder(out, step))
    for leftover in (out / "checkpoints").glob("*.partial"):
        shutil.rmtree(leftover)
