"""Labeled sets as they come: bad images, unknown classes, the same images on both sides."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from curation.errors import ConfigError
from embedder.checkpoint import load_backbone, save_backbone
from embedder.vit import VisionTransformer, ViTConfig
from pretrain.config import KnnSettings
from pretrain.evaluation.knn import KnnProbe, evaluate, labeled_folder
from pretrain.evaluation.tasks import Request, run_task

TASKS = {
    "knn": ["k=[3]"],
    "linear": ["steps=3"],
    "logreg": ["max_iterations=3"],
    "retrieval": [],
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("backbone") / "b.safetensors"
    save_backbone(VisionTransformer(ViTConfig(24, 2, 3, patch=14, image_size=28)), file)
    return str(file)


def write(root: Path, count: int, classes: tuple[str, ...] = ("a", "b")) -> str:
    rng = np.random.default_rng(count)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return str(root)


def spoil(root: str) -> Path:
    file = Path(root) / "b" / "0.png"
    file.write_bytes(file.read_bytes()[:60])
    return file


def run(task: str, backbone: str, train: str, test: str) -> dict[str, float]:
    request = Request(task, backbone, train, test, device="cpu", changes=TASKS[task])
    result = run_task(request)
    return {**result.metrics, "num_test": result.num_test, "num_train": result.num_train}


@pytest.mark.parametrize("task", TASKS)
def test_run_task__a_bad_image_among_many_is_left_out_and_named(
    task: str, backbone: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, test = write(tmp_path / "train", 8), write(tmp_path / "test", 60)
    bad = spoil(test)
    found = run(task, backbone, train, test)
    assert (found["num_train"], found["num_test"], found["bad_images"]) == (16, 119, 1)
    assert str(bad) in caplog.text


@pytest.mark.parametrize("task", TASKS)
def test_run_task__many_bad_images_are_an_error_that_names_one(
    task: str, backbone: str, tmp_path: Path
) -> None:
    train, test = write(tmp_path / "train", 8), write(tmp_path / "test", 4)
    bad = spoil(test)
    with pytest.raises(ConfigError, match="1 of 8 images there; at most 1% may be left out") as e:
        run(task, backbone, train, test)
    assert str(e.value).startswith(f"{bad}: ")


def test_evaluate__leaves_bad_images_out_of_both_sides(backbone: str, tmp_path: Path) -> None:
    train, test = write(tmp_path / "train", 60), write(tmp_path / "test", 60)
    whole = evaluate(backbone, labeled_folder(train), labeled_folder(test), k=(3,))
    spoil(train)
    spoil(test)
    found = evaluate(backbone, labeled_folder(train), labeled_folder(test), k=(3,))
    assert (found["train"], found["test"], found["bad_images"]) == (119, 119, 2)
    assert whole["bad_images"] == 0
    assert found["knn_3"] == pytest.approx(whole["knn_3"], abs=0.05)


def test_knn_probe__bad_images_are_left_out_or_refused_before_training(
    backbone: str, tmp_path: Path
) -> None:
    train, test = write(tmp_path / "train", 8), write(tmp_path / "test", 60)
    few = write(tmp_path / "few", 4)
    spoil(test)
    spoil(few)
    probe = KnnProbe(KnnSettings(train=train, test=test, k=3))
    assert 0 <= probe.accuracy(load_backbone(backbone)) <= 1
    with pytest.raises(ConfigError, match="1 of 8 images there"):
        KnnProbe(KnnSettings(train=train, test=few))


@pytest.mark.parametrize("task", ["knn", "linear", "logreg"])
def test_run_task__no_class_in_common_is_an_error(task: str, backbone: str, tmp_path: Path) -> None:
    train, test = write(tmp_path / "train", 8), write(tmp_path / "test", 4, ("zebra",))
    with pytest.raises(ConfigError, match=r"no test class \(zebra\) is a training class \(a, b\)"):
        run(task, backbone, train, test)


@pytest.mark.parametrize("task", TASKS)
def test_run_task__counts_unknown_classes_and_shared_images(
    task: str, backbone: str, tmp_path: Path
) -> None:
    train = write(tmp_path / "train", 8)
    test = write(tmp_path / "test", 4, ("b", "zebra"))
    (tmp_path / "test" / "a").symlink_to(tmp_path / "train" / "a")
    found = run(task, backbone, train, test)
    assert (found["unknown_class_images"], found["shared_images"]) == (4, 8)


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("knn", "k=[0]"),
        ("knn", "k=[-1]"),
        ("knn", "k=[]"),
        ("linear", "layers=[0]"),
        ("linear", "layers=[]"),
        ("linear", "pooling=[]"),
        ("linear", "learning_rates=[]"),
        ("linear", "learning_rates=[-1.0]"),
        ("retrieval", "precisions=[0]"),
    ],
)
def test_run_task__settings_that_cannot_be(task: str, change: str) -> None:
    with pytest.raises(ConfigError, match=change.partition("=")[0]) as error:
        run_task(Request(task, "b", "train", "test", changes=[change]))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA works here")
def test_run_task__cuda_without_a_driver_is_one_line(backbone: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device cuda: CUDA does not work here"):
        run_task(Request("knn", backbone, str(tmp_path), str(tmp_path), device="cuda"))
