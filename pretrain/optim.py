"""AdamW with layer-wise learning rates, and clipping by submodule."""

import re
from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pretrain.config import OptimSettings, TrainConfig
from pretrain.schedules import Cosine


class GroupKey(NamedTuple):
    """What the parameters of one optimizer group share."""

    lr_multiplier: float
    decay_multiplier: float
    is_last_layer: bool
    is_backbone: bool


def group_key(name: str, depth: int, settings: OptimSettings) -> GroupKey:
    """Sort a student's parameter, named `backbone.…`, `dino_head.…` or `ibot_head.…`.

    A layer's learning rate is decay ** (depth + 1 - layer), where embeddings are layer 0, block i
    is i + 1, the final norm and the heads depth + 1. Biases, norms and LayerScale do not decay.
    """
    layer = depth + 1
    block = re.match(r"backbone\.blocks\.(\d+)\.", name)
    if block:
        layer = int(block[1]) + 1
    elif name.startswith("backbone.") and not name.startswith("backbone.norm."):
        layer = 0
    multiplier = settings.layer_decay ** (depth + 1 - layer)
    if "patch_embed" in name:
        multiplier *= settings.patch_embed_lr
    decays = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
    return GroupKey(multiplier, float(decays), "last_layer" in name, name.startswith("backbone."))


def build_optimizer(student: nn.Module, depth: int, settings: OptimSettings) -> torch.optim.AdamW:
    """Group the student's parameters; `Schedules.apply` sets learning rates and decay later."""
    groups = parameter_groups(student, depth, settings)
    return torch.optim.AdamW(groups, betas=settings.betas, fused=True)


def parameter_groups(
    student: nn.Module, depth: int, settings: OptimSettings
) -> list[dict[str, Any]]:
    """Group the parameters of one student that share their multipliers."""
    groups: dict[GroupKey, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in student.named_parameters():
        groups[group_key(name, depth, settings)].append(parameter)
    return [{"params": parameters, "key": tuple(key)} for key, parameters in groups.items()]


@dataclass(frozen=True)
class Schedules:
    """Learning rate and weight decay by step."""

    lr: Cosine
    weight_decay: Cosine
    freeze_last_layer: int
    freeze_backbone: int

    @classmethod
    def of(cls, config: TrainConfig, processes: int) -> "Schedules":
        """Compute the schedules; the learning rate follows the effective batch."""
        optim = config.optim
        return cls(
            Cosine(config.peak_lr(processes), optim.min_lr, optim.steps, optim.warmup_steps),
            Cosine(*optim.weight_decay, optim.steps),
            optim.freeze_last_layer_steps,
            optim.freeze_backbone_steps,
        )

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set every group's learning rate and weight decay for a step."""
        for group in optimizer.param_groups:
            key = GroupKey(*group["key"])
            frozen = (key.is_last_layer and step < self.freeze_last_layer) or (
                key.is_backbone and step < self.freeze_backbone
            )
            group["lr"] = 0.0 if frozen else self.lr(step) * key.lr_multiplier
            group["weight_decay"] = self.weight_decay(step) * key.decay_multiplier


def clip_gradients(
    modules: Iterable[tuple[str, nn.Module]], max_norm: float | None
) -> dict[str, Tensor]:
    """Clip each submodule's gradient by its own norm; give the norms before clipping."""
    limit = float("inf") if max_norm is None else max_norm
    norms = {
        name: torch.nn.utils.clip_grad_norm_(module.parameters(), limit) for name, module in modules
    }
    return {name: _whole(norm) for name, norm in norms.items()}


def prepare_state(optimizer: torch.optim.Optimizer, stepped: Container[Tensor]) -> None:
    """Create AdamW's state of the parameters that had one, for a checkpoint to fill.

    stepped: parameters that were trained; a frozen backbone, without gradients, was not.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in stepped:
                continue
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": step, **moments}


def _whole(norm: Tensor) -> Tensor:
    """Add up the norm of a divided gradient."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
