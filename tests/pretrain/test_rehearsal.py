"""A dry run shows what a run would be and leaves nothing; the run leaves what it was by."""

from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from curation.errors import ConfigError
from pipelines.cli.app import app
from pretrain.config import load_config
from pretrain.digests import find_damage
from pretrain.rehearsal import rehearse
from pretrain.train import Trainer, run
from tests.pretrain.small_runs import small_config, write_folder


def test_rehearse__schedules_at_five_points_time_and_memory(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", 5)
    config = small_config(optim={"steps": 9, "warmup_steps": 3})
    found = rehearse(config, str(images))
    assert (found.data["images"], found.batch) == (5, 4)
    assert [point["step"] for point in found.schedules] == [1, 3, 5, 7, 9]
    assert found.schedules[0]["lr"] == 0.0
    assert found.schedules[1]["lr"] == 1e-3
    assert set(found.schedules[0]) == {
        "step", "lr", "weight_decay", "teacher_momentum", "teacher_temperature"
    }  # fmt: skip
    assert found.seconds_per_step > 0
    assert found.peak_bytes > 50e6
    (point,) = rehearse(small_config(optim={"steps": 1}), str(images)).schedules
    assert point["step"] == 1


def test_pretrain__dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "images", 4)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(small_config().model_dump(mode="json")))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command = ["pretrain", "config.yaml", "--data", "images", "--set", "run.seed=7"]
    result = CliRunner().invoke(app, [*command, "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before
    for part in ("seed: 7", "schedules", "seconds a step", "peak memory", "images"):
        assert part in result.output
    assert CliRunner().invoke(app, command).exit_code == 2  # --out is missing
    result = CliRunner().invoke(app, [*command, "--out", "config.yaml"])
    with pytest.raises(ConfigError, match=r"--out config\.yaml: is a file; name a folder"):
        raise result.exception or AssertionError


def test_run__leaves_its_resolved_config(tmp_path: Path) -> None:
    images, out = str(write_folder(tmp_path / "images", 4)), tmp_path / "out"
    config = small_config(
        optim={"steps": 2, "warmup_steps": 1}, teacher={"temperature_warmup_steps": 2}
    )
    run(config, images, str(out))
    assert load_config(str(out / "config.yaml")) == config
    longer = config.replace(optim=config.optim.replace(steps=3))
    Trainer(longer, images, out, torch.device("cpu"))
    assert load_config(str(out / "config.yaml")) == longer
    assert find_damage(out) == []
