import numpy as np
import pytest

from embedder.edits import EDITS, random_edit


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", EDITS)
def test_edits__change_the_picture_the_same_way_every_time(name: str) -> None:
    edited = EDITS[name](picture(), np.random.default_rng(1))
    again = EDITS[name](picture(), np.random.default_rng(1))
    assert edited.dtype == np.uint8
    assert np.array_equal(edited, again)
    assert edited.shape != picture().shape or (edited != picture()).any()


def test_edits__sizes() -> None:
    assert EDITS["crop_80"](picture(), np.random.default_rng(0)).shape == (32, 48, 3)
    assert EDITS["half_size"](picture(), np.random.default_rng(0)).shape == (20, 30, 3)


def test_random_edit__many_seeds_give_pictures() -> None:
    for seed in range(30):
        edited = random_edit(picture(), np.random.default_rng(seed))
        assert edited.ndim == 3
        assert edited.shape[2] == 3
