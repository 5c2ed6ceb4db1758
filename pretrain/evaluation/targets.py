"""What scenes are measured against: label images and depth maps, read or refused by name.

Masks and depth maps are saved in many ways. What can only be meant in one way is read; for the rest
the error names the file and what it should hold.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curation.errors import ConfigError
from curation.sources.shards import image_file
from embedder.images import Pixels

IGNORED = 255
"""Label of pixels that count for nothing."""
MAX_CLASSES = 4096
"""Confusions are counted for every pair of classes; a higher number is no class but a mistake."""
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B")

Targets = NDArray[Any]


@dataclass(frozen=True)
class Scene:
    """An image with a target for each of its pixels."""

    path: Path
    target: Path
    read_target: Callable[[Path], Targets]
    """(H, W): int64 classes with `IGNORED`, or float32 depths in meters with 0 for none."""

    def pixels(self) -> Pixels:
        """(H, W, 3)."""
        return image_file(str(self.path)).pixels()

    def values(self) -> Targets:
        """(H, W)."""
        return self.read_target(self.target)

    def values_for(self, pixels: Pixels) -> Targets:
        """(H, W), for the image's own pixels.

        Raises:
            ConfigError: the target has another shape than the upright image.
        """
        values = self.values()
        if not same_shape(pixels.shape[:2], values.shape):
            high, wide = pixels.shape[:2]
            raise ConfigError(
                f"{self.target}: is {values.shape[1]} x {values.shape[0]} pixels, but its image "
                f"{self.path.name} is {wide} x {high} (upright, as its EXIF tag says): they are "
                "not of the same picture"
            )
        return values


def same_shape(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two sizes (height, width) show the same picture, but for its scale.

    A scaled side may be rounded either way, so it may be off by one pixel.
    """
    small, large = sorted((one, other))
    ratio = large[0] / small[0]
    return abs(small[1] - large[1] / ratio) <= 1


# --- classes ------------------------------------------------------------------------------------


def read_labels(path: Path) -> Targets:
    """Classes (H, W) int64 of a label image; 255 is ignored.

    Raises:
        ConfigError: not one channel of class numbers.
    """
    image = _open(path)
    if image.mode not in _LABEL_MODES:
        raise ConfigError(
            f"{path}: is an image of mode {image.mode}; a mask has one channel of class numbers"
        )
    labels = np.asarray(image).astype(np.int64)
    wrong = labels[(labels < 0) | (labels >= MAX_CLASSES)]
    if wrong.size:
        raise ConfigError(
            f"{path}: holds class {wrong[0]}; classes count from 0 to at most {MAX_CLASSES - 1}, "
            f"and {IGNORED} is for none"
        )
    return labels


def read_labels_from_1(path: Path) -> Targets:
    """Classes (H, W) int64 of a label image that counts from 1; 0 is ignored, as in ADE20K."""
    labels = read_labels(path)
    return np.where(labels == 0, IGNORED, labels - 1)


# --- depths -------------------------------------------------------------------------------------


def read_depth(path: Path, units_per_meter: float | None = None) -> Targets:
    """Depths (H, W) float32 in meters, 0 for none.

    units_per_meter: what a meter is in the file; by default as `usual_units` says.

    Raises:
        ConfigError: not one value a pixel, or values without a usual unit.
    """
    values = _depth_values(path)
    units = units_per_meter or _usual_units(values, path)
    return np.nan_to_num(values.astype(np.float64) / units, posinf=0, neginf=0).astype(np.float32)


def usual_units(path: Path) -> float:
    """Units a meter where nobody says: millimeters in 16-bit images, meters in all else."""
    return _usual_units(_depth_values(path), path)


def _usual_units(values: Targets, path: Path) -> float:
    if path.suffix == ".npy" or values.dtype.kind == "f":
        return 1.0
    if values.dtype.itemsize == 1:
        raise ConfigError(
            f"{path}: is an 8-bit image, which has no usual unit of depth; say how many units are "
            "a meter with --set units_per_meter=N"
        )
    return 1000.0


def _depth_values(path: Path) -> Targets:
    values = _read_array(path) if path.suffix == ".npy" else np.asarray(_open(path))
    if values.ndim != 2 or values.dtype.kind not in "uif":
        raise ConfigError(
            f"{path}: holds {values.dtype} values of shape {values.shape}; a depth map has one "
            "number a pixel, (height, width)"
        )
    return values


def _read_array(path: Path) -> Targets:
    try:
        array: Targets = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read as targets: {error}") from error
    return array


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: cannot be read as targets: {error}") from error
    return image
