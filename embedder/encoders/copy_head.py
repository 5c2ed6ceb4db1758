"""The head of a copy encoder: a linear map of a frozen trunk's statistics, learned from copies.

`curate pretrain copy` leaves one in a file, with the trunk that it was learned on and the
thresholds that were measured; `copy:FILE` is the encoder, `lite-copy` the one that ships.

Legend: B images, D statistics, K dimensions.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from embedder.checkpoint import write_safetensors
from embedder.encoder import Thresholds
from embedder.encoders.torch_trunk import TorchTrunk, TrunkEncoder
from embedder.errors import EncoderError, foreign_weights
from embedder.whitening import Whitening

FILE_NAME = "copy.safetensors"
"""What a run leaves."""
KEY = "copy_head"
"""Name of what is no tensor in the file's metadata."""


@dataclass(frozen=True, eq=False)
class CopyHead:
    """What makes a copy encoder of a trunk."""

    projection: Whitening
    """Statistics to unit rows."""
    trunk: str
    """Name of the trunk, as `embedder.encoders.copies` opens it."""
    trunk_weights: str
    """Digest of the trunk's weights."""
    thresholds: Thresholds
    measured: Mapping[str, float] = field(default_factory=dict)
    """Recall and precision on images that were held out, at the threshold for duplicates."""

    def encoder(self, name: str, trunk: TorchTrunk, license: str) -> TrunkEncoder:
        """Put the head on its trunk.

        Raises: EncoderError where it was learned on another one.
        """
        if trunk.parts["weights"] != self.trunk_weights:
            raise EncoderError(
                f"encoder {name!r}: the head was learned on other weights than those of the trunk "
                f"{self.trunk!r}"
            )

        def pool(statistics: Tensor) -> NDArray[np.float32]:
            return self.projection.apply(statistics.cpu().numpy())

        digest = f"copy head {self.projection.digest}"
        width = self.projection.width
        return TrunkEncoder(name, trunk, width, license, self.thresholds, pool, digest)

    def save(self, path: Path) -> None:
        """Write it in half precision, whole or not at all."""
        about = {
            "trunk": self.trunk,
            "trunk_weights": self.trunk_weights,
            "thresholds": {"dedup": self.thresholds.dedup, "leak": self.thresholds.leak},
            "measured": dict(self.measured),
        }
        tensors = {
            "mean": torch.from_numpy(self.projection.mean).half(),
            "projection": torch.from_numpy(self.projection.projection).half().contiguous(),
        }
        write_safetensors(tensors, path, {KEY: json.dumps(about)})


def load_copy_head(path: Path) -> CopyHead:
    """Read a head.

    Raises: EncoderError where the file is none.
    """
    with (
        foreign_weights(f"{path}: no copy head of `curate pretrain copy`", EncoderError),
        safe_open(str(path), framework="pt") as file,
    ):
        about = json.loads(file.metadata()[KEY])
        mean, projection = (file.get_tensor(n).float().numpy() for n in ("mean", "projection"))
        thresholds = Thresholds(**about["thresholds"])
        head = CopyHead(
            Whitening(mean, projection),
            about["trunk"],
            about["trunk_weights"],
            thresholds,
            about["measured"],
        )
    if mean.ndim != 1 or projection.ndim != 2 or len(mean) != len(projection):
        raise EncoderError(f"{path}: a mean of {mean.shape} does not fit {projection.shape}")
    return head
