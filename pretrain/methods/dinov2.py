"""DINOv2: a student that sees masked and small crops agrees with its own moving average.

Legend: B images, L local crops, M masked patches, D width, b bottleneck, K prototypes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from embedder.checkpoint import save_state
from embedder.vit import Tokens, VisionTransformer, ViTConfig
from pretrain.batch import Batch
from pretrain.collapse import health
from pretrain.config import PretrainConfig
from pretrain.distributed import rank, whole_state
from pretrain.heads import Projected, PrototypeHead
from pretrain.losses.centering import Center
from pretrain.losses.dino import dino_global_loss, dino_local_loss
from pretrain.losses.ibot import ibot_loss
from pretrain.losses.koleo import koleo_loss
from pretrain.losses.sinkhorn import sinkhorn_targets
from pretrain.losses.targets import Targets

FILE_NAME = "backbone.safetensors"
"""What a run leaves."""


@dataclass(frozen=True)
class StepTargets:
    """The teacher's targets for all parts of a step."""

    dino: Targets
    """Rows: 2 B class tokens of the first part, then those of the next."""
    ibot: Targets
    """Rows: M masked patches of the first part, then those of the next."""
    dino_starts: list[int]
    """First row of each part."""
    ibot_starts: list[int]
    """First row of each part."""
    health: dict[str, float]
    """Signs of collapse, where they were asked for."""


class Taught(NamedTuple):
    """The teacher's outputs for one part of a step."""

    cls: Tensor
    """(2 B, D)."""
    dino: Projected
    """2 B rows."""
    ibot: Projected
    """M rows."""


class Network(nn.Module):
    """Backbone and heads under their public names; without `ibot_head` the other is shared."""

    def __init__(self, config: PretrainConfig, vit: ViTConfig) -> None:
        super().__init__()
        loss = config.loss
        self.backbone = VisionTransformer(vit)
        self.dino_head = PrototypeHead(vit.width, loss.dino_head)
        if loss.separate_heads:
            self.ibot_head = PrototypeHead(vit.width, loss.ibot_head)

    def project(self, cls: Tensor, patches: Tensor) -> tuple[Projected, Projected]:
        """Put class tokens (m, D) and patches (M, D) through their heads, a shared one once."""
        if hasattr(self, "ibot_head"):
            return self.dino_head(cls), self.ibot_head(patches)
        features, prototypes = self.dino_head(torch.cat([cls, patches]))
        first, second = features.split([len(cls), len(patches)])
        return Projected(first, prototypes), Projected(second, prototypes)


class DINOv2(nn.Module):
    """Student, teacher and losses."""

    file_name = FILE_NAME

    def __init__(self, config: PretrainConfig, vit: ViTConfig | None = None) -> None:
        super().__init__()
        self.config = config
        vit = vit or config.vit()
        self.student = Network(config, vit)
        self.teacher = Network(config, vit)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False).eval()
        loss = config.loss
        ibot_head = loss.ibot_head if loss.separate_heads else loss.dino_head
        self.dino_center = Center(loss.dino_head.prototypes, loss.center_momentum)
        self.ibot_center = Center(ibot_head.prototypes, loss.center_momentum)

    def train(self, mode: bool = True) -> Self:
        """Switch the student; the teacher never drops anything."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def targets(
        self, parts: Sequence[Batch], temperature: float, *, watch: bool = False
    ) -> StepTargets:
        """Run the teacher on the unmasked global crops of all parts of a step.

        All parts come first, so that the targets are balanced over the whole effective batch.
        """
        outputs = [self._teach(part) for part in parts]
        dino = _joined([output.dino for output in outputs])
        ibot = _joined([output.ibot for output in outputs])
        seen = health(outputs[0].cls, outputs[0].dino, temperature) if watch else {}
        return StepTargets(
            self._balance(dino, self.dino_center, temperature),
            self._balance(ibot, self.ibot_center, temperature),
            _starts([len(output.dino.features) for output in outputs]),
            _starts([len(output.ibot.features) for output in outputs]),
            seen,
        )

    def losses(
        self, batch: Batch, targets: StepTargets, part: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Run the student on one part of a step.

        Names and scales are those that the public code logs (its KoLeo and iBOT are halved in
        logs); `total_loss` is what is back-propagated.
        """
        settings = self.config.loss
        seen, local = self._study(batch, generator)
        hidden = seen.patches.flatten(0, 1).index_select(0, batch.mask_index)  # (M, D)
        cls = seen.cls if local is None else torch.cat([seen.cls, local.cls])
        dino, ibot = self.student.project(cls, hidden)
        result = self._dino_losses(dino, targets, part, batch)
        result["ibot_loss"] = 0.5 * settings.ibot_weight * self._ibot_loss(
            ibot, targets, part, batch
        )  # fmt: skip
        if settings.koleo_weight:
            crops = seen.cls.chunk(2)
            gathered = settings.koleo_gathered
            koleo = torch.stack([koleo_loss(crop, gathered=gathered) for crop in crops]).sum()
            result["koleo_loss"] = 0.5 * settings.koleo_weight * koleo
        return {**result, "total_loss": _total(result)}

    @property
    def averaged(self) -> Network:
        """The student's moving average, whose backbone a run leaves: here the teacher."""
        return self.teacher

    @property
    def depth(self) -> int:
        """Layers that the learning rate decays over."""
        return self.student.backbone.config.depth

    def save(self, folder: Path) -> None:
        """Leave the average's backbone with its architecture; every process must ask."""
        save_averaged(self.averaged.backbone, folder)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the average: t <- momentum t + (1 - momentum) s, heads included."""
        move_average(self.averaged, self.student, momentum)

    def submodules(self) -> Iterator[tuple[str, nn.Module]]:
        """The student's parts, whose gradients are clipped each on their own."""
        yield from self.student.named_children()

    def _teach(self, batch: Batch) -> "Taught":
        tokens = self.teacher.backbone.forward_packed([batch.global_crops], [None])[0]
        hidden = tokens.patches.flatten(0, 1).index_select(0, batch.mask_index)  # (M, D)
        return Taught(tokens.cls, *self.teacher.project(tokens.cls, hidden))

    def _balance(self, projected: Projected, center: Center, temperature: float) -> Targets:
        settings = self.config.loss
        if settings.centering == "centering":
            return center.targets(projected, temperature)
        return sinkhorn_targets(
            projected,
            temperature,
            settings.sinkhorn_iterations,
            block_rows=settings.block_rows,
            max_bytes=settings.max_logit_bytes,
        )

    def _study(self, batch: Batch, generator: torch.Generator) -> tuple[Tokens, Tokens | None]:
        """Give the student's tokens of the masked global crops and of the local crops."""
        crops, masks = [batch.global_crops], [batch.masks]
        if batch.local_crops is None:
            return self.student.backbone.forward_packed(crops, masks, generator)[0], None
        groups = [*crops, batch.local_crops]
        first, second = self.student.backbone.forward_packed(groups, [*masks, None], generator)
        return first, second

    def _dino_losses(
        self, dino: Projected, targets: StepTargets, part: int, batch: Batch
    ) -> dict[str, Tensor]:
        settings, crops = self.config.loss, 2 * batch.num_images
        start = targets.dino_starts[part]
        rest = (targets.dino, start, batch.local_count, settings.student_temperature)
        seen = Projected(dino.features[:crops], dino.prototypes)
        result = {"dino_global_crops_loss": settings.dino_weight * dino_global_loss(seen, *rest)}
        if batch.local_count:
            local = Projected(dino.features[crops:], dino.prototypes)
            loss = dino_local_loss(local, *rest)
            result["dino_local_crops_loss"] = settings.dino_weight * loss
        return result

    def _ibot_loss(self, ibot: Projected, targets: StepTargets, part: int, batch: Batch) -> Tensor:
        settings = self.config.loss
        return ibot_loss(
            ibot,
            targets.ibot,
            targets.ibot_starts[part],
            batch.mask_weights,
            2 * batch.num_images,
            settings.student_temperature,
            settings.block_rows,
        )


def move_average(average: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the parameters of an average: a <- momentum a + (1 - momentum) s."""
    ours = [_local(parameter) for parameter in average.parameters()]
    theirs = [_local(parameter) for parameter in student.parameters()]
    torch._foreach_lerp_(ours, theirs, 1 - momentum)


def save_averaged(backbone: VisionTransformer, folder: Path) -> None:
    """Write a backbone that may be divided among processes; every process must ask."""
    weights = whole_state(backbone)
    if rank() == 0:
        save_state(weights, backbone.config, folder / FILE_NAME)


def _total(losses: dict[str, Tensor]) -> Tensor:
    """Undo the halving of the logged KoLeo and iBOT losses."""
    doubled = ("ibot_loss", "koleo_loss")
    return torch.stack(
        [2 * loss if name in doubled else loss for name, loss in losses.items()]
    ).sum()


def _joined(outputs: list[Projected]) -> Projected:
    features = torch.cat([output.features for output in outputs])
    return Projected(features, outputs[0].prototypes)


def _local(parameter: Tensor) -> Tensor:
    """Give this process's shard of a parameter, or the parameter itself."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]
