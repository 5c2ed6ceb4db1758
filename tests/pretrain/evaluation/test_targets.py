"""Masks and depth maps in all the ways people save them: read as meant, or refused by name."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from curation.errors import ConfigError
from pretrain.evaluation.datasets import DEPTH, SEGMENTATION, Layout, open_scenes
from pretrain.evaluation.depth import DepthSettings, depth
from pretrain.evaluation.segmentation import Confusion, SegmentationSettings, segmentation
from pretrain.evaluation.targets import same_shape
from tests.pretrain.evaluation.test_dense import raw_colors

HIGH, WIDE = 36, 48
QUICK = {"augment": False, "batch_size": 2, "warmup_steps": 0}
Save = Callable[[np.ndarray, Path], None]


def masks() -> np.ndarray:
    """Classes 0, 1 and 2, and a stripe without a class."""
    mask = np.zeros((HIGH, WIDE), np.uint8)
    mask[:, 16:], mask[18:, 32:], mask[:2] = 1, 2, 255
    return mask


def depths() -> np.ndarray:
    return np.linspace(0.5, 8, WIDE, dtype=np.float32)[None].repeat(HIGH, 0)


def save(array: np.ndarray, path: Path) -> None:
    Image.fromarray(array).save(path)


def write(root: Path, kind: str, save_target: Save, target: np.ndarray, suffix: str = "png") -> str:
    """Four photos of colors that tell the class, and their targets."""
    (root / "images").mkdir(parents=True)
    (root / kind).mkdir()
    for i in range(4):
        pixels = np.stack([masks() * 90, masks() * 60, np.full((HIGH, WIDE), 50 * i)], -1)
        save(pixels.astype(np.uint8), root / "images" / f"{i}.png")
        save_target(target, root / kind / f"{i}.{suffix}")
    return str(root)


def labels(root: Path, save_target: Save = save, target: np.ndarray | None = None) -> str:
    return write(root, "labels", save_target, masks() if target is None else target)


def measured(task: Callable, layouts: dict[str, Layout], train: str, test: str, settings: object):
    taught, _ = open_scenes(train, "train", layouts)
    asked, layout = open_scenes(test, "test", layouts)
    return task(raw_colors(), taught.scenes, asked.scenes, layout, settings)


def miou(train: str, test: str, **changes: object) -> dict[str, float]:
    settings = SegmentationSettings(**{"crop": 32, "steps": 3, **QUICK, **changes})
    return measured(segmentation, SEGMENTATION, train, test, settings)


def refused(task: Callable, *paths: str, **changes: object) -> str:
    with pytest.raises(ConfigError) as error:
        task(*paths, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


WIDER = masks().astype(np.uint16)


# --- masks --------------------------------------------------------------------------------------


def save_palette(mask: np.ndarray, path: Path) -> None:
    image = Image.fromarray(mask).convert("P")
    image.putpalette([value * 37 % 256 for value in range(768)])
    image.putdata(mask.flatten().tolist())
    image.save(path)


@pytest.mark.parametrize(
    "save_target",
    [
        save,
        save_palette,
        lambda mask, path: save(mask.astype(np.uint16), path),
        lambda mask, path: save(mask[::2, ::2], path),
    ],
    ids=["plain", "palette", "16 bits", "half size"],
)
def test_segmentation__masks_that_mean_the_same(tmp_path: Path, save_target: Save) -> None:
    train = labels(tmp_path / "train", save_target)
    found = miou(train, train)
    assert found["classes"] == 3
    assert found["unseen_classes"] == 0
    assert found["ignored_share"] == pytest.approx(2 / HIGH, abs=0.01)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (np.where(masks() == 1, 255, 0).astype(np.uint8), r"the masks hold 1 class.*write 1"),
        (np.where(masks() == 255, 255, 0).astype(np.uint8), "the masks hold 1 class"),
        (np.full((HIGH, WIDE), 255, np.uint8), r"the masks hold 0 class.*\(100% of them"),
        (
            np.where(masks() == 255, 65535, masks().astype(int)).astype(np.uint16),
            "0.png: holds class 65535",
        ),
        (masks().T, r"0.png: is 36 x 48 pixels, but its image 0.png is 48 x 36"),
        (np.stack([masks()] * 3, -1), "0.png: is an image of mode RGB"),
        (np.stack([masks()] * 4, -1), "0.png: is an image of mode RGBA"),
    ],
    ids=["0 and 255", "one class", "all ignored", "65535", "turned", "RGB", "RGBA"],
)
def test_segmentation__masks_that_cannot_be_meant(
    tmp_path: Path, target: np.ndarray, says: str
) -> None:
    train = labels(tmp_path / "train")
    test = labels(tmp_path / "test", target=target)
    assert re.search(says, refused(miou, train, test))
    assert re.search(says, refused(miou, test, train))


def test_segmentation__a_photo_turned_by_exif_does_not_fit_its_stored_mask(tmp_path: Path) -> None:
    train = labels(tmp_path / "train")
    exif = Image.Exif()
    exif[0x112] = 6
    (tmp_path / "train" / "images" / "2.png").unlink()
    Image.new("RGB", (WIDE, HIGH)).save(tmp_path / "train" / "images" / "2.jpg", exif=exif)
    assert "2.png: is 48 x 36 pixels, but its image 2.jpg is 36 x 48" in refused(miou, train, train)


def test_segmentation__a_class_that_training_lacks_counts_as_0(tmp_path: Path) -> None:
    train = labels(tmp_path / "train")
    moved = np.where(masks() == 2, 7, masks()).astype(np.uint8)
    test = labels(tmp_path / "test", target=moved)
    found = miou(train, test)
    assert (found["classes"], found["unseen_classes"]) == (8, 1)


def test_confusion__a_hit_of_a_class_that_was_never_taught_is_chance() -> None:
    counted = Confusion(4)
    counted.add(torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 2, 0]))
    assert counted.metrics()["miou"] == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    # Class 2 counts 0; class 3, which neither truth nor guess has, is left out.
    assert counted.metrics(unseen=[2])["miou"] == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_segmentation__ade20k_with_a_class_too_many_names_the_layout(tmp_path: Path) -> None:
    for part in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / part).mkdir(parents=True)
        save(np.zeros((HIGH, WIDE, 3), np.uint8), tmp_path / "images" / part / "0.jpg")
        mask = np.where(masks() == 2, 151, 3).astype(np.uint8)
        save(mask, tmp_path / "annotations" / part / "0.png")
    assert "more than the 150 classes" in refused(miou, str(tmp_path), str(tmp_path))


def test_segmentation__bad_images_are_counted_and_many_are_an_error(tmp_path: Path) -> None:
    train = labels(tmp_path / "train")
    bad = tmp_path / "train" / "images" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    message = refused(miou, train, train)
    assert "1.png: cannot be decoded" in message
    assert "1 of 4" in message


def test_open_scenes__counts_images_without_a_mask(tmp_path: Path) -> None:
    train = labels(tmp_path / "train")
    (tmp_path / "train" / "labels" / "3.png").unlink()
    found, _ = open_scenes(train, "train", SEGMENTATION)
    assert (len(found.scenes), found.unpaired) == (3, 1)


def test_same_shape__allows_a_rounded_side() -> None:
    assert same_shape((36, 48), (18, 24))
    assert same_shape((375, 500), (188, 250))
    assert same_shape((100, 1), (50, 1))
    assert not same_shape((36, 48), (48, 36))
    assert not same_shape((36, 48), (18, 27))


# --- depth maps ---------------------------------------------------------------------------------


def rmse(train: str, test: str, **changes: object) -> dict[str, float]:
    settings = DepthSettings(**{"crop": (32, 32), "bins": 16, "steps": 3, **QUICK, **changes})
    return measured(depth, DEPTH, train, test, settings)


def depth_maps(
    root: Path, target: np.ndarray, save_target: Save = save, suffix: str = "png"
) -> str:
    return write(root, "depth", save_target, target, suffix)


def save_array(array: np.ndarray, path: Path) -> None:
    np.save(path, array)


def save_tiff(array: np.ndarray, path: Path) -> None:
    Image.fromarray(array).save(path, "TIFF")


def flawed(target: np.ndarray) -> np.ndarray:
    target = target.copy()
    target[:3], target[3:6], target[6:9], target[9:12] = np.nan, np.inf, -1, 0
    return target


@pytest.mark.parametrize(
    ("target", "save_target", "suffix", "units", "valid"),
    [
        ((depths() * 1000).astype(np.uint16), save, "png", None, 1),
        (depths(), save_array, "npy", None, 1),
        (flawed(depths()), save_array, "npy", None, 24 / 36),
        (depths(), save_tiff, "png", None, 1),
        (depths() * 1000, save_array, "npy", 1000.0, 1),
        ((depths() * 256).astype(np.uint16), save, "png", 256.0, 1),
        ((depths() * 25).astype(np.uint8), save, "png", 25.0, 1),
        ((depths()[::2, ::2] * 1000).astype(np.uint16), save, "png", None, 1),
    ],
    ids=["mm", "npy", "flawed", "float", "npy in mm", "KITTI", "8 bits", "half size"],
)
def test_depth__maps_that_mean_the_same(
    tmp_path: Path,
    target: np.ndarray,
    save_target: Save,
    suffix: str,
    units: float | None,
    valid: float,
) -> None:
    train = depth_maps(tmp_path / "train", target, save_target, suffix)
    scenes, _ = open_scenes(train, "train", DEPTH)
    found = rmse(train, train, units_per_meter=units)
    assert found["valid_share"] == pytest.approx(valid)
    assert np.isfinite(list(found.values())).all()
    assert 0.5 < found["rmse"] < 6
    if units is None:
        values = scenes.scenes[0].values()
        assert values[-1, -1] == pytest.approx(8, rel=0.05)
        assert found["units_per_meter"] == (1000 if target.dtype == np.uint16 else 1)
    else:
        assert found["units_per_meter"] == units


@pytest.mark.parametrize(
    ("target", "save_target", "suffix", "says"),
    [
        (depths() * 1000, save_array, "npy", "500 to 8000 m: set units_per_meter"),
        (np.zeros((HIGH, WIDE), np.uint16), save, "png", "no pixel is between 0.001 and 10 m"),
        (np.full((HIGH, WIDE), 60000, np.uint16), save, "png", "holds 60 to 60 m"),
        ((depths() * 25).astype(np.uint8), save, "png", "0.png: is an 8-bit image"),
        (
            depths()[..., None],
            save_array,
            "npy",
            "holds float32 values of shape (36, 48, 1)",
        ),
        (np.zeros((HIGH, WIDE, 3), np.uint8), save, "png", "0.png: holds uint8 values of shape"),
        ((depths() * 1000).astype(np.uint16).T, save, "png", "0.png: is 36 x 48 pixels"),
    ],
    ids=["mm as m", "zeros", "far", "8 bits", "a third axis", "RGB", "turned"],
)
def test_depth__maps_that_cannot_be_meant(
    tmp_path: Path, target: np.ndarray, save_target: Save, suffix: str, says: str
) -> None:
    train = depth_maps(tmp_path / "train", (depths() * 1000).astype(np.uint16))
    test = depth_maps(tmp_path / "test", target, save_target, suffix)
    assert says in refused(rmse, train, test)


def test_depth__scenes_without_depth_are_counted(tmp_path: Path) -> None:
    train = depth_maps(tmp_path / "train", depths(), save_array, "npy")
    np.save(tmp_path / "train" / "depth" / "0.npy", np.zeros((HIGH, WIDE), np.float32))
    found = rmse(train, train)
    assert found["scenes_without_depth"] == 1
    assert found["valid_share"] == pytest.approx(0.75)
