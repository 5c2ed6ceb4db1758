"""Distillation: a small student learns from a frozen larger teacher and from nothing else.

The losses are DINOv2's. Nothing is masked, and iBOT compares all patches of both global crops.
The student's moving average takes no part in training; it is what the run leaves.

Legend: B images, P patches of a global crop.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curation.config import parse_settings
from curation.errors import ConfigError
from embedder.checkpoint import load_backbone
from embedder.vit import Tokens, VisionTransformer, ViTConfig
from pretrain import checkpoint
from pretrain.backbones import find_saved
from pretrain.batch import Batch, index_masks
from pretrain.config import DistillConfig, PretrainConfig
from pretrain.continuing import refuse_other_size, saved_settings
from pretrain.methods.dinov2 import (
    FILE_NAME,
    DINOv2,
    Network,
    StepTargets,
    move_average,
    save_averaged,
)


class FeatureTargets(NamedTuple):
    """The teacher's tokens for the global crops of each part of a step."""

    tokens: list[Tokens]
    health: dict[str, float] = {}
    """Without prototypes there are no signs of collapse to watch."""


class Distillation(DINOv2):
    """Student, its moving average, frozen teacher and losses."""

    config: DistillConfig

    def __init__(
        self, config: DistillConfig, vit: ViTConfig | None = None, teacher: Network | None = None
    ) -> None:
        """`teacher` is one that is loaded already, for several students."""
        super().__init__(config, vit)
        self.average = self.teacher
        self.teacher = teacher or load_teacher(config)
        self.register_state_dict_post_hook(_leave_out_teacher)  # type: ignore[no-untyped-call]

    @property
    def averaged(self) -> Network:
        """The student's moving average, whose backbone the run leaves."""
        return self.average

    def train(self, mode: bool = True) -> Self:
        """Switch the student; teacher and average never drop anything."""
        super().train(mode)
        self.average.eval()
        return self

    def targets(
        self, parts: Sequence[Batch], temperature: float, *, watch: bool = False
    ) -> StepTargets:
        """Run the frozen teacher on the global crops of all parts of a step."""
        return super().targets([self._unmasked(part) for part in parts], temperature, watch=watch)

    def losses(
        self, batch: Batch, targets: StepTargets, part: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Run the student on one part of a step; names and scales are those of DINOv2."""
        return super().losses(self._unmasked(batch), targets, part, generator)

    def _unmasked(self, batch: Batch) -> Batch:
        """Hide no patch (masks (2 B, P)), and compare all of them or those chosen."""
        shown = replace(batch, masks=torch.zeros_like(batch.masks))
        if self.config.ibot_tokens == "masked":
            return shown
        _, index, weights = index_masks(torch.ones_like(batch.masks))  # (2 B P,), (2 B P,)
        return replace(shown, mask_index=index, mask_weights=weights)


class FeatureStudent(nn.Module):
    """A backbone, and linear maps of its tokens to the teacher's width."""

    def __init__(self, vit: ViTConfig, teacher_width: int) -> None:
        super().__init__()
        self.backbone = VisionTransformer(vit)
        self.cls_map = nn.Linear(vit.width, teacher_width)
        self.patch_map = nn.Linear(vit.width, teacher_width)


class FeatureDistillation(nn.Module):
    """Distillation without heads: tokens, mapped linearly, point where the teacher's do.

    The baseline for a teacher whose heads are not at hand.
    """

    file_name = FILE_NAME

    def __init__(
        self,
        config: DistillConfig,
        vit: ViTConfig | None = None,
        teacher: VisionTransformer | None = None,
    ) -> None:
        """`teacher` is one that is loaded already, for several students."""
        super().__init__()
        self.config = config
        self.teacher = teacher or load_teacher_backbone(config)
        width = self.teacher.config.width
        self.student = FeatureStudent(vit or config.vit(), width)
        self.averaged = FeatureStudent(vit or config.vit(), width)
        self.averaged.load_state_dict(self.student.state_dict())
        self.averaged.requires_grad_(False).eval()
        self.register_state_dict_post_hook(_leave_out_teacher)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Self:
        """Switch the student; teacher and average never drop anything."""
        super().train(mode)
        self.teacher.eval()
        self.averaged.eval()
        return self

    @torch.no_grad()
    def targets(
        self, parts: Sequence[Batch], temperature: float, *, watch: bool = False
    ) -> FeatureTargets:
        """Run the frozen teacher on the global crops of all parts of a step."""
        look = self.teacher.forward_packed
        return FeatureTargets([look([part.global_crops], [None])[0] for part in parts])

    def losses(
        self, batch: Batch, targets: FeatureTargets, part: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """One minus the cosine, of class tokens and of patches, in the mean."""
        seen = self.student.backbone.forward_packed([batch.global_crops], [None], generator)[0]
        taught = targets.tokens[part]
        cls = _distance(self.student.cls_map(seen.cls), taught.cls)
        patches = _distance(self.student.patch_map(seen.patches), taught.patches)
        return {"cls_loss": cls, "patch_loss": patches, "total_loss": cls + patches}

    @property
    def depth(self) -> int:
        """Layers that the learning rate decays over."""
        return self.student.backbone.config.depth

    def save(self, folder: Path) -> None:
        """Leave the average's backbone with its architecture; every process must ask."""
        save_averaged(self.averaged.backbone, folder)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the average of the student."""
        move_average(self.averaged, self.student, momentum)

    def submodules(self) -> Iterator[tuple[str, nn.Module]]:
        """The student's parts, whose gradients are clipped each on their own."""
        yield from self.student.named_children()


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(ours.float(), theirs.float(), dim=-1).mean()


def load_teacher_backbone(config: DistillConfig) -> VisionTransformer:
    """Load the backbone of the teacher's run, or of a file, frozen.

    Raises:
        CheckpointError: the file is no backbone.
        ConfigError: no teacher is named, or its patches are of another size.
    """
    if config.teacher_run is None:
        raise ConfigError("no teacher: name a run, or a file of weights, with --teacher")
    path = Path(config.teacher_run)
    saved = find_saved(path)
    left = path / "backbone.safetensors"
    teacher = saved.load() if saved else load_backbone(left if left.is_file() else path)
    if teacher.config.patch != config.vit().patch:
        raise ConfigError(
            f"{path}: the teacher has patch = {teacher.config.patch}, the student "
            f"{config.vit().patch}; set model.patch to {teacher.config.patch}"
        )
    return teacher.requires_grad_(False)


def load_teacher(config: DistillConfig) -> Network:
    """Restore backbone and heads from the last checkpoint of the teacher's run, frozen.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: there is no such run, or it does not fit the student.
    """
    if config.teacher_run is None:
        raise ConfigError("no teacher: name the folder of its run with --teacher or teacher_run")
    run = Path(config.teacher_run)
    if run.is_file():
        raise ConfigError(
            f"{run}: a file of weights has no heads to teach by; --set objective=features learns "
            "from its tokens"
        )
    steps = checkpoint.saved_steps(run)
    if not steps:
        raise ConfigError(f"{run}: holds no checkpoint of `curate pretrain` to be the teacher")
    saved = saved_settings(run, steps[-1])
    if saved.get("students") or saved.get("objective") == "features":
        raise ConfigError(f"{run}: its checkpoints hold no single student with heads to teach")
    distilled = "teacher_run" in saved
    model = DistillConfig if distilled else PretrainConfig
    settings = parse_settings(model, saved, where=str(run))
    _refuse_misfit(settings, config, run)
    prefix = "method.average" if distilled else "method.teacher"
    return _restore(settings, run, steps[-1], prefix)


def _restore(settings: PretrainConfig, run: Path, step: int, prefix: str) -> Network:
    vit = settings.vit()
    refuse_other_size(run, step, prefix, settings, vit)
    shape = checkpoint.saved_shapes(run, step, prefix)["backbone.pos_embed"]
    vit = replace(vit, image_size=math.isqrt(shape[1] - 1) * vit.patch)
    teacher = Network(settings, vit)
    state = {f"{prefix}.{name}": value for name, value in teacher.state_dict().items()}
    checkpoint.load_into(run, step, state)
    return teacher.requires_grad_(False).eval()


def _refuse_misfit(teacher: PretrainConfig, student: PretrainConfig, run: Path) -> None:
    """Teacher and student must choose among the same prototypes for the same patches."""
    theirs, ours = _outputs(teacher), _outputs(student)
    for key, value in theirs.items():
        if ours[key] != value:
            raise ConfigError(
                f"{run}: the teacher has {key} = {value}, the student {ours[key]}; "
                f"set {key.replace('patch', 'model.patch')} to {value}"
            )


def _outputs(config: PretrainConfig) -> dict[str, Any]:
    loss = config.loss
    ibot_head = loss.ibot_head if loss.separate_heads else loss.dino_head
    return {
        "patch": config.vit().patch,
        "loss.separate_heads": loss.separate_heads,
        "loss.dino_head.prototypes": loss.dino_head.prototypes,
        "loss.ibot_head.prototypes": ibot_head.prototypes,
    }


def _leave_out_teacher(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    """Checkpoints do without the teacher, which its own run keeps."""
    for name in [name for name in state if name.startswith(f"{prefix}teacher.")]:
        del state[name]
