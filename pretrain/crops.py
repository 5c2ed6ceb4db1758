"""Multi-crop augmentation on 8-bit pixels; all draws come from the generator that is passed in.

The recipe is the public one (crop, flip, color jitter, gray, blur, solarize). Color work runs
on 8-bit tables and OpenCV kernels, and normalization is left to the device that trains.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pretrain.config import CropSettings

Pixels = NDArray[np.uint8]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
ASPECT = (3 / 4, 4 / 3)
JITTER = (0.4, 0.4, 0.2, 0.1)
"""Brightness, contrast, saturation, hue."""
GRAY = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class CropRecipe:
    """One kind of crop."""

    size: int
    """Side in pixels."""
    scale: tuple[float, float]
    """Share of the image's area."""
    blur: float
    """Probability of Gaussian blur."""
    solarize: float = 0.0
    """Probability of solarisation."""


def crop_recipes(settings: CropSettings) -> list[CropRecipe]:
    """Give the recipe of each crop of an image: the 2 global ones, then the local ones."""
    first, second = (0.0, 0.9) if settings.blur == "released" else (1.0, 0.1)
    size, scale = settings.global_size, settings.global_scale
    local = CropRecipe(settings.local_size, settings.local_scale, blur=0.5)
    return [
        CropRecipe(size, scale, first),
        CropRecipe(size, scale, second, solarize=0.2),
        *[local] * settings.local_count,
    ]


def multi_crop(pixels: Pixels, recipes: list[CropRecipe], rng: np.random.Generator) -> list[Pixels]:
    """Cut all crops of an image (H, W, 3): each (size, size, 3), uint8."""
    image = Image.fromarray(pixels)
    return [augment(random_resized_crop(image, recipe, rng), recipe, rng) for recipe in recipes]


def random_resized_crop(image: Image.Image, recipe: CropRecipe, rng: np.random.Generator) -> Pixels:
    """Cut a box of random area and aspect and scale it to the crop's size (bicubic)."""
    left, top, width, height = draw_box(image.width, image.height, recipe.scale, rng)
    box = (left, top, left + width, top + height)
    side = (recipe.size, recipe.size)
    return np.asarray(image.resize(side, Image.Resampling.BICUBIC, box=box))


def draw_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw (left, top, width, height); after 10 misses, the largest centered box that may be."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    aspect = min(max(width / height, ASPECT[0]), ASPECT[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - w) // 2, (height - h) // 2, w, h


def augment(pixels: Pixels, recipe: CropRecipe, rng: np.random.Generator) -> Pixels:
    """Flip, jitter colors, gray, blur and solarize, each with its probability."""
    if rng.random() < 0.5:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    if rng.random() < 0.8:
        pixels = jitter(pixels, rng)
    if rng.random() < 0.2:
        pixels = cv2.cvtColor(_gray(pixels), cv2.COLOR_GRAY2RGB)
    if rng.random() < recipe.blur:
        sigma = rng.uniform(0.1, 2.0)
        pixels = cv2.GaussianBlur(pixels, (9, 9), sigma)  # type: ignore[assignment]
    if rng.random() < recipe.solarize:
        pixels = cv2.LUT(pixels, _solarize_table())  # type: ignore[assignment]
    return pixels


def jitter(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Change brightness, contrast, saturation and hue, in random order."""
    factors = [rng.uniform(max(0.0, 1 - part), 1 + part) for part in JITTER[:3]]
    shift = rng.uniform(-JITTER[3], JITTER[3])
    steps: list[tuple[Callable[[Pixels, float], Pixels], float]] = [
        (brightness, factors[0]),
        (contrast, factors[1]),
        (saturation, factors[2]),
        (hue, shift),
    ]
    for index in rng.permutation(4):
        step, amount = steps[index]
        pixels = step(pixels, amount)
    return pixels


def brightness(pixels: Pixels, factor: float) -> Pixels:
    """Multiply by a factor."""
    return _blend_table(pixels, 0.0, factor)


def contrast(pixels: Pixels, factor: float) -> Pixels:
    """Move away from the image's mean gray."""
    mean = round(float(cv2.mean(_gray(pixels))[0]))
    return _blend_table(pixels, mean, factor)


def saturation(pixels: Pixels, factor: float) -> Pixels:
    """Move away from each pixel's gray: one 3x3 product."""
    matrix = factor * np.eye(3, dtype=np.float32) + (1 - factor) * GRAY
    return cv2.transform(pixels, matrix)  # type: ignore[return-value]


def hue(pixels: Pixels, shift: float) -> Pixels:
    """Turn the hue by a share of the circle."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(shift * 255) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)  # type: ignore[return-value]


def _gray(pixels: Pixels) -> Any:
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _blend_table(pixels: Pixels, anchor: float, factor: float) -> Pixels:
    table = anchor + factor * (np.arange(256, dtype=np.float32) - anchor)
    return cv2.LUT(pixels, table.clip(0, 255).astype(np.uint8))  # type: ignore[return-value]


@cache
def _solarize_table() -> Pixels:
    values = np.arange(256, dtype=np.uint8)
    return np.where(values < 128, values, 255 - values)
