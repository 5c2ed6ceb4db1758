"""The backbone that a run has made up to a checkpoint: the moving average of its student.

`backbone.safetensors` is that of a run's end: one that was made longer and then stopped has newer
checkpoints beside it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from curation.config import parse_settings
from curation.errors import ConfigError
from embedder.checkpoint import build_backbone
from embedder.errors import CheckpointError, foreign_weights
from embedder.vit import VisionTransformer, ViTConfig
from pretrain import checkpoint
from pretrain.config import DistillConfig, PretrainConfig
from pretrain.continuing import saved_settings


@dataclass(frozen=True)
class SavedBackbone:
    """Where the backbone of one student lies in a checkpoint."""

    run: Path
    step: int
    student: str
    """Empty where the run has a single one."""
    prefix: str
    """Of the names of its tensors."""

    @property
    def folder(self) -> Path:
        """The checkpoint."""
        return checkpoint.checkpoint_folder(self.run, self.step)

    @property
    def name(self) -> str:
        """What results call it."""
        return f"dinov2:{self.folder / self.student}"

    def about(self) -> dict[str, Any]:
        """What the checkpoint says of the run."""
        return checkpoint.read_about(self.run, self.step)

    def load(self) -> VisionTransformer:
        """Read it, in evaluation mode.

        Raises:
            CheckpointError: the checkpoint is damaged, or its settings describe another model.
        """
        shapes = checkpoint.saved_shapes(self.run, self.step, self.prefix)
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
        named = {f"{self.prefix}.{name}": value for name, value in weights.items()}
        checkpoint.load_into(self.run, self.step, named)
        return build_backbone(weights, self._architecture(), where=str(self.folder))

    def _architecture(self) -> ViTConfig:
        saved = saved_settings(self.run, self.step)
        model = DistillConfig if "teacher_run" in saved else PretrainConfig
        settings = parse_settings(model, saved, where=str(self.folder))
        if isinstance(settings, DistillConfig):
            settings = settings.single()[self.student]
        with foreign_weights(f"{self.folder}: describes no backbone", CheckpointError):
            return settings.vit()


def find_saved(path: Path, step: int | None = None) -> SavedBackbone | None:
    """Find what a run, one student's folder in it, or a checkpoint stands for.

    step: of the checkpoint; the last where absent. None where no checkpoints are.

    Raises:
        ConfigError: there is no such step, or several students.
    """
    run, student, steps = _run_of(path)
    if not steps or path.is_file():
        return None
    if step is not None and step not in steps:
        listed = ", ".join(map(str, steps))
        raise ConfigError(f"{path}: holds no checkpoint of step {step}; there are: {listed}")
    found = step if step is not None else steps[-1]
    prefixes = _prefixes(run, found)
    if student in prefixes:
        return SavedBackbone(run, found, student, prefixes[student])
    if student:
        return None
    if not prefixes:
        raise ConfigError(f"{path}: holds no backbone; is it a run of the method copy?")
    named = ", ".join(str(run / name) for name in prefixes)
    raise ConfigError(f"{path}: is of several students; name one: {named}")


def _run_of(path: Path) -> tuple[Path, str, list[int]]:
    """Split a path into a run and a student; list the steps that it leaves open."""
    match = re.fullmatch(r"step-(\d+)", path.name)
    if match and (path / checkpoint.ABOUT).is_file():
        return path.parent.parent, "", [int(match[1])]
    if steps := checkpoint.saved_steps(path):
        return path, "", steps
    return path.parent, path.name, checkpoint.saved_steps(path.parent)


def _prefixes(run: Path, step: int) -> dict[str, str]:
    """Where the tensors of moving averages begin, by student."""
    names = checkpoint.saved_shapes(run, step, "method")
    average = r"(?:students\.([\w-]+)\.)?(?:teacher|averaged?)\.backbone"
    matches = (
        re.fullmatch(average, name.removesuffix(".cls_token"))
        for name in names
        if name.endswith(".cls_token")
    )
    return {match[1] or "": f"method.{match[0]}" for match in matches if match}
