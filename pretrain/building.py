"""Build the method of a run, and refuse what does not fit before the first step."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedder.checkpoint import load_state, read_weights
from embedder.errors import CheckpointError
from embedder.vit import ViTConfig
from pretrain.config import DistillConfig, PretrainConfig
from pretrain.continuing import restore_networks
from pretrain.methods.dinov2 import DINOv2
from pretrain.methods.distillation import Distillation


def build_method(config: PretrainConfig) -> DINOv2:
    """Build student and teacher from the run's seed, and from `init` where it is given.

    Raises:
        CheckpointError: the weights of `init` do not fit.
        ConfigError: the teacher of a distillation is missing or does not fit.
    """
    vit = config.vit()
    weights, vit = (None, vit) if config.init is None else _initial_weights(config.init, vit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        method = (
            Distillation(config, vit) if isinstance(config, DistillConfig) else DINOv2(config, vit)
        )
    if config.continue_run is not None:
        restore_networks(method, config.continue_run)
    if weights is not None:
        for network in (method.student, method.averaged):
            load_state(network.backbone, weights, where=str(config.init))
    for network in (method.student, method.teacher):
        network.backbone.checkpoint_blocks = config.run.checkpoint_activations
        if config.run.compile:
            for block in network.backbone.blocks:
                block.compile()
    return method


def refuse_other_model(saved: dict[str, Any], config: PretrainConfig, out: Path) -> None:
    """A run may change its length, data reading and logging, but not what it trains.

    Raises:
        CheckpointError: naming the first setting that differs.
    """
    ours = config.model_dump(mode="json")
    for key in ("teacher_run", "ibot_tokens", "continue_run"):
        if ours.get(key) != saved.get(key):
            raise _changed(out, key, saved.get(key), ours.get(key))
    for section in ("model", "crops", "loss"):
        for key, value in ours[section].items():
            if value != saved[section].get(key):
                raise _changed(out, f"{section}.{key}", saved[section].get(key), value)


def _changed(out: Path, key: str, before: object, now: object) -> CheckpointError:
    return CheckpointError(
        f"{out}: was trained with {key} = {before}, now it is {now}; name another folder, or set "
        "it back"
    )


def _initial_weights(path: str, vit: ViTConfig) -> tuple[dict[str, Tensor], ViTConfig]:
    """Read weights to start from; their position embedding keeps its grid and is interpolated."""
    weights, _ = read_weights(path)
    positions = weights["pos_embed"].shape[1] - 1
    return weights, replace(vit, image_size=math.isqrt(positions) * vit.patch)
