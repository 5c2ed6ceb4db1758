"""`dinov2:SIZE[:FILE]`: our ViT with the public weights or a checkpoint of `curate pretrain`."""

from pathlib import Path

import torch
from torch import Tensor, nn

from embedder.checkpoint import load_backbone
from embedder.encoder import LoadOptions
from embedder.encoders.torch_trunk import (
    RANDOM,
    Preprocessing,
    TorchTrunk,
    TrunkEncoder,
    existing_file,
    place,
    refuse_hub,
    seeded_weights,
    weights_digest,
)
from embedder.errors import EncoderError
from embedder.vit import VisionTransformer, ViTConfig, vit_config

HUB = "https://dl.fbaipublicfiles.com/dinov2"
PREPROCESSING = Preprocessing(224, "short_side", 256, "bicubic")
"""As the public k-NN evaluation; 224 is a multiple of both patch sizes."""


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
    """Load a DINOv2 backbone of a size such as vits14, vitl14 or vitg14_reg."""
    size, _, file = argument.partition(":")
    try:
        config = vit_config(size)
    except ValueError as error:
        raise EncoderError(f"encoder {name!r}: unknown size {error}") from error
    placement = place(options)
    backbone = _backbone(name, config, file, size, options)
    trunk = TorchTrunk(ClassToken(backbone), PREPROCESSING, placement, weights_digest(backbone))
    return TrunkEncoder(name, trunk, config.width, "Apache-2.0 (public weights)")


def _backbone(
    name: str, config: ViTConfig, file: str, size: str, options: LoadOptions
) -> VisionTransformer:
    if file == RANDOM:
        with seeded_weights():
            return VisionTransformer(config)
    path = existing_file(name, file) if file else _fetch(name, size, options)
    backbone = load_backbone(path)
    if _shape(backbone.config) != _shape(config):
        raise EncoderError(f"encoder {name!r}: {path} is no {size} but {backbone.config}")
    return backbone


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
