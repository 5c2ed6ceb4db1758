"""`sscd:FILE`: the published TorchScript files of SSCD (Pizzi et al. 2022)."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from embedder.encoder import LoadOptions, Thresholds
from embedder.encoders.torch_trunk import (
    Preprocessing,
    TorchTrunk,
    TrunkEncoder,
    existing_file,
    output_width,
    place,
    weights_digest,
)
from embedder.errors import EncoderError

PREPROCESSING = Preprocessing(320, "squash", 320, "bilinear")
"""320 x 320, skewed: the authors' batchable alternative to a short side of 288."""
THRESHOLDS = Thresholds(dedup=0.6, leak=0.45)
"""Those of the DINOv2 paper, section A.3 and A.2."""


def load(name: str, argument: str, options: LoadOptions) -> TrunkEncoder:
    """Load a TorchScript file that maps images to vectors."""
    placement = place(options)
    module = _read_script(existing_file(name, argument))
    trunk = TorchTrunk(module, PREPROCESSING, placement, weights_digest(module))
    return TrunkEncoder(name, trunk, output_width(name, trunk), "MIT", THRESHOLDS)


def _read_script(path: Path) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates TorchScript; the files are given
            load_script: Callable[..., nn.Module] = torch.jit.load
            return load_script(path, map_location="cpu")
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise EncoderError(f"{path}: no TorchScript file ({first})") from error
