from pathlib import Path

import numpy as np
import pdqhash
import pytest
from PIL import Image

from curation.pdq import pdq
from embedder.images import decode_within

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"


def bits_of(phash):
    return np.unpackbits(np.frombuffer(bytes.fromhex(phash), np.uint8))


def noise(width, height, seed=0):
    cells = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    "size",
    [(512, 384), (384, 512), (90, 200), (64, 64), (129, 127), (700, 300), (40, 30)],
)
def test_pdq__is_the_reference_but_for_rounding(size):
    pixels = noise(*size)
    expected, quality = pdqhash.compute(pixels)
    found, found_quality = pdq(pixels)
    assert len(found) == 64
    assert (bits_of(found) != expected).sum() <= 2
    assert abs(found_quality - quality) <= 1


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the photos beside the project")
def test_pdq__photos_are_within_two_bits():
    for path in sorted(PHOTOS.glob("*.jpg"))[:60]:
        pixels = decode_within(path.read_bytes(), 512)
        expected, quality = pdqhash.compute(pixels)
        found, found_quality = pdq(pixels)
        assert (bits_of(found) != expected).sum() <= 2, path
        assert abs(found_quality - quality) <= 1, path


def test_pdq__a_flat_picture_has_no_quality():
    assert pdq(np.full((50, 60, 3), 77, np.uint8))[1] == 0
