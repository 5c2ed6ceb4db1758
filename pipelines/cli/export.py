"""`curate export`: a backbone in the formats that others load, with its card."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from curation.errors import ConfigError
from embedder.checkpoint import UNKNOWN, licence_of, load_backbone
from embedder.vit import VisionTransformer
from pipelines.audit.model_card import DataFacts, data_facts, model_card, told_changes, write_card
from pipelines.operate import console

BACKBONE = "backbone.safetensors"


@dataclass(frozen=True)
class Found:
    """What is to be exported."""

    model: VisionTransformer
    weights: Path
    """A file or folder of weights, or a checkpoint."""
    recorded: dict[str, Any] = field(default_factory=dict)
    """What the checkpoint that holds these very weights says of its run."""
    licence: str = UNKNOWN


def run_export(
    ckpt: str, format: str, out: str, data: str | None, licence: str | None, step: int | None
) -> None:
    """Write the weights, then their card.

    Raises:
        ConfigError: an unknown format, or no backbone there.
    """
    from embedder.export import FORMATS, export_backbone

    if format not in FORMATS:
        raise ConfigError(f"--format {format}: unknown; known: {', '.join(FORMATS)}")
    found = _find(Path(ckpt), step)
    facts = data_facts(data, found.recorded.get("data"))
    about = {**_training(found), "licence": licence or found.licence}
    files = export_backbone(found.model, format, Path(out), _metadata(facts, about))
    card = write_card(model_card(found.model, format, out, facts, about), out)
    console.print_pairs(
        {
            "format": format,
            "step": found.recorded.get("step", UNKNOWN),
            "files": ", ".join(path.name for path in files),
            "card": card,
            "manifest digest": facts.digest,
        },
        title="export",
    )


def _find(path: Path, step: int | None) -> Found:
    """Load what a run, a checkpoint or a file of weights holds.

    Raises:
        ConfigError: nothing is there, or not that step.
    """
    from pretrain.backbones import find_saved

    saved = find_saved(path, step)
    if saved is not None:
        return Found(saved.load(), saved.folder, saved.about())
    if not path.exists():
        raise ConfigError(f"{path}: no such run or weight file")
    if step is not None:
        raise ConfigError(f"--step {step}: {path} is no run with checkpoints")
    return _of_file(path / BACKBONE if (path / BACKBONE).is_file() else path)


def _of_file(path: Path) -> Found:
    """Load a file; where it is of a run, it must be what its last checkpoint holds.

    Raises:
        ConfigError: it is of another step.
    """
    from pretrain.backbones import find_saved

    found = Found(load_backbone(path), path, licence=licence_of(path))
    saved = find_saved(path.parent) if path.name == BACKBONE else None
    if saved is None:
        return found
    if not _is_same(saved.load(), found.model):
        raise ConfigError(
            f"{path}: is not of the last checkpoint, that of step {saved.step}; name the run, "
            f"{path.parent}, and --step for one that is not the last"
        )
    return replace(found, recorded=saved.about())


def _is_same(one: VisionTransformer, other: VisionTransformer) -> bool:
    weights = other.state_dict()
    return all(
        name in weights and value.equal(weights[name]) for name, value in one.state_dict().items()
    )


def _training(found: Found) -> dict[str, str]:
    lines = {"weights": f"`{found.weights}`"}
    if found.recorded:
        config = found.recorded["config"]
        lines["method"] = "distillation" if "teacher_run" in config else "DINOv2 pretraining"
        lines["steps"] = f"{found.recorded['step']:,}"
        if changes := found.recorded.get("changes"):
            lines["changed on the way"] = told_changes(changes)
        lines["settings"] = f"`{json.dumps(config, sort_keys=True)}`"
    return lines


def _metadata(facts: DataFacts, about: dict[str, str]) -> dict[str, str]:
    """What also goes into the weight file: it may be parted from its card."""
    return {"manifest_digest": facts.digest, "recipe": facts.recipe, "licence": about["licence"]}
