"""Checkpoints of a run: whole or absent, the latest few kept, readable by any number of processes.

Layout below the run's folder: `checkpoints/step-00000042/` holds the tensors as
`torch.distributed.checkpoint` writes them, and `about.json`. A folder is written under another
name and renamed when all of it is there.
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from embedder.errors import CheckpointError
from pretrain.distributed import barrier, rank

FORMAT_VERSION = 1
ABOUT = "about.json"

State = dict[str, Tensor]


def checkpoint_folder(out: Path, step: int) -> Path:
    """Name the folder of the checkpoint after `step` steps."""
    return out / "checkpoints" / f"step-{step:08d}"


def saved_steps(out: Path) -> list[int]:
    """List the steps that have a whole checkpoint, in order."""
    found = (
        re.fullmatch(r"step-(\d+)", path.name) for path in (out / "checkpoints").glob("step-*")
    )
    return sorted(int(match[1]) for match in found if match)


def training_state(method: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Name every tensor that a run must keep; they are the run's own, not copies."""
    state = {f"method.{name}": value for name, value in method.state_dict().items()}
    for name, parameter in method.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{name}.{key}"] = value
    return state


def save(out: Path, step: int, state: State, about: dict[str, Any]) -> Path:
    """Write the checkpoint of a step; `about` holds what is no tensor."""
    target = checkpoint_folder(out, step)
    partial = target.with_name(target.name + ".partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    with _single_process_is_fine():
        save_state(state, checkpoint_id=partial, no_dist=not dist.is_initialized())
    if rank() == 0:
        about = {"format_version": FORMAT_VERSION, "step": step, **about}
        (partial / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    barrier()
    return target


def read_about(out: Path, step: int) -> dict[str, Any]:
    """Read what is no tensor.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    folder = checkpoint_folder(out, step)
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    if about["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: has format {about['format_version']}, this program reads {FORMAT_VERSION}"
        )
    return about


def load_into(out: Path, step: int, state: State) -> None:
    """Fill the tensors of `state`, whatever processes they are divided among.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or the files are damaged.
    """
    folder = checkpoint_folder(out, step)
    try:
        with _single_process_is_fine():
            load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (OSError, RuntimeError, ValueError, EOFError, CheckpointException) as error:
        raise _damaged(folder, error) from error


def stepped_parameters(out: Path, step: int, method: nn.Module) -> set[nn.Parameter]:
    """Parameters of a method whose optimiser state a checkpoint holds.

    Raises:
        CheckpointError: the files are damaged.
    """
    saved = _metadata(out, step)
    named = method.named_parameters()
    return {parameter for name, parameter in named if f"optimizer.{name}.step" in saved}


def saved_shape(out: Path, step: int, name: str) -> tuple[int, ...]:
    """Read the shape of a saved tensor.

    Raises:
        CheckpointError: it is not there, or the files are damaged.
    """
    try:
        saved = _metadata(out, step)[name]
    except KeyError as error:
        raise _damaged(checkpoint_folder(out, step), error) from error
    return tuple(getattr(saved, "size", ()))


def _metadata(out: Path, step: int) -> dict[str, Any]:
    folder = checkpoint_folder(out, step)
    try:
        found: dict[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
    except (OSError, EOFError, UnpicklingError) as error:
        raise _damaged(folder, error) from error
    return found


def prune(out: Path, keep: int, keep_every: int | None) -> None:
    """Remove all but the latest `keep` checkpoints and those at multiples of `keep_every`."""
    for step in saved_steps(out)[:-keep]:
        if keep_every is None or step % keep_every:
            shutil.rmtree(checkpoint_folder(out, step))
    for leftover in (out / "checkpoints").glob("*.partial"):
        shutil.rmtree(leftover)


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """Torch warns of every checkpoint that one process writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        yield


def _damaged(folder: Path, error: BaseException) -> CheckpointError:
    detail = " ".join(str(error).split())[:300]
    return CheckpointError(
        f"{folder}: cannot be read ({detail}); remove it, and training goes on from the one before"
    )
