"""The card of an exported model: what it is, what it learned from, how to load it."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from curation import storage
from curation.dataset import Dataset
from embedder.vit import VisionTransformer
from pipelines.audit.markdown import as_code, as_text
from pipelines.audit.work_folder import WorkFolder

UNKNOWN = "unknown"
_LICENSES_SHOWN = 20
_LOADING = {
    "safetensors": "from embedder.checkpoint import load_backbone\n"
    'model = load_backbone("{out}/model.safetensors")',
    "onnx": "import onnxruntime\n"
    'session = onnxruntime.InferenceSession("{out}/model.onnx")\n'
    'cls, *_, patches = session.run(None, {{"images": images}})  # (B, 3, h, w), any size',
    "huggingface": "from transformers import AutoModel, AutoImageProcessor\n"
    'model = AutoModel.from_pretrained("{out}")\n'
    'processor = AutoImageProcessor.from_pretrained("{out}")',
    "timm": 'import timm\nmodel = timm.create_model("local-dir:{out}", pretrained=True)',
}
_LIBRARIES = {
    "safetensors": "pytorch",
    "onnx": "onnx",
    "huggingface": "transformers",
    "timm": "timm",
}
_POSITIONS = {
    "huggingface": "`transformers` interpolates positions of models without registers without the "
    "offset of 0.1 of the public code: away from {side} px its features differ a little.",
    "timm": "`timm` interpolates positions of models without registers with antialiasing and "
    "without the offset of 0.1 of the public code: away from {side} px its features differ a "
    "little. It has no mask token.",
}


@dataclass(frozen=True)
class DataFacts:
    """What a model learned from, as far as it is known."""

    path: str = UNKNOWN
    digest: str = UNKNOWN
    images: int | None = None
    recipe: str = UNKNOWN
    listed: int | None = None
    """Rows that the recipe began with."""
    sets: Counter[str] = field(default_factory=Counter)
    """Images by set."""
    licenses: Counter[str] = field(default_factory=Counter)
    """Images by license, `unknown` for those without one."""


def data_facts(path: str | None, recorded: dict[str, Any] | None = None) -> DataFacts:
    """Gather what a work folder, a manifest or packed shards say of themselves.

    recorded: what the run's checkpoint says of its data, for what is not there any more.
    """
    recorded = recorded or {}
    path = path or recorded.get("path")
    places = [] if path is None else [path.rstrip("/"), path.rstrip("/").rpartition("/")[0]]
    work = next((WorkFolder(place) for place in places if WorkFolder.is_one(place)), None)
    if work is not None and work.manifest is not None:
        record, dataset = work.record, work.manifest
        entries = [record.pool[0], *(record.sets[name][0] for name in record.as_is)]
        listed = sum(entry.record.rows_in for entry in entries)
        recipe = f"{record.recipe} ({record.recipe_file}), seed {record.seed}"
        return _facts(str(path), dataset, recipe, listed)
    if path is not None and Dataset.is_finished(path):
        return _facts(path, Dataset.open(path), UNKNOWN, None)
    digest = recorded.get("content_digest") or UNKNOWN
    return DataFacts(str(path or UNKNOWN), digest, recorded.get("images"))


def _facts(path: str, dataset: Dataset, recipe: str, listed: int | None) -> DataFacts:
    counters: dict[str, Counter[str]] = {"source_set": Counter(), "license": Counter()}
    present = [name for name in counters if name in dataset.columns]
    for index in range(dataset.num_shards if present else 0):
        table = dataset.read_shard(index, present)
        for name in present:
            for pair in table[name].value_counts().to_pylist():
                counters[name][str(pair["values"] or UNKNOWN)] += pair["counts"]
    return DataFacts(
        path,
        dataset.manifest.content_digest,
        dataset.num_rows,
        recipe,
        listed,
        counters["source_set"],
        counters["license"],
    )


def model_card(
    model: VisionTransformer, format: str, out: str, facts: DataFacts, about: dict[str, str]
) -> str:
    """Write the card as Markdown, with the fields that model hubs read in front.

    about: lines on the training run; `license` is that of the weights.
    """
    config = model.config
    parameters = sum(weight.numel() for weight in model.parameters())
    head = f"{config.registers} registers" if config.registers else "no registers"
    rest = {name: value for name, value in about.items() if name != "license"}
    lines = [
        "---",
        _head("license", about.get("license", UNKNOWN)),
        f"library_name: {_LIBRARIES[format]}",
        "pipeline_tag: image-feature-extraction",
        "tags: [dinov2, self-supervised, curate]",
        "---",
        f"# {as_text(Path(out).name)}\n",
        f"A DINOv2 vision transformer: {config.depth} blocks, width {config.width}, "
        f"{config.heads} heads, patch {config.patch}, {head}, {parameters:,} parameters; positions "
        f"made for {config.image_size} px and interpolated elsewhere.\n",
        "## Load it\n",
        f"```python\n{_LOADING[format].format(out=_in_quotes(out))}\n```\n",
        f"Inputs: RGB, short side to {round(config.side * 256 / 224)}, center {config.side} px "
        f"(any multiple of {config.patch} works), ImageNet's mean and deviation.",
        *_positions(format, config.registers, config.image_size),
        "\n## Data\n",
        *_data_lines(facts),
        "\n## Training\n",
        *(f"- {as_text(name)}: {as_text(value)}" for name, value in rest.items()),
        "\n## Licenses\n",
        f"- weights: {as_text(about.get('license', UNKNOWN))}",
        *_license_lines(facts),
    ]
    return "\n".join(lines) + "\n"


def _head(name: str, text: str) -> str:
    """A line of the YAML in front, whatever the text holds."""
    return yaml.safe_dump({name: " ".join(text.split())}, width=1 << 20).strip()


def _in_quotes(text: str) -> str:
    """A text as it stands between the quotes of Python, with nothing that ends the code block."""
    return json.dumps(text)[1:-1].replace("`", "\\x60")


def _positions(format: str, registers: int, side: int) -> list[str]:
    if registers or format not in _POSITIONS:
        return []
    return ["", _POSITIONS[format].format(side=side)]


def told_changes(changes: list[dict[str, Any]]) -> str:
    """Say what a run went on with that it had not begun with."""
    return "; ".join(
        f"{one['setting']} was {one['before']} up to step {one['step']:,}, then {one['now']}"
        for one in changes
    )


def _data_lines(facts: DataFacts) -> list[str]:
    listed = "" if facts.listed is None else f", chosen from {facts.listed:,} listed"
    images = UNKNOWN if facts.images is None else f"{facts.images:,}"
    return [
        f"- data: {as_code(facts.path)}",
        f"- manifest digest: {as_code(facts.digest)}",
        f"- recipe: {as_text(facts.recipe)}",
        f"- images: {images}{listed}",
        *(
            f"- from {as_text(name)}: {count:,} images"
            for name, count in sorted(facts.sets.items())
        ),
    ]


def _license_lines(facts: DataFacts) -> list[str]:
    if not facts.licenses:
        return ["- images: unknown; the data names no licenses"]
    shown = facts.licenses.most_common(_LICENSES_SHOWN)
    lines = [f"- images under {as_text(name)}: {count:,}" for name, count in shown]
    left = len(facts.licenses) - len(shown)
    return lines + ([f"- and {left} licenses more"] if left else [])


def write_card(text: str, out: str) -> str:
    """Write README.md beside the weights."""
    path = storage.join(out, "README.md")
    storage.write_bytes(path, text.encode())
    return path
