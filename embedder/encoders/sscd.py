"""`sscd:FILE`: the published TorchScript files of SSCD (Pizzi et al. 2022).

Images are squashed to 320 x 320, which fills batches; `sscd:288:FILE` sees them undistorted at a
short side of 288 pixels, one at a time. The authors name both.
"""

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
from embedder.encoders.torchscript import load_torchscript

_SQUASHED = Preprocessing(320, "squash", 320, "bilinear")
_WHOLE = Preprocessing(288, "whole", 288, "bilinear")
_PREPROCESSING = {"320": _SQUASHED, "288": _WHOLE}
THRESHOLDS = Thresholds(dedup=0.6, leak=0.45)
"""Those of the DINOv2 paper, section A.3 and A.2."""


def load(name: str, argument: str, options: LoadOptions) -> TrunkEncoder:
    """Load a TorchScript file that maps images to vectors."""
    placement = place(options)
    side, _, file = argument.partition(":")
    if side not in _PREPROCESSING:  # a path, which may hold colons
        side, file = "320", argument
    module = load_torchscript(existing_file(name, file))
    trunk = TorchTrunk(module, _PREPROCESSING[side], placement, weights_digest(module))
    return TrunkEncoder(name, trunk, output_width(name, trunk), "MIT", THRESHOLDS)
