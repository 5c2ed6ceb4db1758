"""Drops images that are too small, too narrow, blank or (if asked) blurred."""

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.decoding import UNREADABLE, measure_images
from curation.schema import schema_of
from curation.stage import Resources, Shard, ShardStage, reject
from embedder.images import Pixels, decode_within

_SIDE = 256
"""Pixel statistics are taken at this size, so that they mean the same for every image."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


class Quality(ShardStage):
    """Judges sides, aspect ratio, contrast, entropy and sharpness; keeps all scores."""

    version = 2

    min_side: int | None = Field(64, ge=1)
    """Shortest side of the original, in pixels; smaller images are dropped as too_small. Null: they
    are not judged by it; so for all below."""
    max_aspect: float | None = Field(4.0, ge=1)
    """Longest side over shortest; narrower images are dropped for their aspect."""
    min_contrast: float | None = Field(4.0, ge=0)
    """Standard deviation of the luma (0-255); flatter images are blank."""
    min_entropy: float | None = Field(1.0, ge=0, le=8)
    """Entropy of the luma's histogram, in bits (0-8); lower images are blank."""
    min_sharpness: float | None = Field(None, ge=0)
    """Variance of the Laplacian of the luma at 256 pixels; lower images are blurred."""
    threads: int = Field(2, ge=1)
    """Rows decoded at once."""

    reasons = ("too_small", "aspect", "blank", "blurred", UNREADABLE)

    def required_columns(self) -> tuple[str, ...]:
        """The canonical image and the size of the original."""
        return ("image", "original_width", "original_height")

    def optional_columns(self) -> tuple[str, ...]:
        """Faces, which are blurred for every stage after the one that found them."""
        return ("boxes",)

    def decision_columns(self) -> pa.Schema:
        """A score column a filter; pixel statistics are null where no pixel had to be looked at."""
        return schema_of(["short_side", "aspect", "contrast", "entropy", "sharpness"])

    def resources(self) -> Resources:
        """What one shard's task needs."""
        return Resources(cpus=1, memory=1 << 30)

    def process(self, shard: Shard, opened: Any) -> None:
        """Judge by the sizes first: what they drop is never decoded."""
        short = np.minimum(shard.array("original_width"), shard.array("original_height"))
        shard.note("short_side", short)
        _judge(shard, short, self.min_side, "too_small")
        aspect = _aspect(shard)
        shard.note("aspect", aspect)
        if self.max_aspect is not None:
            shard.record_score(aspect, self.max_aspect)
            reject(shard, aspect > self.max_aspect, "aspect")
        contrast, entropy, sharpness = self._pixel_statistics(shard)
        _judge(shard, sharpness, self.min_sharpness, "blurred")
        _judge(shard, entropy, self.min_entropy, "blank")
        _judge(shard, contrast, self.min_contrast, "blank")

    def _pixel_statistics(self, shard: Shard) -> np.ndarray:
        """(3, N) contrast, entropy and sharpness, noted; NaN for rows that are not decoded."""
        scores = np.full((3, shard.num_rows), np.nan)
        if not (self.min_contrast is self.min_entropy is self.min_sharpness is None):
            decode = partial(decode_within, max_side=_SIDE)
            found = measure_images(shard, _statistics, threads=self.threads, decode=decode)
            for row, values in enumerate(found):
                if values is not None:
                    scores[:, row] = values
        for name, column in zip(("contrast", "entropy", "sharpness"), scores, strict=True):
            shard.note(name, column.astype(np.float32))
        return scores


def _judge(shard: Shard, scores: np.ndarray, lowest: float | None, reason: str) -> None:
    """Drop what scores below a bound; NaN never does."""
    if lowest is not None:
        shard.record_score(scores, lowest)
        reject(shard, scores < lowest, reason)


def _aspect(shard: Shard) -> np.ndarray:
    sides = np.stack([shard.array("original_width"), shard.array("original_height")])  # (2, N)
    ratios: np.ndarray = sides.max(axis=0) / np.maximum(sides.min(axis=0), 1)
    return ratios


def _statistics(pixels: Pixels) -> tuple[float, float, float]:
    """Contrast, entropy and sharpness of one image."""
    luma = np.rint(pixels @ _LUMA)  # (H, W)
    return float(luma.std(dtype=np.float64)), entropy_bits(luma), laplacian_variance(luma)


def entropy_bits(luma: np.ndarray) -> float:
    """Entropy of the histogram of 256 grey levels, in bits."""
    counts = np.bincount(luma.astype(np.uint8).ravel(), minlength=256)
    shares = counts[counts > 0] / luma.size
    return float(-(shares * np.log2(shares)).sum())


def laplacian_variance(luma: np.ndarray) -> float:
    """Variance of the 4-neighbour Laplacian over the inner pixels; low where edges are soft."""
    if min(luma.shape) < 3:
        return 0.0
    inner = luma[1:-1, 1:-1]
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float((around - 4 * inner).var(dtype=np.float64))
