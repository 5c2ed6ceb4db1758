"""Build the method of a run, and refuse what does not fit before the first step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curation.errors import ConfigError
from embedder.checkpoint import load_state, position_grid, read_weights
from embedder.errors import CheckpointError
from embedder.vit import ViTConfig
from pretrain.config import DistillConfig, PretrainConfig
from pretrain.continuing import find_checkpoint, refuse_other_size, restore_networks
from pretrain.methods.dinov2 import DINOv2
from pretrain.methods.distillation import Distillation, FeatureDistillation
from pretrain.methods.learners import SeveralStudents

TOKENS_PER_PROTOTYPE = 50
"""Class tokens of global crops that heads on a frozen backbone must see for each prototype."""


def build_method(config: PretrainConfig) -> Any:
    """Build student and teacher from the run's seed, and from `init` where it is given.

    Gives what `pretrain.methods.learners` describes: a learner, or several.

    Raises:
        CheckpointError: the weights of `init` do not fit.
        ConfigError: the teacher of a distillation is missing or does not fit.
    """
    if isinstance(config, DistillConfig) and config.students:
        return _build_several(config)
    return _build_single(config)


def _build_several(config: DistillConfig) -> SeveralStudents:
    """Build each student as its own run would, all with one teacher."""
    built: dict[str, nn.Module] = {}
    teacher: Any = None
    for name, single in config.single().items():
        built[name] = _build_single(single, teacher)
        teacher = built[name].teacher
    return SeveralStudents(built)


def _build_single(config: PretrainConfig, teacher: Any = None) -> Any:
    vit = config.vit()
    weights, vit = (None, vit) if config.init is None else _initial_weights(config.init, vit)
    if config.continue_run is not None:
        continued = find_checkpoint(config.continue_run)
        refuse_other_size(*continued, "method.student", config, vit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        method = _new_method(config, vit, teacher)
    if config.continue_run is not None:
        restore_networks(method, config.continue_run)
    if weights is not None:
        for network in (method.student, method.averaged):
            load_state(network.backbone, weights, where=str(config.init))
    fresh = (method.student,) if teacher is not None else (method.student, method.teacher)
    for network in fresh:
        backbone = getattr(network, "backbone", network)
        backbone.checkpoint_blocks = config.run.checkpoint_activations
        if config.run.compile:
            for block in backbone.blocks:
                block.compile()
    if config.fits_heads:
        method.student.backbone.requires_grad_(False)
    return method


def _new_method(config: PretrainConfig, vit: ViTConfig, teacher: Any) -> Any:
    if not isinstance(config, DistillConfig):
        return DINOv2(config, vit)
    if config.objective == "features":
        return FeatureDistillation(config, vit, teacher)
    return Distillation(config, vit, teacher)


def refuse_too_many_prototypes(config: PretrainConfig, processes: int) -> None:
    """Heads fitted on a frozen backbone see too little for prototypes beyond a number.

    Raises:
        ConfigError: each would be seen for fewer than 50 class tokens.
    """
    if not config.fits_heads:
        return
    seen = 2 * config.effective_batch(processes) * config.optim.steps
    wanted = config.loss.dino_head.prototypes
    if wanted * TOKENS_PER_PROTOTYPE > seen:
        raise ConfigError(
            f"loss.dino_head.prototypes = {wanted}: {seen:,} class tokens are seen, "
            f"{TOKENS_PER_PROTOTYPE} for each are needed; take at most "
            f"{seen // TOKENS_PER_PROTOTYPE}, or more steps"
        )


def refuse_other_model(saved: dict[str, Any], config: PretrainConfig, out: Path) -> None:
    """A run may change its length, data reading and logging, but not what it trains.

    Raises:
        CheckpointError: naming the first setting that differs.
    """
    ours = config.model_dump(mode="json")
    for key, default in _DECISIVE.items():
        before, now = saved.get(key, default), ours.get(key, default)
        if before != now:
            raise _changed(out, key, before, now)
    for section in ("model", "crops", "loss"):
        for key, value in ours[section].items():
            if key not in _OF_THE_MACHINE and value != saved[section].get(key):
                raise _changed(out, f"{section}.{key}", saved[section].get(key), value)


_OF_THE_MACHINE = ("block_rows", "max_logit_bytes")
"""Settings of those sections that change how much is held at once, and nothing else."""

_DECISIVE: dict[str, Any] = {
    "teacher_run": None,
    "ibot_tokens": None,
    "continue_run": None,
    "students": [],
    "objective": "prototypes",
}
"""Settings outside the sections that decide what is trained, and what those without them mean."""


def _changed(out: Path, key: str, before: object, now: object) -> CheckpointError:
    return CheckpointError(
        f"{out}: was trained with {key} = {before}, now it is {now}; name another folder, or set "
        "it back"
    )


def _initial_weights(path: str, vit: ViTConfig) -> tuple[dict[str, Tensor], ViTConfig]:
    """Read weights to start from; their position embedding keeps its grid and is interpolated."""
    weights, _ = read_weights(path)
    return weights, replace(vit, image_size=position_grid(weights, path) * vit.patch)
