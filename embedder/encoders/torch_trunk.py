"""Encoders that are torch modules: how they see pixels, where they run, in which precision.

Legend: B images, H W positions, D width.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from embedder.cpu import multiplies
from embedder.encoder import EncoderMemory, LoadOptions, Precision, Thresholds
from embedder.encoders.lane import CPU_BATCH_SIZE, Lane, largest_batch
from embedder.errors import EncoderError
from embedder.images import Pixels, center_crop, resize, resize_short_side
from embedder.rows import unit_rows

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


_DEVICES = r"auto|cpu|cuda(:\d+)?"
_ISAS_WITHOUT_BFLOAT16 = (
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"),
    *("AVX512_CORE", "AVX512_CORE_VNNI"),
)
"""Instruction sets that oneDNN, which multiplies for torch, can be held to by its environment."""
ResizeKind = Literal["squash", "short_side", "whole"]

_ACTIVATIONS_HELD = 4
_LONGEST = 4
"""Long side of an image that is seen whole, in short sides: more would take any memory."""


@dataclass(frozen=True)
class Preprocessing:
    """Pixels to a uint8 input; the device then subtracts `mean` and divides by `std`."""

    size: int
    """Side of the square input, in pixels."""
    resize: ResizeKind
    """squash: both sides to `size`. short_side: that to `resize_to`, and the middle cut out. whole:
    the same, but nothing is cut: inputs differ in shape."""
    resize_to: int
    filter: str
    """bilinear, bicubic, lanczos or box; antialiased."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of a pixel range of 0 to 1."""
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) to (size, size, 3), or whole to its own shape."""
        if self.resize == "squash":
            return resize(pixels, self.size, self.size, self.filter)
        if self.resize == "whole":
            height, width = (self._long_enough(side, pixels) for side in pixels.shape[:2])
            return resize(pixels, width, height, self.filter)
        scaled = resize_short_side(pixels, self.resize_to, self.filter)
        return center_crop(scaled, self.size, self.size)

    def _long_enough(self, side: int, pixels: Pixels) -> int:
        """A side's length where the shorter one gets `resize_to`; a strip is squashed."""
        return int(min(self.resize_to * side // min(pixels.shape[:2]), _LONGEST * self.resize_to))


@dataclass(frozen=True)
class Placement:
    """Where a module runs and how it multiplies."""

    device: torch.device
    dtype: torch.dtype
    compiled: bool = False
    """Whether torch compiles the module: other sums, so another space."""
    batch_size: int | None = None
    """Images a forward pass takes; None for what suits the device."""
    share: float = 1.0
    """Share of the device's memory that may be filled."""

    @property
    def precision(self) -> str:
        """float32, bfloat16 or float16."""
        return str(self.dtype).removeprefix("torch.")


def place(options: LoadOptions) -> Placement:
    """Choose the device and precision that the options leave open.

    Raises: EncoderError where the device is not there.
    """
    precision = options.precision
    if precision == "auto":
        precision = fastest_precision(options.device)
    return Placement(
        torch.device(_device_of(options.device)),
        getattr(torch, precision),
        options.compile,
        options.batch_size,
        options.device_share,
    )


def _device_of(wanted: str) -> str:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(wanted)
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise EncoderError(f"device {wanted!r}: torch sees no CUDA device here")
    return wanted


def check_device(name: str) -> None:
    """Refuse what is no name of a device.

    Raises: EncoderError.
    """
    if not re.fullmatch(_DEVICES, name):
        raise EncoderError(f"unknown device {name!r}; known are auto, cpu, cuda, cuda:N")


def fastest_precision(wanted: str) -> Precision:
    """What precision auto is here. wanted: a device, or auto.

    Raises: EncoderError where the device is not there.
    """
    device = _device_of(wanted)
    if not device.startswith("cuda"):
        return "bfloat16" if _cpu_multiplies_bfloat16() else "float32"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return "bfloat16"
    return "float16" if capability >= (7, 0) else "float32"


def _cpu_multiplies_bfloat16() -> bool:
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
    return allowed.upper() not in _ISAS_WITHOUT_BFLOAT16 and multiplies("bfloat16")


@contextmanager
def one_thread() -> Iterator[None]:
    """Let one thread compute: several would share the sums out, and change the bits."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchTrunk:
    """A torch module with its preprocessing, on a device."""

    def __init__(
        self,
        module: nn.Module,
        preprocessing: Preprocessing,
        placement: Placement,
        weights: str,
        *,
        casts_itself: bool = False,
    ) -> None:
        """weights: digest of the module's weights; casts_itself: the module takes float32."""
        self._module = module.eval().to(placement.device)
        self._input_dtype = torch.float32 if casts_itself else placement.dtype
        if not casts_itself:  # as a whole: autocast would cast the weights anew for every batch
            self._module.to(placement.dtype)
        if is_convolutional(module):
            self._module.to(memory_format=torch.channels_last)
        self.num_weights = sum(one.numel() for one in module.parameters())
        if placement.compiled:
            self._module.compile(dynamic=False)
        self.preprocessing = preprocessing
        self.placement = placement
        self._lane = Lane.to(placement.device)
        self.parts: dict[str, Any] = {
            "weights": weights,
            "preprocessing": asdict(preprocessing),
            "precision": placement.precision,
            **({"compiled": True} if placement.compiled else {}),
        }
        self.key = digest_of(**self.parts)
        self._mean = 255 * torch.tensor(preprocessing.mean, device=placement.device)[:, None, None]
        self._std = 255 * torch.tensor(preprocessing.std, device=placement.device)[:, None, None]

    @cached_property
    def batch_size(self) -> int:
        """B, fixed: as given, else one image of any shape, or as many as the memory holds."""
        if self.placement.batch_size is not None:
            return self.placement.batch_size
        if self.preprocessing.resize == "whole":  # few images share a shape
            return 1
        room = self._lane.room_bytes(self.placement.share)
        return CPU_BATCH_SIZE if room is None else largest_batch(self._peak_bytes, room)

    @cached_property
    def num_activation_bytes(self) -> int:
        """Most bytes that a batch takes on its way through the module, roughly.

        What a forward pass holds at once is a few of its largest intermediate results: the factor
        covers the modules tried (EfficientNet, ResNet, ViT; a test holds it against the truth).
        """
        largest = _Largest()  # type: ignore[no-untyped-call]
        with largest:
            self.run_empty(1)
        return _ACTIVATIONS_HELD * self.batch_size * largest.num_bytes

    def preprocess(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) uint8 to (size, size, 3) uint8, or to another shape if seen whole."""
        return self.preprocessing(pixels)

    def features(self, batch: NDArray[Any]) -> Tensor:
        """(B, size, size, 3) uint8 to the module's output, in float32 and on its device."""
        moved = self._lane.moved(torch.from_numpy(batch))
        with self._lane.turn(), one_thread(), torch.inference_mode():
            images = self._lane.arrived(moved).permute(0, 3, 1, 2)
            inputs = ((images.float() - self._mean) / self._std).to(self._input_dtype)
            output: Tensor = self._module(inputs)
            return output.float()

    def run_empty(self, count: int) -> Tensor:
        """Features of so many black images, without compiling anything for them."""
        side = self.preprocessing.size
        with torch.compiler.set_stance("force_eager"):
            return self.features(np.zeros((count, side, side, 3), np.uint8))

    def _peak_bytes(self, count: int) -> int | None:
        """Device memory that a batch of so many takes; None where it does not fit."""
        return self._lane.peak_bytes(lambda: self.run_empty(count))


@dataclass(frozen=True, eq=False)
class TrunkEncoder:
    """A trunk and the head that makes unit rows of its features."""

    name: str
    trunk: TorchTrunk
    width: int
    license: str
    thresholds: Thresholds | None = None
    pool: Callable[[Tensor], NDArray[Any]] | None = None
    """Features to (B, D) vectors; None where they are so already."""
    head_digest: str = ""
    """What tells this head from others on the same trunk."""

    @property
    def space(self) -> str:
        """Hex digest of weights, preprocessing, precision and head."""
        return digest_of(trunk=self.trunk.key, head=self.head_digest)

    @property
    def parts(self) -> dict[str, str]:
        """What the space is a digest of."""
        return texts_of({**self.trunk.parts, "head": self.head_digest})

    @property
    def precision(self) -> str:
        """float32, bfloat16 or float16."""
        return self.trunk.placement.precision

    @property
    def batch_size(self) -> int:
        """B, fixed."""
        return self.trunk.batch_size

    @property
    def device(self) -> str:
        """Where it runs: cpu, or cuda:N."""
        return str(self.trunk.placement.device)

    @property
    def memory(self) -> EncoderMemory:
        """What it holds in the memory of the host: weights come from files in float32."""
        return EncoderMemory(8 * self.trunk.num_weights, self.trunk.num_activation_bytes)

    def preprocess(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) uint8 to (size, size, 3) uint8."""
        return self.trunk.preprocess(pixels)

    def head(self, features: Tensor) -> NDArray[np.float32]:
        """Features of B images to (B, D) unit rows."""
        rows = features.cpu().numpy() if self.pool is None else self.pool(features)
        return unit_rows(rows).astype(np.float32)

    def encode(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """(B, size, size, 3) uint8 to (B, D) unit rows."""
        return self.head(self.trunk.features(batch))


def is_convolutional(module: nn.Module) -> bool:
    """Whether most of it is convolutions; a transformer has one, that of its patches."""
    kinds = [str(getattr(m, "original_name", type(m).__name__)) for m in module.modules()]
    return sum(kind.startswith("Conv2d") for kind in kinds) > 1


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the bytes of the largest result of any operation, in float32 at least."""

    num_bytes: int = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            size = result.numel() * max(4, result.element_size())
            self.num_bytes = max(self.num_bytes, size)
        return result


def digest_of(**parts: Any) -> str:
    """Hex digest of named JSON values."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def texts_of(parts: Mapping[str, Any]) -> dict[str, str]:
    """Named JSON values as texts."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in parts.items()
    }


def weights_digest(module: nn.Module) -> str:
    """Hex digest of a module's weights, by name, shape, type and value."""
    content = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        content.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()


def existing_file(name: str, path: str) -> Path:
    """Return the path of a weights file.

    Raises: EncoderError where there is none.
    """
    if not Path(path).is_file():
        raise EncoderError(f"encoder {name!r}: no file {path}")
    return Path(path)


def output_width(name: str, trunk: TorchTrunk) -> int:
    """Return D, found by one image.

    Raises: EncoderError where the module gives no (B, D) vectors.
    """
    side = trunk.preprocessing.size
    try:
        output = trunk.run_empty(1)
    except (RuntimeError, AttributeError) as error:
        first = str(error).strip().splitlines()[-1]
        raise EncoderError(f"encoder {name!r} fails on a {side}x{side} image: {first}") from error
    if output.ndim != 2:
        raise EncoderError(f"encoder {name!r} gives {tuple(output.shape)}, expected (1, D)")
    return output.shape[1]


RANDOM = "random"
"""Where a file is expected: weights drawn from a fixed seed, for tests and measuring speed."""


@contextmanager
def seeded_weights() -> Iterator[None]:
    """Let modules that are built inside draw the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def refuse_hub(name: str, options: LoadOptions, lacking: str) -> None:
    """Raise EncoderError unless weights may be fetched."""
    if not options.allow_hub:
        raise EncoderError(f"encoder {name!r}: {lacking}; give a file or allow the hub")
