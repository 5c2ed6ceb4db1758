"""Segmentation and depth: metrics by hand and by torchmetrics, and heads that learn on scenes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
from PIL import Image
from skimage.data import brick, grass, gravel, stereo_motorcycle
from torch import Tensor

from curation.errors import ConfigError
from embedder.encoder import LoadOptions
from embedder.encoders.torch_trunk import place
from embedder.feature_maps import FeatureModel, Layer, load_feature_model, with_mean
from pretrain.evaluation.datasets import DEPTH, SEGMENTATION, Layout, open_scenes
from pretrain.evaluation.dense import nearest
from pretrain.evaluation.depth import (
    DepthErrors,
    DepthSettings,
    depth,
    depth_errors,
    depth_loss,
    valid_pixels,
)
from pretrain.evaluation.segmentation import (
    Confusion,
    SegmentationSettings,
    segmentation,
    window_starts,
)
from pretrain.evaluation.targets import Scene
from tests.pretrain.evaluation.scenes import write_scenes

QUICK = {"augment": False, "batch_size": 8, "warmup_steps": 20, "learning_rate": 5e-3}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root / "train", 32, seed=0)
    write_scenes(root / "test", 12, seed=1)
    return root


@pytest.fixture(scope="module")
def lite() -> FeatureModel:
    return load_feature_model("lite-semantic", device="cpu")


def raw_colors() -> FeatureModel:
    """Mean colors of patches of 8 pixels, as if they were features of four layers."""

    def run(images: Tensor, layers: Sequence[int]) -> list[Layer]:
        return [with_mean(torch.nn.functional.avg_pool2d(images, 8)) for _ in layers]

    options = place(LoadOptions(device="cpu", precision="float32"))
    return FeatureModel("colors", "", "", 4, 8, 128, options, run)


def split(root: Path, layouts: dict[str, Layout]) -> tuple[list[Scene], list[Scene], Layout]:
    train, _ = open_scenes(str(root / "train"), "train", layouts)
    test, layout = open_scenes(str(root / "test"), "test", layouts)
    return train.scenes, test.scenes, layout


def segment_scenes(model: FeatureModel, root: Path, **changes: object) -> dict[str, float]:
    settings = {"head": "multiscale", "crop": 128, "steps": 100, "test_scales": (1.0,), **QUICK}
    train, test, layout = split(root, SEGMENTATION)
    return segmentation(model, train, test, layout, SegmentationSettings(**settings | changes))


def test_segmentation__learns_scenes_far_above_colors(lite: FeatureModel, scenes: Path) -> None:
    found, colors = (segment_scenes(model, scenes) for model in (lite, raw_colors()))
    _, test, _ = split(scenes, SEGMENTATION)
    constant = Confusion(4)
    for scene in test:
        truth = torch.from_numpy(scene.values())
        constant.add(truth, torch.ones_like(truth))
    assert found["classes"] == 4
    assert found["miou"] > 0.65
    assert found["miou"] > colors["miou"] + 0.25
    assert found["miou"] > constant.metrics()["miou"] + 0.4


@pytest.mark.slow
def test_segmentation__light_decoder_learns(lite: FeatureModel, scenes: Path) -> None:
    found = segment_scenes(lite, scenes, head="decoder", steps=30)
    assert found["miou"] > 0.5


@pytest.mark.slow
def test_segmentation__crops_drawn_anew(lite: FeatureModel, scenes: Path) -> None:
    found = segment_scenes(lite, scenes, steps=40, augment=True, test_scales=(1.0, 1.5))
    assert found["miou"] > 0.4


def test_segmentation__linear_on_real_textures(lite: FeatureModel, tmp_path: Path) -> None:
    """Mosaics of the photos of brick, grass and gravel of scikit-image: left halves teach."""
    photos = [np.stack([photo()] * 3, -1) for photo in (brick, grass, gravel)]
    for part, columns in (("train", slice(0, 256)), ("test", slice(256, 512))):
        write_mosaics(tmp_path / part, [photo[:, columns] for photo in photos])
    linear = {"head": "linear", "steps": 60, "crop": 256}
    found, colors = (segment_scenes(model, tmp_path, **linear) for model in (lite, raw_colors()))
    assert found["miou"] > 0.75
    assert found["miou"] > colors["miou"] + 0.2


def write_mosaics(root: Path, photos: list[np.ndarray]) -> None:
    rng = np.random.default_rng(len(str(root)))
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for i in range(8):
        tiles = rng.integers(3, size=(2, 2))
        image = np.block([[[window_of(photos[t], rng)] for t in row] for row in tiles])
        labels = np.kron(tiles, np.ones((128, 128), np.uint8)).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / f"{i}.png")
        Image.fromarray(labels).save(root / "labels" / f"{i}.png")


def window_of(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A window of 128 pixels, of equal mean: brightness must not tell the texture."""
    top, left = (int(rng.integers(side - 128 + 1)) for side in photo.shape[:2])
    window = photo[top : top + 128, left : left + 128].astype(np.float32)
    return (window - window.mean() + 128).clip(0, 255).astype(np.uint8)


def depth_of(model: FeatureModel, root: Path, **changes: object) -> dict[str, float]:
    settings = {"head": "lin4", "crop": (128, 128), "steps": 60, "bins": 64, **QUICK}
    train, test, layout = split(root, DEPTH)
    return depth(model, train, test, layout, DepthSettings(**settings | changes))


def constant_depth(root: Path) -> float:
    """Mean RMSE of the best constant: each test image's pixels against the training mean."""
    train, test, _ = split(root, DEPTH)
    mean = np.mean([scene.values().mean() for scene in train])
    return float(np.mean([np.sqrt(np.mean((scene.values() - mean) ** 2)) for scene in test]))


def test_depth__learns_scenes_far_above_colors(lite: FeatureModel, scenes: Path) -> None:
    found, colors = (depth_of(model, scenes) for model in (lite, raw_colors()))
    assert found["rmse"] < 0.6 * constant_depth(scenes)
    assert found["rmse"] < 0.75 * colors["rmse"]
    assert found["delta_1"] > colors["delta_1"] + 0.2


@pytest.mark.slow
def test_depth__learns_a_real_pair(lite: FeatureModel, tmp_path: Path) -> None:
    """The Middlebury motorcycle of scikit-image: columns of tiles teach, the others test."""
    left, _, disparity = stereo_motorcycle()
    known = np.isfinite(disparity)
    meters = np.where(known, 994.978 * 0.193001 / (np.where(known, disparity, 1) + 31.086), 0)
    for part, first in (("train", 0), ("test", 1)):
        write_tiles(tmp_path / part, left, meters.astype(np.float32), first)
    near = {"max_depth": 6.0, "steps": 150}
    found, colors = (depth_of(model, tmp_path, **near) for model in (lite, raw_colors()))
    assert found["rmse"] < 0.85 * constant_depth(tmp_path)
    assert found["rmse"] < colors["rmse"]


def write_tiles(root: Path, image: np.ndarray, meters: np.ndarray, first: int) -> None:
    (root / "images").mkdir(parents=True)
    (root / "depth").mkdir()
    for row in range(0, image.shape[0] - 127, 62):
        for column in range(128 * first, image.shape[1] - 127, 256):
            window = slice(row, row + 128), slice(column, column + 128)
            name = f"{row}-{column}"
            Image.fromarray(image[window]).save(root / "images" / f"{name}.png")
            np.save(root / "depth" / f"{name}.npy", meters[window])


# --- metrics ------------------------------------------------------------------------------------


def test_confusion__is_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (3, 40, 50), generator=generator)
    guess = torch.where(torch.rand(truth.shape, generator=generator) < 0.7, truth, 4 - truth)
    truth[0, :5] = 255
    ours = Confusion(7)  # classes 5 and 6 occur nowhere
    for t, g in zip(truth, guess, strict=True):
        ours.add(t, g)
    metric = torchmetrics.JaccardIndex("multiclass", num_classes=7, ignore_index=255)
    assert ours.metrics()["miou"] == pytest.approx(metric(guess, truth).item(), abs=1e-6)
    valid = truth != 255
    share = (guess == truth)[valid].double().mean().item()
    assert ours.metrics()["pixel_accuracy"] == pytest.approx(share)


def test_confusion__by_hand() -> None:
    ours = Confusion(3)
    ours.add(torch.tensor([0, 0, 1, 1, 255]), torch.tensor([0, 1, 1, 1, 0]))
    assert ours.metrics()["miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert ours.metrics()["mean_recall"] == pytest.approx((1 / 2 + 1) / 2)


def test_depth_errors__by_hand_and_by_torchmetrics() -> None:
    truth, guess = np.array([1.0, 2.0, 4.0], np.float32), np.array([1.2, 2.0, 3.0], np.float32)
    found = depth_errors(truth, guess)
    assert found["rmse"] == pytest.approx(np.sqrt((0.04 + 0 + 1) / 3), rel=1e-6)
    assert found["abs_rel"] == pytest.approx((0.2 + 0 + 0.25) / 3, rel=1e-6)
    assert found["delta_1"] == pytest.approx(2 / 3)
    pair = torch.from_numpy(guess), torch.from_numpy(truth)
    rmse = torchmetrics.MeanSquaredError(squared=False)(*pair).item()
    relative = torchmetrics.MeanAbsolutePercentageError()(*pair).item()
    assert (found["rmse"], found["abs_rel"]) == pytest.approx((rmse, relative), rel=1e-6)
    both = DepthErrors()
    both.add(truth, guess)
    both.add(truth, truth)
    assert both.metrics()["rmse"] == pytest.approx(found["rmse"] / 2)


def test_valid_pixels__eigen_crop_and_range() -> None:
    truth = np.full((480, 640), 3.0, np.float32)
    truth[100, 100], truth[200, 200] = 0, 11
    inside = valid_pixels(truth, DepthSettings(), DEPTH["nyu"])
    assert inside.sum() == (471 - 45) * (601 - 41) - 2
    assert valid_pixels(truth, DepthSettings(), DEPTH["plain"]).sum() == 480 * 640 - 2


def test_depth_loss__vanishes_for_the_truth_alone() -> None:
    truth = 1 + 5 * torch.rand(2, 16, 16)
    assert depth_loss(truth, truth, DepthSettings()).item() < 1e-5
    assert depth_loss(2 * truth, truth, DepthSettings()).item() > 0.1
    truth[:, 4:9] = 0  # without depth: any guess is right there
    guess = truth.clone()
    guess[:, 4:9] = 7
    assert depth_loss(guess, truth, DepthSettings()).item() < 1e-5


def test_window_starts__cover_all_and_end_at_the_end() -> None:
    assert window_starts(512, 512) == [0]
    assert window_starts(700, 512) == [0, 188]
    starts = window_starts(2000, 518)
    assert starts[-1] == 2000 - 518
    assert all(b - a <= 345 for a, b in zip(starts, starts[1:], strict=False))


def test_nearest__takes_values_and_mixes_none() -> None:
    values = np.array([[0, 255], [3, 4]])
    assert nearest(values, 4, 4).tolist() == [[0, 0, 255, 255]] * 2 + [[3, 3, 4, 4]] * 2
    assert nearest(nearest(values, 4, 4), 2, 2).tolist() == values.tolist()


# --- layouts ------------------------------------------------------------------------------------


def picture(path: Path, value: int = 0, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), value).save(path)


def test_open_scenes__ade20k_voc_and_nyu(tmp_path: Path) -> None:
    for part in ("training", "validation"):
        picture(tmp_path / "ade" / "images" / part / "a.jpg")
        picture(tmp_path / "ade" / "annotations" / part / "a.png", 7)
    picture(tmp_path / "voc" / "JPEGImages" / "b.jpg")
    picture(tmp_path / "voc" / "SegmentationClass" / "b.png", 20)
    lists = tmp_path / "voc" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\n")
    (lists / "val.txt").write_text("b\n")
    picture(tmp_path / "nyu" / "room" / "rgb.jpg")
    picture(tmp_path / "nyu" / "room" / "depth.png", 2500, "I;16")
    (tmp_path / "nyu" / "nyu_test.txt").write_text("/room/rgb.jpg /room/depth.png 518.8\n")
    for name, layouts, split_name, value in (
        ("ade", SEGMENTATION, "train", 6),
        ("voc", SEGMENTATION, "test", 20),
        ("nyu", DEPTH, "test", 2.5),
    ):
        found, layout = open_scenes(str(tmp_path / name), split_name, layouts)
        (scene,) = found.scenes
        assert scene.values().shape == scene.pixels().shape[:2] == (4, 6)
        assert set(scene.values().flatten().tolist()) == {value}
        assert layout.eigen_crop == (name == "nyu")


def test_open_scenes__missing_data_says_what_is_expected_where(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no images to train there; expected ade20k: ROOT/") as e:
        open_scenes(str(tmp_path), "train", SEGMENTATION)
    assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match=r"holds no nyu images to test; expected ROOT/nyu_"):
        open_scenes(f"nyu:{tmp_path}", "test", DEPTH)
