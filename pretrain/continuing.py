"""Go on from another run's checkpoint at another resolution: the high-resolution stage.

Student, teacher, heads and centers are taken over, positions interpolated to the new grid; the
optimizer starts afresh, and all schedules run over the new length.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curation.config import apply_changes, find_config, laid_over, parse_settings, read_mapping
from curation.errors import ConfigError
from embedder.errors import CheckpointError, foreign_weights
from embedder.vit import ViTConfig
from pretrain import checkpoint
from pretrain.config import PretrainConfig, fitted
from pretrain.methods.dinov2 import DINOv2, Network

POSITIONS = "backbone.pos_embed"


def load_continued_config(
    path_or_name: str, overrides: list[str] | tuple[str, ...], run: str, out: str | None = None
) -> PretrainConfig:
    """Lay a config over the settings of the run that it continues; it may name any part of them.

    out: the folder of this run; once it has a checkpoint, it needs the other run no more.

    Raises:
        ConfigError: no such run or config, or a setting that cannot be.
    """
    begun = out is not None and bool(checkpoint.saved_steps(Path(out)))
    saved = saved_settings(*find_checkpoint(str(out) if begun else run))
    if "teacher_run" in saved or "method" in saved:
        kind = saved.get("method", "distillation")
        raise ConfigError(f"{run}: is a run of {kind}; only those of DINOv2 can be continued")
    above = read_mapping(find_config("pretrain", path_or_name))
    values = laid_over({**saved, "init": None}, above)
    apply_changes(values, overrides)
    values["continue_run"] = str(Path(run).resolve())
    config = parse_settings(PretrainConfig, values, where=path_or_name)
    return fitted(config, [saved, above], overrides)


def saved_settings(out: Path, step: int) -> dict[str, Any]:
    """Settings of the run that a checkpoint is of.

    Raises:
        CheckpointError: it has none.
    """
    saved = checkpoint.read_about(out, step).get("config")
    if not isinstance(saved, dict):
        raise CheckpointError(f"{checkpoint.checkpoint_folder(out, step)}: holds no settings")
    return saved


def refuse_other_size(
    out: Path, step: int, prefix: str, settings: PretrainConfig, vit: ViTConfig
) -> None:
    """Hold the sizes that settings ask for against the tensors that are there, before they cost.

    prefix: where the tensors of a network begin. The grid of positions may be another.

    Raises:
        CheckpointError: naming what is of another size.
    """
    folder = checkpoint.checkpoint_folder(out, step)
    shapes = checkpoint.saved_shapes(out, step, prefix)
    blocks = {name.split(".")[2] for name in shapes if name.startswith("backbone.blocks.")}
    if vit.depth != len(blocks):
        raise CheckpointError(
            f"{folder}: holds {len(blocks)} blocks, and its settings say {vit.depth}"
        )
    with foreign_weights(f"{folder}: no such network", CheckpointError), torch.device("meta"):
        wanted = Network(settings, vit).state_dict()
    for name, value in wanted.items():
        if not name.endswith(POSITIONS) and shapes.get(name) != tuple(value.shape):
            raise CheckpointError(
                f"{folder}: holds {name} of {shapes.get(name)}, and its settings say "
                f"{tuple(value.shape)}"
            )


def has_checkpoint(run: str) -> bool:
    """Whether a path is a run with checkpoints, or one of them."""
    path = Path(run)
    one = re.fullmatch(r"step-(\d+)", path.name) and path.is_dir()
    return bool(one or checkpoint.saved_steps(path))


def find_checkpoint(run: str) -> tuple[Path, int]:
    """Resolve a run's folder (its last checkpoint) or one of its checkpoints.

    Raises:
        ConfigError: there is no checkpoint.
    """
    path = Path(run)
    match = re.fullmatch(r"step-(\d+)", path.name)
    if match and path.is_dir():
        return path.parent.parent, int(match[1])
    steps = checkpoint.saved_steps(path)
    if not steps:
        raise ConfigError(f"{run}: holds no checkpoint of `curate pretrain` to continue")
    return path, steps[-1]


@torch.no_grad()
def restore_networks(method: DINOv2, run: str) -> None:
    """Fill student, teacher, heads and centers from a run, positions resized to their own grid.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    folder, step = find_checkpoint(run)
    own = method.state_dict()
    state, shapes = dict(own), checkpoint.saved_shapes(folder, step, "method")
    for name, value in own.items():
        if name.endswith(POSITIONS):
            shape = shapes.get(name, value.shape)
            state[name] = torch.zeros(shape, dtype=value.dtype)
    checkpoint.load_into(folder, step, {f"method.{name}": value for name, value in state.items()})
    antialias = method.student.backbone.config.antialias
    for name, value in own.items():
        if name.endswith(POSITIONS):
            value.copy_(resize_positions(state[name], value.shape[1] - 1, antialias=antialias))


def resize_positions(positions: Tensor, patches: int, *, antialias: bool) -> Tensor:
    """Interpolate a position embedding (1, 1 + P, D) to a square grid of `patches`."""
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(patches)
    if old == new:
        return positions
    plane = positions[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)  # type: ignore[no-untyped-call]
    plane = F.interpolate(plane, size=(new, new), mode="bicubic", antialias=antialias)
    return torch.cat([positions[:, :1], plane.flatten(2).transpose(1, 2).to(positions.dtype)], 1)
