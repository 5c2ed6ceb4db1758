"""The backbone of any checkpoint, whatever else lies in the run's folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from curation.errors import ConfigError
from embedder.checkpoint import load_backbone
from embedder.encoder import LoadOptions
from embedder.vit import VisionTransformer
from pipelines.cli.app import app
from pretrain import checkpoint
from pretrain.backbones import SavedBackbone, find_saved
from pretrain.building import build_method
from pretrain.config import DistillConfig
from pretrain.evaluation.tasks import Request, open_encoder, open_feature_model, run_task
from pretrain.train import run
from tests.pretrain.small_runs import jpeg, small_config, stop_after, write_folder
from tests.pretrain.test_distillation import distill_config

CLI = CliRunner()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("data") / "images"))


@pytest.fixture(scope="module")
def extended(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, finished; then made longer and stopped after the fourth."""
    out = tmp_path_factory.mktemp("extended") / "run"
    run(small_config(optim={"steps": 2}), images, str(out))
    run(small_config(optim={"steps": 6}), images, str(out), progress=stop_after(4))
    return out


def found(path: Path, step: int | None = None) -> SavedBackbone:
    saved = find_saved(path, step)
    assert saved is not None
    return saved


def same(one: VisionTransformer, other: VisionTransformer) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_find_saved__is_what_the_run_left(extended: Path) -> None:
    left = load_backbone(extended / "backbone.safetensors")
    second, last = found(extended, 2).load(), found(extended)
    assert second.config == left.config
    assert same(second, left)
    assert not second.training
    assert (last.step, last.about()["step"]) == (4, 4)
    assert not same(last.load(), left)
    shapes = checkpoint.saved_shapes(extended, 4, "method.teacher.backbone")
    expected = {name: torch.empty(shape) for name, shape in shapes.items()}
    checkpoint.load_into(
        extended, 4, {f"method.teacher.backbone.{name}": v for name, v in expected.items()}
    )
    assert all(torch.equal(v, expected[n]) for n, v in last.load().state_dict().items())


def test_find_saved__a_checkpoint_by_its_folder(extended: Path) -> None:
    saved = found(extended / "checkpoints" / "step-00000002")
    assert (saved.run, saved.step) == (extended, 2)
    assert saved.name == f"dinov2:{extended}/checkpoints/step-00000002"


def test_find_saved__what_is_none(extended: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", extended / "backbone.safetensors"):
        assert find_saved(path) is None
    (extended / "exported").mkdir()
    assert find_saved(extended / "exported") is None
    with pytest.raises(ConfigError, match="no checkpoint of step 3; there are: 2, 4"):
        find_saved(extended, 3)


@pytest.mark.parametrize("objective", ["prototypes", "features"])
def test_find_saved__distillation_leaves_the_student_s_average(
    extended: Path, images: str, tmp_path: Path, objective: Any
) -> None:
    config = distill_config(str(extended), objective=objective, optim={"steps": 1})
    result = run(config, images, str(tmp_path / "out"))
    assert same(found(tmp_path / "out").load(), load_backbone(result.backbone))


def test_find_saved__each_of_several_students(extended: Path, images: str, tmp_path: Path) -> None:
    model = distill_config(None).model.model_dump()
    students = [{**model, "name": "a-1"}, {**model, "width": 18, "name": "b"}]
    config = distill_config(str(extended), students=students, optim={"steps": 1})
    run(config, images, str(tmp_path))
    for name, width in (("a-1", 12), ("b", 18)):
        model = found(tmp_path / name).load()
        assert model.config.width == width
        assert same(model, load_backbone(tmp_path / name / "backbone.safetensors"))
    with pytest.raises(ConfigError, match=r"several students; name one: .*/a-1, .*/b"):
        find_saved(tmp_path)


def test_features__a_teacher_made_longer_teaches_by_its_last_step(
    extended: Path, tmp_path: Path
) -> None:
    config: DistillConfig = distill_config(str(extended), objective="features")
    assert same(build_method(config).teacher, found(extended, 4).load())


# --- the verbs ----------------------------------------------------------------------------------


def export(*arguments: object) -> str:
    result = CLI.invoke(app, ["export", *map(str, arguments)])
    return str(result.exception) if result.exception else ""


def test_export__card_and_weights_are_of_one_step(extended: Path, tmp_path: Path) -> None:
    for options, step in (([], 4), (["--step", 2], 2)):
        assert not export(extended, "--out", tmp_path, *options)
        assert f"- steps: {step}\n" in (tmp_path / "README.md").read_text()
        assert same(load_backbone(tmp_path / "model.safetensors"), found(extended, step).load())


def test_export__a_backbone_older_than_its_run_is_refused(extended: Path, tmp_path: Path) -> None:
    message = export(extended / "backbone.safetensors", "--out", tmp_path)
    assert "is not of the last checkpoint, that of step 4; name the run" in message
    assert "is no run with checkpoints" in export(
        extended / "backbone.safetensors", "--step", 2, "--out", tmp_path
    )
    assert not list(tmp_path.iterdir())


def test_export__the_file_of_a_finished_run_keeps_its_steps(images: str, tmp_path: Path) -> None:
    result = run(small_config(optim={"steps": 1}), images, str(tmp_path / "run"))
    assert not export(result.backbone, "--out", tmp_path / "out")
    assert "- steps: 1\n" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("classes")
    for i in range(8):
        folder = root / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    return str(root)


def test_run_task__measures_runs_and_checkpoints(extended: Path, classes: str) -> None:
    request = Request("knn", None, classes, classes, device="cpu", changes=["k=[1]"])
    by = {
        path: run_task(replace(request, encoder=str(extended / path)))
        for path in ("", "checkpoints/step-00000002", "backbone.safetensors")
    }
    run_, second, file = by.values()
    assert run_.encoder == f"dinov2:{extended}/checkpoints/step-00000004"
    assert second.space == file.space != run_.space
    assert second.metrics == file.metrics


def test_open_encoder__takes_what_a_run_without_checkpoints_left(
    extended: Path, tmp_path: Path
) -> None:
    (tmp_path / "backbone.safetensors").write_bytes(
        (extended / "backbone.safetensors").read_bytes()
    )
    assert (
        open_encoder(str(tmp_path), LoadOptions()).space
        == open_encoder(f"dinov2:{found(extended, 2).folder}", LoadOptions()).space
    )
    assert open_feature_model(str(extended), LoadOptions()).name == found(extended).name
