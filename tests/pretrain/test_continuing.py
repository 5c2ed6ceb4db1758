"""The high-resolution stage: another run's networks go on with a finer grid."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from curation.config import laid_over, parse_settings
from curation.errors import ConfigError
from embedder.checkpoint import load_backbone
from embedder.errors import CheckpointError
from pipelines.cli.app import app
from pretrain import checkpoint
from pretrain.building import build_method
from pretrain.config import DistillConfig, PretrainConfig, load_config
from pretrain.continuing import load_continued_config, resize_positions
from pretrain.digests import write_digests
from pretrain.methods.distillation import load_teacher
from pretrain.train import run
from tests.pretrain.small_runs import small_config, write_folder

CLI = CliRunner()
CHANGES = {
    "crops": {"global_size": 84, "local_size": 42},
    "optim": {"steps": 2, "warmup_steps": 0, "base_lr": 1e-5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("continued")
    write_folder(folder / "images")
    run(small_config(optim={"steps": 3}), str(folder / "images"), str(folder / "run"))
    (folder / "highres.yaml").write_text(yaml.safe_dump(CHANGES))
    return folder


def test_load_continued_config__lays_the_file_over_the_run(folder: Path) -> None:
    config = load_continued_config(
        str(folder / "highres.yaml"), ["optim.steps=7"], str(folder / "run")
    )
    assert (config.model.width, config.loss.dino_head.prototypes) == (24, 32)
    assert (config.crops.global_size, config.crops.local_count) == (84, 2)
    assert (config.optim.steps, config.optim.batch_size) == (7, 4)
    shipped = load_continued_config("highres_518", [], str(folder / "run"))
    assert (shipped.vit().grid, shipped.optim.steps) == (37, 10_000)


@pytest.mark.parametrize("name", ["run", "run/checkpoints/step-00000003"])
def test_build_method__takes_over_all_networks(folder: Path, name: str) -> None:
    config = load_continued_config(str(folder / "highres.yaml"), [], str(folder / name))
    method = build_method(config)
    before = build_method(small_config())
    state = {f"method.{key}": value for key, value in before.state_dict().items()}
    checkpoint.load_into(folder / "run", 3, state)
    for key, value in method.state_dict().items():
        saved = state[f"method.{key}"]
        if key.endswith("pos_embed"):
            assert value.shape == (1, 37, 24)
            torch.testing.assert_close(value, resize_positions(saved, 36, antialias=False))
        else:
            assert torch.equal(value, saved)


def test_resize_positions__keeps_class_token_and_smooth_fields() -> None:
    ramp = torch.linspace(-1, 1, 16).view(1, 16, 1, 1).expand(1, 16, 16, 1)
    positions = torch.cat([torch.full((1, 1, 1), 9.0), ramp.reshape(1, 256, 1)], dim=1)
    finer = resize_positions(positions, 37**2, antialias=True)
    assert finer[0, 0].item() == 9.0
    plane = finer[0, 1:].view(37, 37)
    assert (plane.diff(dim=0) >= -1e-3).all()
    assert plane[:, 0].mean().abs() < 1e-3
    assert torch.equal(resize_positions(positions, 256, antialias=True), positions)


def test_pretrain__continue_as_a_verb_and_any_aspect_after(folder: Path, tmp_path: Path) -> None:
    command = ["pretrain", "--continue", folder / "run", "--config", folder / "highres.yaml"]
    paths = ["--data", folder / "images", "--out", tmp_path / "out"]
    for _ in range(2):  # the second time resumes a finished run
        result = CLI.invoke(app, [str(w) for w in (*command, *paths)], catch_exceptions=False)
        assert result.exit_code == 0
    backbone = load_backbone(tmp_path / "out" / "backbone.safetensors")
    assert backbone.config.image_size == 84
    for size in ((84, 84), (56, 126), (14, 14)):
        tokens = backbone(torch.randn(1, 3, *size))
        assert tokens.patches.shape[1] == size[0] * size[1] // 14**2
        assert tokens.cls.isfinite().all()


def test_continue__what_cannot_be_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint of `curate pretrain` to continue"):
        load_continued_config("highres_518", [], str(tmp_path))
    paths = ["--data", str(folder / "images"), "--out", str(tmp_path / "o")]
    result = CLI.invoke(app, ["pretrain", *paths])
    assert isinstance(result.exception, ConfigError)
    assert "name a config" in str(result.exception)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"depth": 10**9}},
        {"model": {"width": 3 * 10**6}},
        {"loss": {"dino_head": {"prototypes": 10**9}}},
    ],
)
def test_build_method__settings_of_a_run_that_ask_for_more_than_it_holds(
    folder: Path, tmp_path: Path, change: dict[str, dict[str, Any]]
) -> None:
    """A stranger's checkpoint is small, and its settings say what they like."""
    shutil.copytree(folder / "run", tmp_path / "run")
    step = tmp_path / "run/checkpoints/step-00000003"
    about = json.loads((step / "about.json").read_text())
    for section, values in change.items():
        about["config"][section] = laid_over(about["config"][section], values)
    (step / "about.json").write_text(json.dumps(about))
    (step / "digests.json").unlink()
    write_digests(step)
    config = load_continued_config(str(folder / "highres.yaml"), [], str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="and its settings say"):
        build_method(config)
    student = small_config(**change).model_dump(mode="json")
    student["teacher_run"] = str(tmp_path / "run")
    with pytest.raises(CheckpointError, match="and its settings say"):
        load_teacher(parse_settings(DistillConfig, student, "student"))


@pytest.mark.slow
def test_pretrain__highres_518_as_shipped_on_vits14(tmp_path: Path) -> None:
    """Two steps of ViT-S/14 at 518 px; what they leave is used at another size and aspect, too."""
    write_folder(tmp_path / "images")
    head = {"prototypes": 1024, "hidden": 256, "bottleneck": 128}
    start = load_config("vits14").model_dump(mode="json") | {"data": {"workers": 0}}
    start["optim"] |= {"steps": 1, "batch_size": 2, "warmup_steps": 0, "freeze_last_layer_steps": 0}
    start["loss"] |= {"dino_head": head, "ibot_head": head}
    run(parse_settings(PretrainConfig, start, "start"), f"{tmp_path}/images", f"{tmp_path}/run")
    changes = ["optim.steps=2", "optim.batch_size=2", "optim.accumulate=1", "optim.warmup_steps=1"]
    config = load_continued_config("highres_518", changes, str(tmp_path / "run"))
    backbone = load_backbone(run(config, f"{tmp_path}/images", f"{tmp_path}/highres").backbone)
    assert (backbone.config.grid, backbone.config.width) == (37, 384)
    for height, width in ((518, 518), (336, 560)):
        patches = backbone(torch.rand(1, 3, height, width)).patches
        assert patches.shape[1] == height // 14 * (width // 14)
        assert patches.isfinite().all()
