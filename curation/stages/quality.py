"""Drops images that are too small, too narrow, blank or (if asked) blurred."""

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.image_filter import UNREADABLE, ImageFilter, luma_of
from curation.schema import schema_of
from curation.stage import Limit, Shard
from embedder.images import Pixels


class Quality(ImageFilter):
    """Judges sides, aspect ratio, contrast, entropy and sharpness; keeps all scores."""

    version = 3

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
    reasons = ("too_small", "aspect", "blank", "blurred", UNREADABLE)
    scores = ("contrast", "entropy", "sharpness")
    side = 256  # so that they mean the same for every image
    limits = (
        Limit("short_side", ">=", "min_side", "too_small"),
        Limit("aspect", "<=", "max_aspect", "aspect"),
        Limit("sharpness", ">=", "min_sharpness", "blurred"),
        Limit("entropy", ">=", "min_entropy", "blank"),
        Limit("contrast", ">=", "min_contrast", "blank"),
    )

    @property
    def looks_at_pixels(self) -> bool:
        """Whether any of their statistics is judged."""
        return not (self.min_contrast is self.min_entropy is self.min_sharpness is None)

    def required_columns(self) -> tuple[str, ...]:
        """The canonical image and the size of the original."""
        return (*super().required_columns(), "original_width", "original_height")

    def decision_columns(self) -> pa.Schema:
        """A score column a filter; pixel statistics are null where no pixel had to be looked at."""
        return schema_of(["short_side", "aspect", *self.scores])

    def judge_columns(self, shard: Shard) -> None:
        """Judge by the sizes first: what they drop is never decoded."""
        sides = np.stack([shard.array("original_width"), shard.array("original_height")])  # (2, N)
        short = sides.min(axis=0)
        sizes = {"short_side": short, "aspect": sides.max(axis=0) / np.maximum(short, 1)}
        for name, values in sizes.items():
            shard.note(name, values)
        self.judge_by_limits(shard, sizes)

    def measure(self, pixels: Pixels, opened: None) -> tuple[float, float, float]:
        """Contrast, entropy and sharpness of one image."""
        luma = luma_of(pixels)
        return float(luma.std(dtype=np.float64)), entropy_bits(luma), laplacian_variance(luma)


def entropy_bits(luma: np.ndarray) -> float:
    """Entropy of the histogram of 256 gray levels, in bits."""
    counts = np.bincount(luma.astype(np.uint8).ravel(), minlength=256)
    shares = counts[counts > 0] / luma.size
    return float(-(shares * np.log2(shares)).sum())


def laplacian_variance(luma: np.ndarray) -> float:
    """Variance of the 4-neighbor Laplacian over the inner pixels; low where edges are soft."""
    if min(luma.shape) < 3:
        return 0.0
    inner = luma[1:-1, 1:-1]
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float((around - 4 * inner).var(dtype=np.float64))
