"""Block masks for iBOT: rectangles of patches.

How many patches each crop hides is drawn for the whole batch; each crop's blocks are drawn from a
generator of its own, so that a process draws only the masks of its share.
"""

import math

import numpy as np
from numpy.typing import NDArray

from pretrain.config import MaskSettings

Mask = NDArray[np.bool_]

MIN_PATCHES = 4
MIN_ASPECT = 0.3


def draw_targets(
    crops: int, grid: int, settings: MaskSettings, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw how many patches each crop of a batch hides: (crops,), 0 for the unmasked.

    Of all crops, `probability` are masked; the i-th of them hides a share drawn from the i-th of
    equal steps between the two ratios; then the order is shuffled.
    """
    masked = int(crops * settings.probability)
    steps = np.linspace(*settings.ratio, masked + 1)
    shares = steps[:-1] + (steps[1:] - steps[:-1]) * rng.random(masked)
    targets = np.zeros(crops, np.int64)
    targets[:masked] = (grid * grid * shares).astype(np.int64)
    return targets[rng.permutation(crops)]


def block_mask(grid: int, target: int, rng: np.random.Generator) -> Mask:
    """Hide up to `target` patches of a grid by rectangles; never more, at times 1 to 3 fewer."""
    mask = np.zeros((grid, grid), bool)
    largest = max_block(grid)
    while (missing := target - int(mask.sum())) > 0:
        if not _add_block(mask, min(missing, largest), rng):
            break
    return mask


def max_block(grid: int) -> int:
    """Largest block in patches; the public code's `0.5 * S // P * S // P` for S = grid * P."""
    return grid // 2 * grid


def _add_block(mask: Mask, limit: int, rng: np.random.Generator) -> bool:
    """Try 10 times to hide between 1 and `limit` more patches."""
    grid = len(mask)
    for _ in range(10):
        area = MIN_PATCHES + (limit - MIN_PATCHES) * rng.random()
        aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w >= grid or h >= grid:
            continue
        top, left = rng.integers(grid - h + 1), rng.integers(grid - w + 1)
        block = mask[top : top + h, left : left + w]
        if 0 < block.size - int(block.sum()) <= limit:
            block[:] = True
            return True
    return False
