"""Build the method of a run, and refuse what does not fit before the first step."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from curation.errors import ConfigError
from embedder.checkpoint import load_state, position_grid, read_weights
from embedder.vit import ViTConfig
from pretrain.batch import Batch
from pretrain.checkpoint import saved_shapes
from pretrain.config import DistillConfig, PretrainConfig, TrainConfig
from pretrain.continuing import find_checkpoint, refuse_other_size, restore_networks
from pretrain.copy_config import CopyConfig
from pretrain.data import read_batches
from pretrain.distributed import rank, world_size
from pretrain.evaluation.knn import KnnProbe
from pretrain.methods.copy import CopyMethod
from pretrain.methods.dinov2 import DINOv2
from pretrain.methods.distillation import Distillation, FeatureDistillation
from pretrain.methods.learners import SeveralStudents
from pretrain.sources import Source
from pretrain.view_features import ViewFeatures

Begun = tuple[Path, int]
"""A run's folder, and the step of its checkpoint."""

TOKENS_PER_PROTOTYPE = 50
"""Class tokens of global crops that heads on a frozen backbone must see for each prototype."""


class Feed(Protocol):
    """Where the batches of a run come from."""

    def batches(self, position: int) -> Iterator[Any]:
        """Give the batches of this process from a position in the stream of images on."""


@dataclass(frozen=True)
class ImageFeed:
    """Crops and masks, made anew for each step."""

    source: Source
    config: PretrainConfig

    def batches(self, position: int) -> Iterator[Batch]:
        """Read the stream of this process from a position on."""
        return read_batches(self.source, self.config, position, rank(), world_size())


def open_feed(config: TrainConfig, source: Source, out: Path) -> Feed:
    """Open what the run learns from; `out` keeps the features of a frozen trunk.

    Raises:
        ConfigError: there are too few images, no such trunk, or several processes for one head.
    """
    if isinstance(config, CopyConfig):
        return ViewFeatures(source, config, out)
    assert isinstance(config, PretrainConfig), "the only other kind"
    return ImageFeed(source, config)


def build_probe(config: TrainConfig) -> Callable[[Any], dict[str, float]]:
    """Build what measures a learner now and then, every `probe_every_steps`.

    Raises:
        ConfigError: there are no images to measure on.
    """
    if isinstance(config, CopyConfig):
        return lambda learner: learner.measure().logged()
    knn = getattr(config, "knn", None)
    if knn is None:
        return lambda learner: {}
    probe = KnnProbe(knn)
    return lambda learner: {"knn": probe.accuracy(learner.averaged.backbone)}


def build_method(config: TrainConfig, begun: Begun | None = None, feed: Feed | None = None) -> Any:
    """Build student and teacher from the run's seed, and from `init` where it is given.

    begun: checkpoint of this run that will fill them; what they began with is not needed then.
    feed: what a copy head is fitted on.

    Gives what `pretrain.methods.learners` describes: a learner, or several.

    Raises:
        CheckpointError: the weights of `init` do not fit.
        ConfigError: the teacher of a distillation is missing or does not fit.
    """
    if isinstance(config, CopyConfig):
        assert isinstance(feed, ViewFeatures), "opened for this config"
        return _build_copy(config, begun, feed)
    assert isinstance(config, PretrainConfig), "the only other kind"
    if isinstance(config, DistillConfig) and config.students:
        return _build_several(config, begun)
    return _build_single(config, begun)


def _build_copy(config: CopyConfig, begun: Begun | None, views: ViewFeatures) -> CopyMethod:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        method = CopyMethod(config, views)
    if begun is None:
        method.begin()
    return method


def _build_several(config: DistillConfig, begun: Begun | None) -> SeveralStudents:
    """Build each student as its own run would, all with one teacher."""
    built: dict[str, nn.Module] = {}
    teacher: Any = None
    for name, single in config.single().items():
        built[name] = _build_single(single, begun, teacher, f"method.students.{name}")
        teacher = built[name].teacher
    return SeveralStudents(built)


def _build_single(
    config: PretrainConfig, begun: Begun | None, teacher: Any = None, prefix: str = "method"
) -> Any:
    weights, vit = None, config.vit()
    continued = config.continue_run if begun is None else None
    if config.init is not None and begun is not None:
        vit = _with_grid_of(begun, f"{prefix}.student", vit)
    elif config.init is not None:
        weights, vit = _initial_weights(config.init, vit)
    if continued is not None:
        refuse_other_size(*find_checkpoint(continued), "method.student", config, vit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        method = _new_method(config, vit, teacher)
    if continued is not None:
        restore_networks(method, continued)
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


def refuse_misfit(config: TrainConfig, processes: int) -> None:
    """Heads fitted on a frozen backbone see too little for prototypes beyond a number.

    Raises:
        ConfigError: each would be seen for fewer than 50 class tokens; or a copy head, which one
            process fits, is given several.
    """
    if isinstance(config, CopyConfig) and processes > 1:
        raise ConfigError(f"method copy: trains in one process, found {processes}; start it alone")
    if not isinstance(config, PretrainConfig) or not config.fits_heads:
        return
    seen = 2 * config.effective_batch(processes) * config.optim.steps
    wanted = config.loss.dino_head.prototypes
    if wanted * TOKENS_PER_PROTOTYPE > seen:
        raise ConfigError(
            f"loss.dino_head.prototypes = {wanted}: {seen:,} class tokens are seen, "
            f"{TOKENS_PER_PROTOTYPE} for each are needed; take at most "
            f"{seen // TOKENS_PER_PROTOTYPE}, or more steps"
        )


def _with_grid_of(begun: Begun, network: str, vit: ViTConfig) -> ViTConfig:
    """Give the position embedding the grid that it has in a checkpoint."""
    shape = saved_shapes(*begun, network)["backbone.pos_embed"]
    return replace(vit, image_size=math.isqrt(shape[1] - 1) * vit.patch)


def _initial_weights(path: str, vit: ViTConfig) -> tuple[dict[str, Tensor], ViTConfig]:
    """Read weights to start from; their position embedding keeps its grid and is interpolated."""
    weights, _ = read_weights(path)
    return weights, replace(vit, image_size=position_grid(weights, path) * vit.patch)
