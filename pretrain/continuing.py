"""Go on from another run's checkpoint at another resolution: the high-resolution stage.

Student, teacher, heads and centres are taken over, positions interpolated to the new grid; the
optimiser starts afresh, and all schedules run over the new length.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from curation.config import apply_changes, find_config, laid_over, parse_settings, read_mapping
from curation.errors import ConfigError
from pretrain import checkpoint
from pretrain.config import PretrainConfig
from pretrain.methods.dinov2 import DINOv2

POSITIONS = "backbone.pos_embed"


def load_continued_config(
    path_or_name: str, overrides: list[str] | tuple[str, ...], run: str
) -> PretrainConfig:
    """Lay a config over the settings of the run that it continues; it may name any part of them.

    Raises:
        ConfigError: no such run or config, or a setting that cannot be.
    """
    folder, step = find_checkpoint(run)
    saved = checkpoint.read_about(folder, step)["config"]
    if "teacher_run" in saved:
        raise ConfigError(f"{run}: is a distillation; only `curate pretrain` runs can be continued")
    above = read_mapping(find_config("pretrain", path_or_name))
    values = laid_over({**saved, "init": None}, above)
    apply_changes(values, overrides)
    values["continue_run"] = str(Path(run).resolve())
    return parse_settings(PretrainConfig, values, where=path_or_name)


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
    """Fill student, teacher, heads and centres from a run, positions resized to their own grid.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    folder, step = find_checkpoint(run)
    own = method.state_dict()
    state = dict(own)
    for name, value in own.items():
        if name.endswith(POSITIONS):
            shape = checkpoint.saved_shape(folder, step, f"method.{name}")
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
