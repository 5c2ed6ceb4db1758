"""`copy:FILE` and `copy:RUN`: what `curate pretrain copy` left, on the trunk that it names.

Legend: B images, D statistics.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embedder.encoder import LoadOptions
from embedder.encoders import dinov2, lite
from embedder.encoders.copy_head import FILE_NAME, load_copy_head
from embedder.encoders.torch_trunk import (
    TorchTrunk,
    TrunkEncoder,
    existing_file,
    output_width,
    place,
    weights_digest,
)
from embedder.errors import EncoderError
from embedder.vit import VisionTransformer

LAYERS_READ = 4
"""Last blocks of a ViT whose tokens the statistics are of."""


def load(name: str, argument: str, options: LoadOptions) -> TrunkEncoder:
    """Load the head that a file or a run holds, and its trunk."""
    path = Path(argument) / FILE_NAME if Path(argument).is_dir() else Path(argument)
    head = load_copy_head(existing_file(name, str(path)))
    trunk, license = open_copy_trunk(head.trunk, options), license_of(head.trunk)
    return head.encoder(name, trunk, license)


def open_copy_trunk(name: str, options: LoadOptions) -> TorchTrunk:
    """Open what gives the statistics that copy heads are learned on.

    name: lite, or dinov2:FILE.

    Raises: EncoderError where there is no such trunk.
    """
    family, _, argument = name.partition(":")
    if name == "lite":
        return lite.load_trunk(options)
    if family != "dinov2" or not argument:
        raise EncoderError(f"trunk {name!r}: want lite, or dinov2:FILE")
    backbone = dinov2.open_backbone(name, argument, options)
    preprocessing = dinov2.preprocessing_of(name, backbone.config, options)
    return TorchTrunk(
        TokenStatistics(backbone), preprocessing, place(options), weights_digest(backbone)
    )


def license_of(trunk: str) -> str:
    """The license of a trunk's weights, which a head on them cannot loosen."""
    if trunk == "lite":
        return lite.LICENSE
    return dinov2.license_of(trunk.partition(":")[2])


class TokenStatistics(nn.Module):
    """Images to the class tokens and the means of the patch tokens of the last blocks."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, D)."""
        depth = self.backbone.config.depth
        layers = range(max(0, depth - LAYERS_READ), depth)
        found = self.backbone.intermediate(images, list(layers))
        return torch.cat([part for t in found for part in (t.cls, t.patches.mean(1))], 1)


class StatisticsEncoder(TrunkEncoder):
    """The statistics as they are, not scaled: what heads are learned on."""

    def __init__(self, trunk: TorchTrunk) -> None:
        super().__init__("copy-statistics", trunk, output_width("copy-statistics", trunk), "")

    def head(self, features: Tensor) -> NDArray[Any]:
        """(B, D), as they are."""
        return features.cpu().numpy().astype(np.float32)
