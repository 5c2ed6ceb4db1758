"""PDQ, the perceptual hash of pictures (Facebook, 2019), within 2 bits of the reference.

Luminance is blurred by two boxes of 1/128 of each side, sampled at 64 x 64 points, and transformed
by a cosine transform; a bit says whether one of the 16 x 16 lowest frequencies is above their
median. Two boxes in a row are one tent, so one separable filter does the reference's four passes.
"""

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from embedder.images import Pixels

_GRID = 64
_FREQUENCIES = 16

Floats = NDArray[np.float32]


def pdq(pixels: Pixels) -> tuple[str, int]:
    """PDQ hash (64 hex characters) and its quality, 0 (flat) to 100. pixels: (H, W, 3) sRGB."""
    samples = _sample(np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8))
    basis = _cosines()
    strengths = (basis @ samples @ basis.T).ravel()  # (256,)
    middle = np.partition(strengths, strengths.size // 2 - 1)[strengths.size // 2 - 1]
    bits = (strengths > middle)[::-1]  # the hash is written with its last bit first
    return np.packbits(bits).tobytes().hex(), _quality(samples)


def _sample(luminance: Pixels) -> Floats:
    """Blur and take 64 x 64 samples. luminance: (H, W)."""
    height, width = luminance.shape
    down, across = _tent(height), _tent(width)
    blurred = cv2.sepFilter2D(
        luminance,
        cv2.CV_32F,
        across,
        down,
        anchor=(_reach(width), _reach(height)),
        borderType=cv2.BORDER_REPLICATE,
    )
    samples = blurred[_points(height)[:, None], _points(width)]  # (64, 64)
    return np.asarray(samples, np.float32)


def _quality(samples: Floats) -> int:
    """How much there is to see: whole steps between neighbors, in percent of the range."""
    total = sum(
        np.abs(np.trunc(np.diff(samples, axis=axis) * np.float32(100 / 255))).sum()
        for axis in (0, 1)
    )
    return min(100, int(total / 90))


def _box(side: int) -> int:
    """Width of the box filter along a side."""
    return -(-side // (2 * _GRID))


def _reach(side: int) -> int:
    """Pixels that the tent reaches to the left of, or above, its point."""
    return 2 * (_box(side) - (_box(side) + 2) // 2)


@lru_cache(maxsize=1024)
def _tent(side: int) -> Floats:
    box = np.full(_box(side), 1 / _box(side), np.float32)
    return np.convolve(box, box)


@lru_cache(maxsize=1024)
def _points(side: int) -> NDArray[np.int64]:
    return ((np.arange(_GRID) + 0.5) * side / _GRID).astype(np.int64)


@lru_cache(maxsize=1)
def _cosines() -> Floats:
    """(16, 64): the lowest frequencies but the constant one."""
    frequencies = np.arange(1, _FREQUENCIES + 1)[:, None]
    angles = np.pi / (2 * _GRID) * frequencies * (2 * np.arange(_GRID) + 1)
    return np.asarray(np.sqrt(2 / _GRID) * np.cos(angles), np.float32)
