"""`curate export`: a backbone in the formats that others load, with its card."""

import json
from pathlib import Path
from typing import Any

from curation.errors import ConfigError
from pipelines import console
from pipelines.model_card import DataFacts, data_facts, model_card, told_changes, write_card

BACKBONE = "backbone.safetensors"


def run_export(ckpt: str, format: str, out: str, data: str | None, licence: str) -> None:
    """Write the weights, then their card.

    Raises:
        ConfigError: an unknown format, or no backbone there.
    """
    from embedder.checkpoint import load_backbone
    from embedder.export import FORMATS, export_backbone

    if format not in FORMATS:
        raise ConfigError(f"--format {format}: unknown; known: {', '.join(FORMATS)}")
    weights, run = _find(Path(ckpt))
    recorded = {} if run is None else _last_checkpoint(run)
    model = load_backbone(weights)
    facts = data_facts(data, recorded.get("data"))
    about = {**_training(weights, recorded), "licence": licence}
    files = export_backbone(model, format, Path(out), _metadata(facts, about))
    card = write_card(model_card(model, format, out, facts, about), out)
    console.print_pairs(
        {
            "format": format,
            "files": ", ".join(path.name for path in files),
            "card": card,
            "manifest digest": facts.digest,
        },
        title="export",
    )


def _find(path: Path) -> tuple[Path, Path | None]:
    """Find the weights, and the folder of the run that left them."""
    if (path / BACKBONE).is_file():
        return path / BACKBONE, path
    if (path / "checkpoints").is_dir():
        raise ConfigError(f"{path}: the run is unfinished; it writes {BACKBONE} at its end")
    if not path.exists():
        raise ConfigError(f"{path}: no such run or weight file")
    return path, path.parent if (path.parent / "checkpoints").is_dir() else None


def _last_checkpoint(run: Path) -> dict[str, Any]:
    from pretrain.checkpoint import read_about, saved_steps

    steps = saved_steps(run)
    return read_about(run, steps[-1]) if steps else {}


def _training(weights: Path, recorded: dict[str, Any]) -> dict[str, str]:
    found = {"weights": f"`{weights}`"}
    if recorded:
        config = recorded["config"]
        found["method"] = "distillation" if "teacher_run" in config else "DINOv2 pretraining"
        found["steps"] = f"{recorded['step']:,}"
        if changes := recorded.get("changes"):
            found["changed on the way"] = told_changes(changes)
        found["settings"] = f"`{json.dumps(config, sort_keys=True)}`"
    return found


def _metadata(facts: DataFacts, about: dict[str, str]) -> dict[str, str]:
    """What also goes into the weight file: it may be parted from its card."""
    return {"manifest_digest": facts.digest, "recipe": facts.recipe, "licence": about["licence"]}
