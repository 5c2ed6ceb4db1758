"""`timm:NAME[:FILE]`: any image model of timm, without its classifier."""

import math
from collections.abc import Callable
from typing import Any

import timm
from timm.data.config import resolve_data_config
from torch import nn

from embedder.encoder import LoadOptions
from embedder.encoders.torch_trunk import (
    RANDOM,
    Preprocessing,
    ResizeKind,
    TorchTrunk,
    TrunkEncoder,
    existing_file,
    output_width,
    place,
    refuse_hub,
    seeded_weights,
    weights_digest,
)
from embedder.errors import EncoderError


def load(name: str, argument: str, options: LoadOptions) -> TrunkEncoder:
    """Load a model of timm with weights from a file, or from the hub where that is allowed."""
    model_name, _, file = argument.partition(":")
    if not timm.is_model(model_name):
        near = (
            ", ".join(timm.list_models(f"*{model_name.split('_')[0]}*")[:5]) or "timm.list_models()"
        )
        raise EncoderError(f"encoder {name!r}: timm has no model {model_name!r}; see {near}")
    placement = place(options)
    model = _create(name, model_name, file, options)
    resolve: Callable[..., dict[str, Any]] = resolve_data_config
    config = resolve({}, model=model)
    trunk = TorchTrunk(model, _preprocessing(name, config), placement, weights_digest(model))
    known: dict[str, Any] = vars(model).get("pretrained_cfg") or {}
    licence = str(known.get("license") or "unknown")
    return TrunkEncoder(name, trunk, output_width(name, trunk), licence)


def _create(name: str, model_name: str, file: str, options: LoadOptions) -> nn.Module:
    if file == RANDOM:
        with seeded_weights():
            return timm.create_model(model_name, num_classes=0)
    if file:
        path = existing_file(name, file)
        model = timm.create_model(model_name, num_classes=0)
        timm.models.load_checkpoint(model, str(path), strict=False)
        return model
    refuse_hub(name, options, "no file given")
    return timm.create_model(model_name, num_classes=0, pretrained=True)


def _preprocessing(name: str, config: dict[str, Any]) -> Preprocessing:
    """Translate timm's evaluation transform."""
    _, height, width = config["input_size"]
    mode = config.get("crop_mode", "center")
    if height != width or mode not in ("center", "squash"):
        raise EncoderError(f"encoder {name!r}: {height}x{width} {mode!r} inputs are not supported")
    resize_to = math.floor(height / config["crop_pct"])
    if mode == "squash" and resize_to != height:
        raise EncoderError(f"encoder {name!r}: squashed and cropped inputs are not supported")
    kind: ResizeKind = "squash" if mode == "squash" else "short_side"
    return Preprocessing(
        height,
        kind,
        resize_to,
        config["interpolation"],
        tuple(config["mean"]),
        tuple(config["std"]),
    )
