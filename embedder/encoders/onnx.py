"""`onnx:FILE`: any ONNX file from images (B, 3, H, W) to vectors (B, D).

Pixels are resized to H x W, scaled to 0..1 and normalized with ImageNet's mean and deviation, or
with those that the file's metadata holds as JSON lists under the keys `mean` and `std`. A file that
takes any size, as `curate export` writes them, names the side of its inputs under `image_size`:
there the short side is resized to 256/224 of it, and the middle cut out, as the backbone's own
encoder does.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from embedder.checkpoint import license_in
from embedder.encoder import EncoderMemory, LoadOptions, Thresholds
from embedder.encoders.torch_trunk import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    check_device,
    digest_of,
    existing_file,
    texts_of,
)
from embedder.errors import EncoderError, foreign_weights
from embedder.images import Pixels
from embedder.rows import unit_rows

DEFAULT_BATCH_SIZE = 8
MAX_SIDE = 4096
MAX_BATCH_SIZE = 4096
BYTES_PER_INPUT = 64
"""What a session holds for each number of its input, roughly: 16 copies in float32."""


@dataclass(frozen=True, eq=False)
class OnnxEncoder:
    """An ONNX session with its preprocessing."""

    name: str
    parts: Mapping[str, str]
    space: str
    width: int
    batch_size: int
    preprocessing: Preprocessing
    session: Any
    memory: EncoderMemory
    license: str
    thresholds: Thresholds | None = None
    precision: str = "float32"

    @property
    def device(self) -> str:
        """Where it runs: cpu or cuda."""
        return "cuda" if self.session.get_providers()[0].startswith("CUDA") else "cpu"

    def preprocess(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) uint8 to (size, size, 3) uint8."""
        return self.preprocessing(pixels)

    def encode(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """(B, size, size, 3) uint8 to (B, D) unit rows."""
        mean = 255 * np.asarray(self.preprocessing.mean, np.float32)
        std = 255 * np.asarray(self.preprocessing.std, np.float32)
        images = ((batch - mean) / std).transpose(0, 3, 1, 2)  # (B, 3, size, size)
        (output,) = self.session.run(
            [self.session.get_outputs()[0].name],
            {self.session.get_inputs()[0].name: np.ascontiguousarray(images, np.float32)},
        )
        return unit_rows(output).astype(np.float32)


def load(name: str, argument: str, options: LoadOptions) -> OnnxEncoder:
    """Load an ONNX file; it runs on CUDA where onnxruntime has it."""
    path = existing_file(name, argument)
    providers = providers_of(name, options.device)
    with foreign_weights(f"encoder {name!r}: {path}: no ONNX file that runs here", EncoderError):
        session = open_session(path, providers)
        if (
            options.device.startswith("cuda")
            and session.get_providers()[0] == "CPUExecutionProvider"
        ):
            raise EncoderError(f"encoder {name!r}: onnxruntime finds no CUDA device here")
        metadata = session.get_modelmeta().custom_metadata_map
        batch, size = _input_shape(name, session, metadata, options.batch_size)
        width = _output_width(name, session)
        preprocessing = _preprocessing(size, metadata)
    weights = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    parts = {"weights": weights, "preprocessing": asdict(preprocessing)}
    space = digest_of(**parts)
    memory = EncoderMemory(2 * path.stat().st_size, BYTES_PER_INPUT * batch * 3 * size * size)
    license = license_in(metadata)
    return OnnxEncoder(
        name, texts_of(parts), space, width, batch, preprocessing, session, memory, license
    )


def providers_of(name: str, device: str) -> list[Any]:
    """What onnxruntime may run on, the best first.

    Raises: EncoderError for a CUDA device that it does not have.
    """
    check_device(device)
    on_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device.startswith("cuda") and not on_cuda:
        raise EncoderError(
            f"encoder {name!r}: onnxruntime has no CUDA here; pip install onnxruntime-gpu, or take "
            "device: auto"
        )
    if device == "cpu" or not on_cuda:
        return ["CPUExecutionProvider"]
    number = int(device.partition(":")[2] or 0)
    return [("CUDAExecutionProvider", {"device_id": number}), "CPUExecutionProvider"]


def open_session(path: Path, providers: list[Any]) -> Any:
    """Load a file into a session of one thread."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1  # several would change the bits; batches run side by side
    settings.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), settings, providers=providers)


def _output_width(name: str, session: Any) -> int:
    shape = session.get_outputs()[0].shape
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise EncoderError(f"encoder {name!r}: gives {shape}, expected (batch, width)")
    return shape[1]


def _preprocessing(size: int, metadata: Mapping[str, str]) -> Preprocessing:
    mean = _three_numbers(metadata.get("mean"), IMAGENET_MEAN)
    std = _three_numbers(metadata.get("std"), IMAGENET_STD)
    if "image_size" in metadata:
        return Preprocessing(size, "short_side", round(size * 256 / 224), "bicubic", mean, std)
    return Preprocessing(size, "squash", size, "bilinear", mean, std)


def _three_numbers(text: str | None, default: tuple[float, ...]) -> tuple[float, ...]:
    red, green, blue = default if text is None else json.loads(text)
    return float(red), float(green), float(blue)


def _input_shape(
    name: str, session: Any, metadata: Mapping[str, str], wanted: int | None
) -> tuple[int, int]:
    """Return batch size and side of the input; wanted: images a batch, where the file takes any."""
    shape = session.get_inputs()[0].shape
    batch = shape[0] if isinstance(shape[0], int) else wanted or DEFAULT_BATCH_SIZE
    is_square = len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3]
    if "image_size" in metadata and len(shape) == 4 and shape[1] == 3:
        side = int(metadata["image_size"])
    elif is_square and isinstance(shape[2], int):
        side = shape[2]
    else:
        raise EncoderError(f"encoder {name!r}: takes {shape}, expected (batch, 3, side, side)")
    if not (0 < side <= MAX_SIDE and 0 < batch <= MAX_BATCH_SIZE):
        raise EncoderError(f"encoder {name!r}: takes {batch} images of {side}x{side} pixels")
    return batch, side
