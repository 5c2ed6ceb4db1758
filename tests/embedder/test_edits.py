import numpy as np
import pytest

from embedder.edits import EDITS, Edit, add_border, crop_area, random_edit, strong_edit


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


@pytest.mark.parametrize("edit", [random_edit, strong_edit])
@pytest.mark.parametrize("shape", [(40, 60, 3), (1, 200, 3), (3, 2, 3)])
def test_composed_edits__any_shape_gives_pictures(edit: Edit, shape: tuple[int, ...]) -> None:
    pixels = np.resize(picture(), shape)
    for seed in range(30):
        edited = edit(pixels, np.random.default_rng(seed))
        assert edited.dtype == np.uint8
        assert edited.shape[2] == 3
        assert min(edited.shape) >= 1


def test_crop_area__cuts_a_share_of_the_area() -> None:
    rng = np.random.default_rng(0)
    pixels = np.zeros((200, 300, 3), np.uint8)
    shares = [edited.shape[0] * edited.shape[1] / 60_000 for edited in
              (crop_area(pixels, 0.3, rng) for _ in range(20))]  # fmt: skip
    assert np.allclose(shares, 0.3, atol=0.01)
    assert crop_area(pixels, 1.0, rng).shape[0] <= 200


def test_add_border__keeps_the_picture_within() -> None:
    edited = add_border(picture(), np.random.default_rng(0))
    windows = np.lib.stride_tricks.sliding_window_view(edited, (40, 60, 3))
    assert (windows == picture()).all((3, 4, 5)).any()
