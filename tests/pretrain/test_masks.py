import numpy as np
import pytest

from pretrain.config import MaskSettings
from pretrain.masks import block_mask, draw_targets, max_block


def test_draw_targets__half_masked_between_the_ratios() -> None:
    targets = draw_targets(64, 16, MaskSettings(), np.random.default_rng(0))
    masked = targets[targets > 0]
    assert len(masked) == 32
    assert masked.min() >= 0.1 * 256 - 1
    assert masked.max() <= 0.5 * 256
    assert (targets[:32] > 0).any()
    assert (targets[32:] > 0).any()


@pytest.mark.parametrize(("grid", "target"), [(16, 128), (16, 30), (7, 20), (4, 5), (3, 1)])
def test_block_mask__never_more_and_rarely_fewer(grid: int, target: int) -> None:
    rng = np.random.default_rng(1)
    counts = np.array([block_mask(grid, target, rng).sum() for _ in range(200)])
    assert (counts <= target).all()
    if grid == 16:
        assert (counts >= target - 3).all()
        assert (counts == target).mean() > 0.8


@pytest.mark.parametrize(("grid", "patches"), [(16, 128), (14, 98), (37, 666)])
def test_max_block__public_values(grid: int, patches: int) -> None:
    assert max_block(grid) == patches
