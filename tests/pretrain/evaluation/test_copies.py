import numpy as np

from pretrain.copy_config import HeldOutSettings
from pretrain.evaluation.copies import measure_copies


def unit(rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    return found


def views(images: int = 300, edits: int = 3, width: int = 16, noise: float = 0.1) -> np.ndarray:
    """Unit rows (N, 1 + E, K): the image, then its edits."""
    rng = np.random.default_rng(0)
    rows = np.repeat(unit(rng.normal(size=(images, 1, width))), 1 + edits, 1)
    rows[:, 1:] += noise * rng.normal(size=rows[:, 1:].shape)
    return unit(rows)


def settings(false_pairs: float, false_leaks: float, recall: float = 0.01) -> HeldOutSettings:
    return HeldOutSettings(recall=recall, false_pairs=false_pairs, false_leaks=false_leaks)


def test_measure_copies__every_pair_is_counted_once_from_each_side() -> None:
    rows = views()
    found = measure_copies(rows, settings(1e-3, 1e-2))
    strangers = np.array(
        [
            float(rows[i, 0] @ rows[j, view])
            for i in range(300)
            for j in range(300)
            if i != j
            for view in range(4)
        ]
    )
    own = np.einsum("nk,nvk->nv", rows[:, 0], rows[:, 1:])
    threshold = found.thresholds.dedup
    assert found.pairs == len(strangers)
    assert (strangers > threshold).mean() <= 1e-3 < (strangers > threshold - 0.01).mean()
    assert found.thresholds.leak < threshold
    assert np.isclose(found.false_pairs, (strangers > threshold).mean(), atol=2e-6)
    assert np.isclose(found.recall, (own > threshold).mean(), atol=1e-3)


def test_measure_copies__innocents_and_closest_are_of_unedited_images() -> None:
    rows = views(images=280, noise=0.0)
    rows[270] = rows[3]  # a true copy among images that should be unlike
    found = measure_copies(rows, settings(0.5, 0.6))
    assert found.closest[0][1:] == (3, 270)
    assert np.isclose(found.closest[0][0], 1, atol=1e-6)
    cosines = rows[:, 0] @ rows[:, 0].T
    np.fill_diagonal(cosines, -1)
    expected = (cosines.max(1) > found.thresholds.dedup).mean()
    assert np.isclose(found.innocents, expected, atol=1e-6)


def test_measure_copies__no_false_pair_allowed_is_above_the_closest() -> None:
    rows = views()
    found = measure_copies(rows, settings(1e-9, 1e-9))
    assert found.false_pairs == 0
    assert 0 < found.thresholds.dedup - found.closest[0][0] < 0.3


def test_measure_copies__recall_bounds_the_threshold() -> None:
    rows = views(noise=0.3)
    rows[270] = rows[3]
    found = measure_copies(rows, settings(1e-6, 1e-5, recall=0.9))
    own = np.einsum("nk,nvk->nv", rows[:, 0], rows[:, 1:])
    assert 0.9 <= found.recall < 0.93
    assert found.thresholds.dedup <= np.quantile(own, 0.1)
    assert found.false_pairs > 1e-6
