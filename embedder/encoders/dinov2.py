"""`dinov2:SIZE[:FILE]` and `dinov2:FILE`: our ViT with public weights or those of `curate`.

FILE is what `curate pretrain`, `distill` or `export` left, a released file, or a folder that
`transformers` or `timm` wrote. Without SIZE the architecture is the file's own, and images are seen
at 224 pixels, or at the size that it was trained at where that is less.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from embedder import checkpoint
from embedder.checkpoint import load_backbone
from embedder.encoder import LoadOptions
from embedder.encoders.torch_trunk import (
    RANDOM,
    Preprocessing,
    TorchTrunk,
    TrunkEncoder,
    digest_of,
    existing_file,
    place,
    refuse_hub,
    seeded_weights,
    weights_digest,
)
from embedder.errors import EncoderError
from embedder.feature_maps import FeatureModel, Layer
from embedder.vit import VisionTransformer, ViTConfig, vit_config

HUB = "https://dl.fbaipublicfiles.com/dinov2"
PUBLIC_LICENSE = "Apache-2.0 (public weights)"
_SIZE = re.compile(r"vit[tsblg](14|16)(_reg)?")
_RELEASED = re.compile(r"dinov2_vit[sblg]14(_reg4)?_pretrain\.pth")


class ClassToken(nn.Module):
    """A backbone that gives its class token only."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, D)."""
        cls: Tensor = self.backbone(images).cls
        return cls


def load(name: str, argument: str, options: LoadOptions) -> TrunkEncoder:
    """Load a DINOv2 backbone of a size such as vits14, vitl14 or vitg14_reg, or a file of one."""
    return encoder_of(open_backbone(name, argument, options), name, options, license_of(argument))


def encoder_of(
    backbone: VisionTransformer, name: str, options: LoadOptions, license: str
) -> TrunkEncoder:
    """Make an encoder of a backbone that is loaded already."""
    placement = place(options)
    preprocessing = preprocessing_of(name, backbone.config, options)
    trunk = TorchTrunk(ClassToken(backbone), preprocessing, placement, weights_digest(backbone))
    return TrunkEncoder(name, trunk, backbone.config.width, license)


def load_features(name: str, argument: str, options: LoadOptions) -> FeatureModel:
    """Load a backbone to look at its layers, after the final norm each."""
    return features_of(open_backbone(name, argument, options), name, options, license_of(argument))


def features_of(
    backbone: VisionTransformer, name: str, options: LoadOptions, license: str
) -> FeatureModel:
    """Look into a backbone that is loaded already."""
    placement = place(options)
    preprocessing = preprocessing_of(name, backbone.config, options)
    parts = {"weights": weights_digest(backbone), "preprocessing": asdict(preprocessing)}
    backbone.to(placement.device, placement.dtype)

    def run(images: Tensor, layers: Sequence[int]) -> list[Layer]:
        rows, columns = (side // backbone.config.patch for side in images.shape[2:])
        found = backbone.intermediate(images, layers)
        return [Layer(t.cls, t.patches.mT.reshape(len(images), -1, rows, columns)) for t in found]

    def run_raw(images: Tensor) -> Tensor:
        prenorm: Tensor = backbone(images).prenorm
        return prenorm[:, 1 + backbone.config.registers :]

    return FeatureModel(
        name,
        digest_of(**parts, precision=placement.precision),
        license,
        backbone.config.depth,
        backbone.config.patch,
        preprocessing.size,
        placement,
        run,
        run_raw=run_raw,
        run_attention=backbone.class_attention,
    )


def license_of(argument: str) -> str:
    """The license of what `SIZE[:FILE]` or FILE names; released files are known by their names."""
    size, _, rest = argument.partition(":")
    file = rest if _SIZE.fullmatch(size) else argument
    if file == RANDOM:
        return "none (random weights)"
    if not file or _RELEASED.fullmatch(Path(file).name):
        return PUBLIC_LICENSE
    return checkpoint.license_of(file)


def preprocessing_of(name: str, config: ViTConfig, options: LoadOptions) -> Preprocessing:
    """The short side to 256/224 of the crop, then the middle.

    Raises: EncoderError where the size is no multiple of the patch.
    """
    side = options.image_size or config.side
    if side % config.patch:
        raise EncoderError(
            f"encoder {name!r}: {side} px are no multiple of its patch {config.patch}"
        )
    return Preprocessing(side, "short_side", round(side * 256 / 224), "bicubic")


def open_backbone(name: str, argument: str, options: LoadOptions) -> VisionTransformer:
    """Build the backbone that the argument of an encoder names.

    Raises: EncoderError for an unknown size, a missing or another file.
    """
    size, _, file = argument.partition(":")
    try:
        config = vit_config(size)
    except ValueError as error:
        if Path(argument).exists():
            return load_backbone(argument)
        raise EncoderError(
            f"encoder {name!r}: unknown size {error}; nor is there a file {argument}"
        ) from error
    return _backbone(name, config, file, size, options)


def _backbone(
    name: str, config: ViTConfig, file: str, size: str, options: LoadOptions
) -> VisionTransformer:
    if file == RANDOM:
        with seeded_weights():
            return VisionTransformer(config)
    path = _existing(name, file) if file else _fetch(name, size, options)
    backbone = load_backbone(path)
    if _shape(backbone.config) != _shape(config):
        raise EncoderError(f"encoder {name!r}: {path} is no {size} but {backbone.config}")
    return backbone


def _existing(name: str, path: str) -> Path:
    return Path(path) if Path(path).is_dir() else existing_file(name, path)


def _shape(config: ViTConfig) -> tuple[int, ...]:
    return config.width, config.depth, config.heads, config.patch, config.registers


def _fetch(name: str, size: str, options: LoadOptions) -> Path:
    """Return the public file from torch's cache, fetched first where that is allowed."""
    arch, _, registers = size.partition("_")
    file = f"dinov2_{arch}{registers and '_reg4'}_pretrain.pth"
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        refuse_hub(name, options, f"no file {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(f"{HUB}/dinov2_{arch}/{file}", str(path))
    return path
