"""`timm:NAME[:FILE]`: any image model of timm, without its classifier."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from embedder.checkpoint import UNKNOWN, license_of
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
from embedder.errors import EncoderError, foreign_weights
from embedder.feature_maps import FeatureModel, Layer, with_mean


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
    license = license_of(file) if file else str(known.get("license") or UNKNOWN)
    return TrunkEncoder(name, trunk, output_width(name, trunk), license)


def load_features(name: str, argument: str, options: LoadOptions) -> FeatureModel:
    """Load a model to look at its layers: blocks of a transformer, stages of others."""
    encoder = load(name, argument, options)
    model_name, _, file = argument.partition(":")
    placement, preprocessing = encoder.trunk.placement, encoder.trunk.preprocessing
    is_vit = model_name.startswith("vit_")
    model: Any = _create(name, model_name, file, options, dynamic=is_vit)
    model = model.eval().to(placement.device, placement.dtype)
    patch = model.patch_embed.patch_size[0] if is_vit else model.feature_info[-1]["reduction"]
    depth = len(model.blocks) if is_vit else len(model.feature_info)

    def run(images: Tensor, layers: Sequence[int]) -> list[Layer]:
        found = model.forward_intermediates(
            images,
            indices=sorted(set(layers)),
            norm=is_vit,
            output_fmt="NCHW",
            intermediates_only=True,
            **({"return_prefix_tokens": True} if is_vit else {}),
        )
        at = dict(zip(sorted(set(layers)), map(_as_layer, found), strict=True))
        return [at[layer] for layer in layers]

    return FeatureModel(
        name,
        encoder.space,
        encoder.license,
        depth,
        patch,
        preprocessing.size,
        placement,
        run,
        not is_vit,
        preprocessing.mean,
        preprocessing.std,
    )


def _as_layer(found: Any) -> Layer:
    if isinstance(found, tuple):
        maps, prefix = found
        return Layer(prefix[:, 0], maps) if prefix.shape[1] else with_mean(maps)
    return with_mean(found)


def _create(
    name: str, model_name: str, file: str, options: LoadOptions, *, dynamic: bool = False
) -> nn.Module:
    arguments: dict[str, Any] = {"dynamic_img_size": True} if dynamic else {}
    if file == RANDOM:
        with seeded_weights():
            return timm.create_model(model_name, num_classes=0, **arguments)
    if file:
        path = existing_file(name, file)
        model = timm.create_model(model_name, num_classes=0, **arguments)
        _fill(name, model, path)
        return model
    refuse_hub(name, options, "no file given")
    return timm.create_model(model_name, num_classes=0, pretrained=True, **arguments)


def _fill(name: str, model: nn.Module, path: Path) -> None:
    """Load weights into a model; those of a classifier may be left over, none may lack.

    Raises: EncoderError where the file is no checkpoint, or that of another model.
    """
    with foreign_weights(f"encoder {name!r}: cannot load {path}", EncoderError):
        keys = timm.models.load_checkpoint(model, str(path), strict=False, weights_only=True)
    lacking = keys.missing_keys if keys is not None else []
    if lacking:
        raise EncoderError(
            f"encoder {name!r}: {path} lacks {len(lacking)} of its weights, such as {lacking[0]}; "
            "it is a file of another model"
        )


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
