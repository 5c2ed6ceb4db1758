"""What a run that goes on may change: nothing that decides its numbers, without being asked."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from curation.config import parse_settings
from embedder.checkpoint import save_backbone
from embedder.errors import CheckpointError
from embedder.vit import VisionTransformer
from pipelines.cli.app import app
from pretrain import checkpoint
from pretrain.collapse import Flatness
from pretrain.config import DistillConfig
from pretrain.run_log import read_lines
from pretrain.sources import describe_source, open_source
from pretrain.train import Trainer, run
from tests.pretrain.small_runs import jpeg, small_config, stop_after, write_folder, write_shards

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a run that was stopped after 2 of 6 steps."""
    folder = tmp_path_factory.mktemp("begun")
    images = write_folder(folder / "images")
    run(small_config(), str(images), str(folder / "run"), progress=stop_after(2))
    return folder


def resume(begun: Path, images: str = "images", /, **changes: Any) -> Trainer:
    return Trainer(small_config(**changes), str(begun / images), begun / "run", CPU)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run": {"seed": 5}}, r"run\.seed = 0, now it is 5;"),
        ({"run": {"precision": "bfloat16"}}, r"run\.precision = float32, now it is bfloat16;"),
        ({"masks": {"probability": 0.1}}, r"masks\.probability = 0\.5, now it is 0\.1;"),
        ({"masks": {"ratio": [0.1, 0.4]}}, r"masks\.ratio = \[0\.1, 0\.5\], now it is \[0\.1, 0"),
        ({"teacher": {"temperature": [0.04, 0.05]}}, r"teacher\.temperature = .*now it is"),
        ({"teacher": {"momentum": [0.9, 1.0]}}, r"teacher\.momentum = \[0\.994, 1\.0\], now"),
        ({"optim": {"batch_size": 8}}, r"optim\.batch_size = 4, now it is 8;"),
        ({"optim": {"accumulate": 2}}, r"optim\.accumulate = 1, now it is 2;"),
        ({"optim": {"base_lr": 0.5}}, r"optim\.base_lr = 0\.001, now it is 0\.5;"),
        ({"optim": {"warmup_steps": 3}}, r"optim\.warmup_steps = 2, now it is 3;"),
        ({"data": {"window_shards": 1}}, r"data\.window_shards = 64, now it is 1;"),
        ({"data": {"seed_set_weights": {"a": 1.0}}}, r"data\.seed_set_weights\.a = None, now it"),
        ({"crops": {"local_count": 1}}, r"crops\.local_count = 2, now it is 1;"),
        (
            {"run": {"seed": 5}, "masks": {"probability": 0.1}},
            r"run\.seed = 0, now it is 5, and masks\.probability = 0\.5, now it is 0\.1;",
        ),
    ],
)
def test_trainer__another_setting_is_refused(
    begun: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"was trained with {says}.*--allow-changed"):
        resume(begun, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"run": {"log_every_steps": 3, "checkpoint_every_steps": 5, "keep_checkpoints": 1}},
        {"run": {"threads": None, "device": "auto", "checkpoint_activations": True}},
        {"data": {"workers": 2}, "loss": {"block_rows": 8, "max_logit_bytes": 1}},
        {"optim": {"stop_when_flat": 5}},
    ],
)
def test_trainer__what_decides_no_number_changes_freely(
    begun: Path, changes: dict[str, Any]
) -> None:
    trainer = resume(begun, **changes)
    assert (trainer.step, trainer.changes) == (2, [])


def test_run__ends_when_flat_at_the_same_step(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.train.Flatness", partial(Flatness, tolerance=10.0))
    config, images = small_config(optim={"stop_when_flat": 2}), str(begun / "images")
    assert run(config, images, str(tmp_path / "calm")).steps == 4
    assert run(config, images, str(tmp_path / "out"), progress=stop_after(2)).steps == 2
    resumed = run(config, images, str(tmp_path / "out"))
    assert (resumed.steps, resumed.finished) == (4, True)


def test_trainer__a_longer_run_goes_on_and_says_so(begun: Path) -> None:
    trainer = resume(begun, optim={"steps": 9, "warmup_steps": 3})
    assert [(one["setting"], one["before"], one["now"]) for one in trainer.changes] == [
        ("optim.steps", 6, 9),
        ("optim.warmup_steps", 2, 3),
    ]


def test_trainer__init_and_model_are_never_changed(begun: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    save_backbone(VisionTransformer(small_config().vit()), weights)
    for changes in ({"init": str(weights)}, {"model": {"depth": 1}}):
        with pytest.raises(CheckpointError, match=r"= (None|2), now .*; set it back, or name ano"):
            Trainer(
                small_config(**changes), str(begun / "images"), begun / "run", CPU,
                allow_changed=True,
            )  # fmt: skip


def test_trainer__other_data_is_refused_and_moved_data_goes_on(begun: Path) -> None:
    shutil.copytree(begun / "images", begun / "moved")
    assert resume(begun, "moved").step == 2
    shutil.copytree(begun / "images", begun / "other")
    (begun / "other" / "005.jpg").write_bytes(jpeg(77))
    with pytest.raises(CheckpointError, match=r"with data = .*images \(10 images, digest .*other"):
        resume(begun, "other")


def test_describe_source__order_and_content_decide(tmp_path: Path) -> None:
    rows = [(f"{i:032x}", jpeg(i), None) for i in range(4)]
    packs = {"a": [rows], "b": [rows], "split": [rows[:2], rows[2:]], "c": [[*rows[:3], rows[2]]]}
    found = {}
    for name, shards in packs.items():
        path = str(write_shards(tmp_path / name, shards))
        found[name] = describe_source(path, open_source(path))["digest"]
    assert found["a"] == found["b"]
    assert len(set(found.values())) == 3


def test_pretrain__allowed_changes_are_in_log_checkpoint_and_card(
    begun: Path, tmp_path: Path
) -> None:
    shutil.copytree(begun / "run", tmp_path / "run")
    config = tmp_path / "config.yaml"
    changed = small_config(run={"seed": 5, "log_every_steps": 4})
    config.write_text(yaml.safe_dump(changed.model_dump(mode="json")))
    command = ["pretrain", str(config), "--data", str(begun / "images"), "--out"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "run")])
    assert isinstance(result.exception, CheckpointError)
    allowed = [*command, str(tmp_path / "run"), "--allow-changed"]
    for _ in range(2):  # what is accepted once is asked for no more
        assert CliRunner().invoke(app, allowed, catch_exceptions=False).exit_code == 0
        allowed = allowed[:-1]
    entry = {"step": 2, "setting": "run.seed", "before": 0, "now": 5}
    assert checkpoint.read_about(tmp_path / "run", 6)["changes"] == [entry]
    logged = [record.get("changed") for record in read_lines(tmp_path / "run/log.jsonl")]
    assert logged == [None, None, [entry], None]  # steps 1, 2, 4 and 6
    export = ["export", str(tmp_path / "run"), "--format", "safetensors", "--out"]
    result = CliRunner().invoke(app, [*export, str(tmp_path / "e")], catch_exceptions=False)
    card = (tmp_path / "e" / "README.md").read_text()
    assert "- changed on the way: run.seed was 0 up to step 2, then 5" in card


def test_trainer__checkpoints_of_before_have_no_digests(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun / "run", tmp_path / "run")
    step = tmp_path / "run/checkpoints/step-00000002"
    about = json.loads((step / "about.json").read_text())
    for key in ("changes", "processes", "origins"):
        del about[key]
    del about["data"]["digest"], about["config"]["masks"]
    about["format_version"] = 1
    (step / "about.json").write_text(json.dumps(about))
    (step / "digests.json").unlink()
    assert Trainer(small_config(), str(begun / "images"), tmp_path / "run", CPU).step == 2


def taught_config(teacher: Path) -> DistillConfig:
    values = small_config().model_dump(mode="json") | {"teacher_run": str(teacher)}
    return parse_settings(DistillConfig, values, "small")


def test_distill__a_moved_teacher_goes_on_and_a_trained_one_is_noticed(
    begun: Path, tmp_path: Path
) -> None:
    images, out = str(begun / "images"), tmp_path / "out"
    shutil.copytree(begun / "run", tmp_path / "teacher")
    run(taught_config(tmp_path / "teacher"), images, str(out), progress=stop_after(1))
    (tmp_path / "teacher").rename(tmp_path / "moved")
    assert Trainer(taught_config(tmp_path / "moved"), images, out, CPU).step == 1
    (tmp_path / "moved").rename(tmp_path / "teacher")
    run(small_config(optim={"steps": 3}), images, str(tmp_path / "teacher"))
    told = re.escape(f"teacher_run = {tmp_path}/teacher, now it is {tmp_path}/teacher with other")
    with pytest.raises(CheckpointError, match=told):
        Trainer(taught_config(tmp_path / "teacher"), images, out, CPU)


def test_pretrain__a_run_that_has_begun_needs_no_parent_and_no_init(
    begun: Path, tmp_path: Path
) -> None:
    parent, out = tmp_path / "parent", tmp_path / "out"
    shutil.copytree(begun / "run", parent)
    (tmp_path / "finer.yaml").write_text("{crops: {global_size: 84}, optim: {steps: 3}}")
    command = ["pretrain", str(tmp_path / "finer.yaml"), "--data", str(begun / "images")]
    command += ["--continue", str(parent), "--out", str(out)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    shutil.rmtree(parent)
    result = CliRunner().invoke(app, [*command, "--set", "optim.steps=4"], catch_exceptions=False)
    assert (result.exit_code, checkpoint.saved_steps(out)) == (0, [3, 4])
    weights = tmp_path / "w.safetensors"
    save_backbone(VisionTransformer(small_config(crops={"global_size": 70}).vit()), weights)
    config, images = small_config(init=str(weights)), str(begun / "images")
    run(config, images, str(tmp_path / "from_init"), progress=stop_after(1))
    weights.unlink()
    trainer = Trainer(config, images, tmp_path / "from_init", CPU)
    assert trainer.method.student.backbone.config.image_size == 70
