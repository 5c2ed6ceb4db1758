"""What `curate export` finds: a backbone, and what is recorded of it."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from curation.errors import ConfigError
from embedder.checkpoint import UNKNOWN, license_of, load_backbone
from embedder.vit import VisionTransformer
from pipelines.audit.model_card import told_changes
from pretrain.backbones import find_saved

BACKBONE = "backbone.safetensors"


@dataclass(frozen=True)
class FoundWeights:
    """What is to be exported."""

    model: VisionTransformer
    weights: Path
    """A file or folder of weights, or a checkpoint."""
    recorded: dict[str, Any] = field(default_factory=dict)
    """What the checkpoint that holds these very weights says of its run."""
    license: str = UNKNOWN

    def training(self) -> dict[str, str]:
        """Where the weights are from, and how they were trained, for the card."""
        lines = {"weights": f"`{self.weights}`"}
        if self.recorded:
            config = self.recorded["config"]
            lines["method"] = "distillation" if "teacher_run" in config else "DINOv2 pretraining"
            lines["steps"] = f"{self.recorded['step']:,}"
            if changes := self.recorded.get("changes"):
                lines["changed on the way"] = told_changes(changes)
            lines["settings"] = f"`{json.dumps(config, sort_keys=True)}`"
        return lines


def find_weights(path: Path, step: int | None) -> FoundWeights:
    """Load what a run, a checkpoint or a file of weights holds.

    Raises:
        ConfigError: nothing is there, or not that step.
    """
    saved = find_saved(path, step)
    if saved is not None:
        return FoundWeights(saved.load(), saved.folder, saved.about())
    if not path.exists():
        raise ConfigError(f"{path}: no such run or weight file")
    if step is not None:
        raise ConfigError(f"--step {step}: {path} is no run with checkpoints")
    return _of_file(path / BACKBONE if (path / BACKBONE).is_file() else path)


def _of_file(path: Path) -> FoundWeights:
    """Load a file; where it is of a run, it must be what its last checkpoint holds.

    Raises:
        ConfigError: it is of another step.
    """
    found = FoundWeights(load_backbone(path), path, license=license_of(path))
    saved = find_saved(path.parent) if path.name == BACKBONE else None
    if saved is None:
        return found
    own, last = found.model.state_dict(), saved.load().state_dict()
    if not all(name in own and value.equal(own[name]) for name, value in last.items()):
        raise ConfigError(
            f"{path}: is not of the last checkpoint, that of step {saved.step}; name the run, "
            f"{path.parent}, and --step for one that is not the last"
        )
    return replace(found, recorded=saved.about())
