import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
)

from pretrain.config import CropSettings
from pretrain.crops import (
    Pixels,
    brightness,
    contrast,
    crop_recipes,
    draw_box,
    hue,
    multi_crop,
    saturation,
)


def photo() -> Pixels:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((160, 120), Image.Resampling.BICUBIC))


def test_crop_recipes__blur_as_released_or_as_named() -> None:
    released = crop_recipes(CropSettings())
    assert [recipe.blur for recipe in released[:3]] == [0.0, 0.9, 0.5]
    nominal = crop_recipes(CropSettings(blur="nominal"))
    assert [recipe.blur for recipe in nominal[:3]] == [1.0, 0.1, 0.5]
    assert [recipe.solarize for recipe in nominal[:3]] == [0.0, 0.2, 0.0]
    assert len(released) == 10


def test_multi_crop__shapes_and_seed() -> None:
    recipes = crop_recipes(CropSettings(global_size=56, local_size=28, local_count=3))
    crops, again = (multi_crop(photo(), recipes, np.random.default_rng(5)) for _ in range(2))
    assert [crop.shape for crop in crops] == [(56, 56, 3)] * 2 + [(28, 28, 3)] * 3
    assert all(crop.dtype == np.uint8 for crop in crops)
    assert all(np.array_equal(a, b) for a, b in zip(crops, again, strict=True))


def test_color_changes__near_torchvision() -> None:
    pixels = photo()
    image = Image.fromarray(pixels)
    pairs = [
        (brightness(pixels, 1.3), adjust_brightness(image, 1.3)),
        (contrast(pixels, 0.6), adjust_contrast(image, 0.6)),
        (saturation(pixels, 1.2), adjust_saturation(image, 1.2)),
        (hue(pixels, -0.08), adjust_hue(image, -0.08)),
    ]
    for ours, theirs in pairs:
        difference = np.abs(ours.astype(int) - np.asarray(theirs, int))
        assert difference.mean() < 1.5


def test_draw_box__inside_and_within_scale() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, width, height = draw_box(160, 120, (0.32, 1.0), rng)
        assert 0 <= left <= 160 - width
        assert 0 <= top <= 120 - height
    assert draw_box(1000, 10, (0.9, 1.0), rng)[2:] == (13, 10)


def test_normalize__is_imagenet() -> None:
    from pretrain.batch import normalize

    gray = normalize(torch.full((3, 1, 1), 255, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(gray, torch.tensor([2.2489, 2.4286, 2.64]), rtol=1e-4, atol=1e-4)
