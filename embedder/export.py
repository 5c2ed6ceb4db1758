"""Write a backbone in the formats that others load."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embedder import peers
from embedder.checkpoint import (
    CONFIG_KEY,
    LICENSE_KEY,
    UNKNOWN,
    save_state,
    write_safetensors,
)
from embedder.encoders.torch_trunk import IMAGENET_MEAN, IMAGENET_STD
from embedder.errors import CheckpointError
from embedder.vit import VisionTransformer


def export_backbone(
    model: VisionTransformer, format: str, out: Path, about: Mapping[str, str] | None = None
) -> list[Path]:
    """Write the files of a format into a folder; give their paths.

    about: goes into the metadata of the weights, where the format has any; `license` is theirs.

    Raises:
        CheckpointError: an unknown format, or one that cannot hold this architecture.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format '{format}' is unknown; known: {', '.join(FORMATS)}")
    out.mkdir(parents=True, exist_ok=True)
    try:
        return FORMATS[format](model, out, dict(about or {}))
    except ValueError as error:
        raise CheckpointError(f"{out}: cannot be written for {format}: {error}") from error


def _safetensors(model: VisionTransformer, out: Path, about: dict[str, str]) -> list[Path]:
    path = out / "model.safetensors"
    weights = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    save_state(weights, model.config, path, about)
    return [path]


def _huggingface(model: VisionTransformer, out: Path, about: dict[str, str]) -> list[Path]:
    described = peers.huggingface_config(model.config)
    weights = {
        name: value.detach().cpu().contiguous()
        for name, value in peers.to_huggingface(model.state_dict()).items()
    }
    path = out / "model.safetensors"
    write_safetensors(weights, path, {"format": "pt", **_ours(model), **about})
    return [
        path,
        _write_json(out / "config.json", described),
        _write_json(out / "preprocessor_config.json", _processor(model.config.side)),
    ]


def _timm(model: VisionTransformer, out: Path, about: dict[str, str]) -> list[Path]:
    described = peers.timm_config(model.config, about.get(LICENSE_KEY, UNKNOWN))
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    path = out / "model.safetensors"
    write_safetensors(peers.to_timm(weights), path, {"format": "pt", **_ours(model), **about})
    return [path, _write_json(out / "config.json", described)]


def _onnx(model: VisionTransformer, out: Path, about: dict[str, str]) -> list[Path]:
    from embedder.onnx_export import export_onnx

    path = out / "model.onnx"
    return export_onnx(model, path, {**_ours(model), **about})


Writer = Callable[[VisionTransformer, Path, dict[str, str]], list[Path]]
FORMATS: dict[str, Writer] = {
    "safetensors": _safetensors,
    "onnx": _onnx,
    "huggingface": _huggingface,
    "timm": _timm,
}


def _ours(model: VisionTransformer) -> dict[str, str]:
    return {CONFIG_KEY: json.dumps(asdict(model.config))}


def _processor(side: int) -> dict[str, Any]:
    """What `transformers` does to an image before the model sees it."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side * 256 / 224)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def _write_json(path: Path, value: dict[str, Any]) -> Path:
    path.write_text(json.dumps(value, indent=2) + "\n")
    return path
