"""Edits that make copies of a picture: for fitting a copy encoder and for measuring one.

Pixels are uint8 (H, W, 3); every edit takes (pixels, rng) and returns new pixels.
"""

import io
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from embedder.images import Pixels

Edit = Callable[[Pixels, Generator], Pixels]


def jpeg(pixels: Pixels, quality: int) -> Pixels:
    """Encode and decode as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def crop(pixels: Pixels, share: float, rng: Generator) -> Pixels:
    """Cut out a window with `share` of each side, anywhere."""
    height, width = (max(1, round(side * share)) for side in pixels.shape[:2])
    top = rng.integers(pixels.shape[0] - height + 1)
    left = rng.integers(pixels.shape[1] - width + 1)
    return pixels[top : top + height, left : left + width]


def scale(pixels: Pixels, factor: float) -> Pixels:
    """Resize both sides by a factor."""
    width, height = (max(1, round(side * factor)) for side in pixels.shape[1::-1])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def rotate(pixels: Pixels, degrees: float) -> Pixels:
    """Turn within the frame; the corners become black."""
    return np.asarray(Image.fromarray(pixels).rotate(degrees, Image.Resampling.BICUBIC))


def brighten(pixels: Pixels, factor: float) -> Pixels:
    """Multiply the brightness."""
    return np.asarray(ImageEnhance.Brightness(Image.fromarray(pixels)).enhance(factor))


def write_text(pixels: Pixels, rng: Generator, share: float = 0.12) -> Pixels:
    """Write a word across, with letters of `share` of the height."""
    image = Image.fromarray(pixels)
    font = ImageFont.load_default(max(8, round(image.height * share)))
    at = (image.width * rng.uniform(0, 0.3), image.height * rng.uniform(0.1, 0.8))
    ImageDraw.Draw(image).text(at, "SAMPLE TEXT", fill=_random_paint(rng), font=font)
    return np.asarray(image)


EDITS: Mapping[str, Edit] = MappingProxyType(
    {
        "jpeg_q30": lambda pixels, rng: jpeg(pixels, 30),
        "crop_80": lambda pixels, rng: crop(pixels, 0.8, rng),
        "half_size": lambda pixels, rng: scale(pixels, 0.5),
        "flip": lambda pixels, rng: np.ascontiguousarray(pixels[:, ::-1]),
        "brightness": lambda pixels, rng: brighten(pixels, float(rng.choice([0.7, 1.3]))),
        "text": lambda pixels, rng: write_text(pixels, rng),
        "rotation_5": lambda pixels, rng: rotate(pixels, float(rng.choice([-5, 5]))),
    }
)
"""The easy edits that a copy encoder is held to."""


def random_edit(pixels: Pixels, rng: Generator) -> Pixels:
    """Compose several edits of random strength, stronger and more varied than `EDITS`."""
    if rng.random() < 0.7:
        pixels = crop(pixels, rng.uniform(0.6, 1), rng)
    if rng.random() < 0.5:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    if rng.random() < 0.3:
        pixels = rotate(pixels, rng.uniform(-10, 10))
    if rng.random() < 0.3:
        pixels = write_text(pixels, rng, rng.uniform(0.06, 0.2))
    pixels = _random_color(pixels, rng)
    if rng.random() < 0.4:
        pixels = scale(pixels, rng.uniform(0.35, 0.9))
    return jpeg(pixels, int(rng.integers(20, 95)))


def strong_edit(pixels: Pixels, rng: Generator) -> Pixels:
    """Compose the edits that a copy may still be known by: what SSCD calls strong.

    A window of a quarter of the area or more, turns, borders, text and shapes above it, colors
    far off or none, a size down to 24 pixels, and JPEG down to quality 15.
    """
    if rng.random() < 0.8:
        pixels = crop_area(pixels, rng.uniform(0.25, 1), rng)
    if rng.random() < 0.5:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    if rng.random() < 0.25:
        pixels = rotate(pixels, rng.uniform(-30, 30))
    pixels = _random_color(pixels, rng, chance=0.6, change=(0.45, 1.7))
    for chance, edit in ((0.2, add_border), (0.3, _write_any_text), (0.15, draw_shapes)):
        if rng.random() < chance:
            pixels = edit(pixels, rng)
    if rng.random() < 0.5:
        least = min(1.0, 24 / min(pixels.shape[:2]))
        pixels = scale(pixels, max(least, math.exp(rng.uniform(math.log(0.2), 0))))
    return jpeg(pixels, int(rng.integers(15, 95)))


def crop_area(pixels: Pixels, share: float, rng: Generator) -> Pixels:
    """Cut out a window of `share` of the area, anywhere, its aspect up to a third off."""
    stretch = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    height, width = pixels.shape[:2]
    high = min(height, max(1, round(height * math.sqrt(share / stretch))))
    wide = min(width, max(1, round(width * math.sqrt(share * stretch))))
    top, left = rng.integers(height - high + 1), rng.integers(width - wide + 1)
    return pixels[top : top + high, left : left + wide]


def add_border(pixels: Pixels, rng: Generator) -> Pixels:
    """Put the picture on a plain ground, each border up to a quarter of its side."""
    image = Image.fromarray(pixels)
    borders = tuple(int(side * rng.uniform(0, 0.25)) for side in (*image.size, *image.size))
    return np.asarray(ImageOps.expand(image, borders, _random_paint(rng)))


def draw_shapes(pixels: Pixels, rng: Generator) -> Pixels:
    """Draw up to three filled ellipses or boxes, each side up to a third of the picture's."""
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 4)):
        wide, high = (side * rng.uniform(0.1, 0.35) for side in image.size)
        left, top = rng.uniform(0, image.width - wide), rng.uniform(0, image.height - high)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((left, top, left + wide, top + high), fill=_random_paint(rng))
    return np.asarray(image)


def _write_any_text(pixels: Pixels, rng: Generator) -> Pixels:
    return write_text(pixels, rng, rng.uniform(0.06, 0.25))


def _random_paint(rng: Generator) -> tuple[int, ...]:
    return tuple(int(value) for value in rng.integers(0, 256, 3))


def _random_color(
    pixels: Pixels, rng: Generator, chance: float = 0.4, change: tuple[float, float] = (0.6, 1.5)
) -> Pixels:
    image = Image.fromarray(pixels)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        if rng.random() < chance:
            image = enhance(image).enhance(rng.uniform(*change))
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
    return np.asarray(image)
