"""Checkpoints of a run: whole or absent, the latest few kept, readable by any number of processes.

Layout below the run's folder: `checkpoints/step-00000042/` holds the tensors as
`torch.distributed.checkpoint` writes them, `about.json`, and the digests of both, which are checked
before anything is used. A folder is written under another name and renamed when all of it is there.
"""

import json
import re
import shutil
import warnings
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.tensor import DTensor

from embedder.errors import CheckpointError
from pretrain.checkpoint_reader import METADATA, TensorReader, read_metadata
from pretrain.digests import DIGESTS, FileDigest, digest_of, find_damage, write_digests
from pretrain.distributed import any_rank, barrier, rank, sum_over_ranks
from pretrain.errors import TrainingError

FORMAT_VERSION = 2
"""Version 1 had no digests, and is still read."""
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
    """Write the checkpoint of a step; `about` holds what is no tensor.

    Raises:
        TrainingError: a tensor holds what is no finite number.
        CheckpointError: there is no room, or the files cannot be written.
    """
    _refuse_not_finite(out, step, state)
    target = checkpoint_folder(out, step)
    partial = target.with_name(target.name + ".partial")
    with _whole_or_removed(partial, _num_bytes(state)):
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier()
        with _single_process_is_fine():
            save_state(state, checkpoint_id=partial, no_dist=not dist.is_initialized())
        digests = _own_digests(partial)
        if rank() == 0:
            about = {"format_version": FORMAT_VERSION, "step": step, **about}
            (partial / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
            write_digests(partial, digests)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
    barrier()
    return target


def _refuse_not_finite(out: Path, step: int, state: State) -> None:
    bad = [name for name, value in state.items() if not _is_finite(_local(value))]
    if any_rank(bool(bad)):
        steps = saved_steps(out)
        found = f"{len(bad)} tensors hold what is no finite number, such as {bad[0]}" if bad else ""
        raise TrainingError(
            f"step {step}: {found or 'another process holds numbers that are not finite'}; nothing "
            f"is saved; the last checkpoint is that of step {steps[-1] if steps else 0}; lower "
            "optim.base_lr, or use run.precision float32, with --allow-changed"
        )


def _is_finite(x: Tensor) -> bool:
    """Whether all are numbers; a sum is one pass, and is finite only if its parts are."""
    if not x.is_floating_point() or x.sum(dtype=torch.float64).isfinite():
        return True
    return bool(x.isfinite().all())


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _num_bytes(state: State) -> int:
    """Bytes that all processes write together; what is not divided is written once."""
    own = (
        _local(value).nbytes
        for value in state.values()
        if rank() == 0 or isinstance(value, DTensor)
    )
    return int(sum_over_ranks(torch.tensor(float(sum(own)), dtype=torch.float64)))


@contextmanager
def _whole_or_removed(partial: Path, num_bytes: int) -> Iterator[None]:
    """Leave nothing half written, and say in a line why it is so."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(partial.parent).free
    if any_rank(rank() == 0 and free < num_bytes):
        raise _no_room(partial, num_bytes, free)
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise _no_room(partial, num_bytes, shutil.disk_usage(partial.parent).free) from error


def _no_room(partial: Path, num_bytes: int, free: int) -> CheckpointError:
    is_full = free < num_bytes
    what = "make room" if is_full else "look for a quota, or a limit to the size of files"
    return CheckpointError(
        f"{partial.with_suffix('')}: cannot be written: it takes {_size(num_bytes)}, and "
        f"{_size(free)} are free; {what}; the same command then goes on from the last checkpoint"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes > 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _own_digests(partial: Path) -> dict[str, FileDigest]:
    """Digests of all tensor files, each by the process that wrote it."""
    own = {path.name: digest_of(path) for path in partial.glob(f"__{rank()}_*")}
    if not dist.is_initialized():
        return own
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return dict(ChainMap(*every))


def read_about(out: Path, step: int) -> dict[str, Any]:
    """Read what is no tensor.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    folder = checkpoint_folder(out, step)
    _refuse_damaged(folder, find_damage(folder, [ABOUT]))
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
        version, _ = about["format_version"], about["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(folder, f"{ABOUT}: {error}") from error
    if version not in (1, FORMAT_VERSION):
        raise CheckpointError(
            f"{folder}: has format {version}, this program reads {FORMAT_VERSION}"
        )
    if version > 1 and not (folder / DIGESTS).is_file():
        raise _damaged(folder, f"{DIGESTS} is missing")
    return about


def load_into(out: Path, step: int, state: State) -> None:
    """Fill the tensors of `state`, whatever processes they are divided among.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or the files are damaged.
    """
    folder = checkpoint_folder(out, step)
    damage = find_damage(folder) if rank() == 0 else []
    if any_rank(bool(damage)):
        _refuse_damaged(folder, damage or ["found damaged by the first process"])
    try:
        with _single_process_is_fine():
            load(state, storage_reader=TensorReader(folder), no_dist=not dist.is_initialized())
    except (OSError, RuntimeError, ValueError, EOFError, CheckpointException) as error:
        raise _damaged(folder, error) from error


def stepped_parameters(out: Path, step: int, method: nn.Module) -> set[nn.Parameter]:
    """Parameters of a method whose optimizer state a checkpoint holds.

    Raises:
        CheckpointError: the files are damaged.
    """
    saved = _metadata(out, step)
    named = method.named_parameters()
    return {parameter for name, parameter in named if f"optimizer.{name}.step" in saved}


def saved_shapes(out: Path, step: int, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the saved tensors below a prefix, by the rest of their names.

    Raises:
        CheckpointError: the files are damaged.
    """
    saved = _metadata(out, step)
    return {
        name.removeprefix(f"{prefix}."): tuple(tensor.size)
        for name, tensor in saved.items()
        if name.startswith(f"{prefix}.")
    }


def _metadata(out: Path, step: int) -> dict[str, Any]:
    folder = checkpoint_folder(out, step)
    _refuse_damaged(folder, find_damage(folder, [METADATA]))
    try:
        return dict(read_metadata(folder).state_dict_metadata)
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


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


def _refuse_damaged(folder: Path, damage: list[str]) -> None:
    if damage:
        more = f" and {len(damage) - 1} more" if len(damage) > 1 else ""
        raise _damaged(folder, damage[0] + more)


def _damaged(folder: Path, error: BaseException | str) -> CheckpointError:
    detail = " ".join(str(error).split())[:300]
    out = folder.parent.parent
    others = (checkpoint_folder(out, step) for step in reversed(saved_steps(out)))
    whole = next((one.name for one in others if one != folder and _is_whole(one)), None)
    before = f"from {whole}" if whole else "from the start: no other is whole"
    return CheckpointError(
        f"{folder}: cannot be read ({detail}); remove it, and training goes on {before}"
    )


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint has its digests, and is as they say."""
    return (folder / DIGESTS).is_file() and not find_damage(folder)
