"""`curate show` and `curate evaluate` as users run them, on a small backbone of our own."""

import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from curation.errors import ConfigError
from embedder.checkpoint import save_backbone
from embedder.errors import EncoderError
from embedder.vit import VisionTransformer, ViTConfig
from pipelines.cli.app import app
from tests.pretrain.small_runs import jpeg

CLI = CliRunner()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(24, 4, 3, patch=14, image_size=56, registers=2))
    path = tmp_path_factory.mktemp("model") / "backbone.safetensors"
    save_backbone(model, path)
    return str(path)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that color alone tells apart, in train and val."""
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 5)):
        for name, color in (("red", 0), ("green", 1), ("blue", 2)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (70, 80, 3), dtype=np.uint8)
                pixels[..., color] += 150
                Image.fromarray(pixels).save(root / part / name / f"{i}.jpg", quality=95)
    return root


def run(*words: object) -> str:
    result = CLI.invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def evaluated(task: str, classes: Path, encoder: str, *more: str) -> dict[str, float]:
    paths = ("--train", classes / "train", "--test", classes / "val", "--encoder", encoder)
    found: dict[str, float] = json.loads(run("evaluate", task, *paths, "--json", *more))
    return found


@pytest.mark.parametrize(
    ("task", "metric", "changes"),
    [
        ("knn", "knn_10", []),
        ("logreg", "logreg", ["--set", "strengths=[-2, 2, 3]"]),
        ("linear", "linear", ["--set", "steps=60", "--set", "views=2"]),
        ("retrieval", "map", []),
    ],
)
def test_evaluate__a_backbone_of_ours(
    classes: Path, backbone: str, tmp_path: Path, task: str, metric: str, changes: list[str]
) -> None:
    found = evaluated(task, classes, backbone, "--out", str(tmp_path / "results"), *changes)
    assert found[metric] > 0.9
    assert (found["train"], found["test"]) == (30, 15)
    (row,) = pq.read_table(found["result"]).to_pylist()
    assert dict(row["metrics"])[metric] == found[metric]
    assert (row["task"], row["num_test"]) == (task, 15)
    table = run("evaluate", "table", "--out", tmp_path / "results")
    assert "paper, ViT-L/14" in table


@pytest.mark.parametrize("task", ["knn", "linear", "logreg", "retrieval"])
def test_evaluate__stored_features_give_the_same_numbers(
    classes: Path, backbone: str, tmp_path: Path, task: str
) -> None:
    for part in ("train", "val"):
        command = ("--encoder", f"dinov2:{backbone}", "--out", tmp_path / part)
        run("embed", classes / part, *command)
    quick = {"linear": ["features=vectors", "steps=40"], "logreg": ["strengths=[-2, 2, 3]"]}
    changes = [word for change in quick.get(task, []) for word in ("--set", change)]
    from_images = evaluated(task, classes, backbone, *changes)
    from_stored = evaluated(task, tmp_path, backbone, *changes)
    same = {key: value for key, value in from_images.items() if key not in ("seconds", "encoder")}
    assert {key: from_stored[key] for key in same} == same


@pytest.mark.parametrize("encoder", ["timm:vit_tiny_patch16_224:random", "lite-semantic"])
def test_evaluate__linear_on_layers_of_other_families(classes: Path, encoder: str) -> None:
    found = evaluated("linear", classes, encoder, "--set", "steps=60")
    assert found["linear"] > 0.9


def test_evaluate__what_cannot_be_is_one_line(classes: Path, backbone: str) -> None:
    both = ["--train", str(classes / "train"), "--test", str(classes / "val")]
    for arguments, kind, message in (
        (["bogus", *both], ConfigError, "unknown task; known: knn, linear, logreg"),
        (["knn", *both], EncoderError, "no encoder: name one with --encoder"),
        (["knn", "--encoder", backbone, "--test", "x"], ConfigError, "learn from: --train"),
        (["knn", *both, "--encoder", backbone, "--set", "q=1"], ConfigError, "unknown key 'q'"),
        (
            ["artifacts", *both, "--encoder", "lite-semantic"],
            EncoderError,
            "before its norm",
        ),
        (["knn", *both, "--encoder", "/no/b.pth"], ConfigError, "no such file or folder with a"),
        (["table"], ConfigError, "name the folder of results"),
    ):
        result = CLI.invoke(app, ["evaluate", *arguments])
        assert isinstance(result.exception, kind)
        assert re.search(message, str(result.exception))
        assert "\n" not in str(result.exception)


def test_evaluate__artifacts_counts_outlier_norms(
    classes: Path, tmp_path: Path, backbone: str
) -> None:
    found = json.loads(
        run("evaluate", "artifacts", "--encoder", backbone, "--test", classes / "val", "--json")
    )
    assert found["outlier_share"] == 0
    assert found["test"] == 15
    # A position whose embedding is huge: one patch of 16 becomes an artifact.
    from embedder.checkpoint import load_backbone

    model = load_backbone(backbone)
    with torch.no_grad():
        model.pos_embed[0, 6] += 1000 * torch.randn(24)
    save_backbone(model, tmp_path / "broken.safetensors")
    command = ("--encoder", tmp_path / "broken.safetensors", "--test", classes / "val", "--json")
    found = json.loads(run("evaluate", "artifacts", *command))
    assert found["outlier_share"] == pytest.approx(1 / 16)
    assert found["share_above_cutoff"] == pytest.approx(1 / 16)


@pytest.mark.parametrize("kind", ["pca", "attention", "knn"])
@pytest.mark.parametrize("suffix", ["html", "png"])
def test_show__pages_and_sheets(backbone: str, tmp_path: Path, kind: str, suffix: str) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i, 90))
    out = tmp_path / f"out.{suffix}"
    run("show", kind, tmp_path, "--encoder", backbone, "--image-size", 112, "--out", out, "--k", 2)
    pictures = {"pca": 6, "attention": 15, "knn": 9}[kind]
    if suffix == "html":
        assert out.read_text().count('<img src="data:image/png;base64,') == pictures
        assert not re.search(r"(src|href)=\"http", out.read_text())
    else:
        with Image.open(out) as sheet:
            assert sheet.height == 3 * 228


def test_show__what_cannot_be_is_one_line(backbone: str, tmp_path: Path) -> None:
    for arguments, message in (
        (["pcaa", str(tmp_path), "--out", "a.html"], "want pca, attention or knn"),
        (["pca", str(tmp_path), "--out", "a.gif"], "and .html or .png"),
        (["pca", str(tmp_path), "--out", "a.png"], "holds no images"),
    ):
        result = CLI.invoke(app, ["show", *arguments, "--encoder", backbone])
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)


def test_show__odd_files_cost_no_others(tmp_path: Path, backbone: str, classes: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(jpeg(0))
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.jpg").symlink_to("nowhere")
    with tarfile.open(folder / "1.tar", "w") as tar:
        tar.add(classes / "val" / "red" / "0.jpg", "_2.jpg")
    run("show", "pca", folder, "--encoder", backbone, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 4
    assert "_2.jpg" in page
    run("show", "knn", folder, "--encoder", "lite-semantic", "--out", tmp_path / "knn.html")
    assert (tmp_path / "knn.html").read_text().count("<figure>") == 4  # none finds itself
