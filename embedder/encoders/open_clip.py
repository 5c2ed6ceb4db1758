"""`open_clip:MODEL/PRETRAINED`: the image tower of any model of open_clip."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor

from embedder.encoder import LoadOptions
from embedder.encoders.torch_trunk import (
    RANDOM,
    Preprocessing,
    ResizeKind,
    TorchTrunk,
    TrunkEncoder,
    output_width,
    place,
    refuse_hub,
    seeded_weights,
    weights_digest,
)
from embedder.errors import EncoderError, foreign_weights
from embedder.feature_maps import FeatureModel, Layer


def load(name: str, argument: str, options: LoadOptions) -> TrunkEncoder:
    """Load a model with weights from a file or by one of open_clip's tags."""
    model_name, _, weights = argument.partition("/")
    if model_name not in open_clip.list_models():
        raise EncoderError(f"encoder {name!r}: open_clip has no model {model_name!r}")
    if not weights:
        raise EncoderError(f"encoder {name!r}: expected open_clip:MODEL/PRETRAINED")
    placement = place(options)
    visual = _image_tower(name, model_name, weights, options)
    preprocessing = _preprocessing(name, visual.preprocess_cfg)
    trunk = TorchTrunk(visual, preprocessing, placement, weights_digest(visual))
    return TrunkEncoder(name, trunk, output_width(name, trunk), "that of the weights")


def load_features(name: str, argument: str, options: LoadOptions) -> FeatureModel:
    """Load a vision transformer of open_clip to look at its blocks; other towers show none.

    Raises: EncoderError for another kind of tower.
    """
    encoder = load(name, argument, options)
    model_name, _, weights = argument.partition("/")
    tower = _image_tower(name, model_name, weights, options).eval()
    if not hasattr(tower, "transformer"):
        raise EncoderError(f"encoder {name!r}: its tower is no vision transformer and shows none")
    placement, preprocessing = encoder.trunk.placement, encoder.trunk.preprocessing
    tower = tower.to(placement.device, placement.dtype)

    def run(images: Tensor, layers: Sequence[int]) -> list[Layer]:
        wanted = sorted(set(layers))
        found = tower.forward_intermediates(
            images,
            indices=wanted,
            normalize_intermediates=True,
            intermediates_only=True,
            output_extra_tokens=True,
        )
        maps, prefixes = found["image_intermediates"], found["image_intermediates_prefix"]
        parts = zip(wanted, prefixes, maps, strict=True)
        at = {layer: Layer(prefix[:, 0], plane) for layer, prefix, plane in parts}
        return [at[layer] for layer in layers]

    return FeatureModel(
        name,
        encoder.space,
        encoder.license,
        len(tower.transformer.resblocks),
        tower.patch_size[0],
        preprocessing.size,
        placement,
        run,
        True,
        preprocessing.mean,
        preprocessing.std,
    )


def _image_tower(name: str, model_name: str, weights: str, options: LoadOptions) -> Any:
    if weights == RANDOM:
        with seeded_weights():
            return open_clip.create_model(model_name, load_weights=False).visual
    if not Path(weights).is_file():
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        if weights not in tags:
            known = ", ".join(tags) or "none"
            raise EncoderError(f"encoder {name!r}: no file {weights}, nor a tag (known: {known})")
        refuse_hub(name, options, f"the weights {weights!r} are on a hub")
    with foreign_weights(f"encoder {name!r}: cannot load {weights}", EncoderError):
        return open_clip.create_model(model_name, pretrained=weights, weights_only=True).visual


def _preprocessing(name: str, config: dict[str, Any]) -> Preprocessing:
    """Translate open_clip's evaluation transform."""
    size = config["size"]
    sides = {size} if isinstance(size, int) else set(size)
    kinds: dict[str, ResizeKind] = {"shortest": "short_side", "squash": "squash"}
    kind = kinds.get(config["resize_mode"])
    if len(sides) > 1 or kind is None:
        raise EncoderError(f"encoder {name!r}: inputs of {config} are not supported")
    (side,) = sides
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Preprocessing(side, kind, side, config["interpolation"], mean, std)
