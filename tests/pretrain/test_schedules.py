"""Schedules fit the run that they are of, and the log says what they gave each step."""

import json
import logging
from pathlib import Path

import pytest

from curation.config import find_config, parse_settings, read_mapping
from curation.errors import ConfigError
from pretrain.config import PretrainConfig, load_config
from pretrain.optim import Schedules
from pretrain.run_log import RunLog, read_lines
from pretrain.schedules import Linear
from pretrain.train import run
from tests.pretrain.small_runs import small_config, write_folder


def lengths(config: PretrainConfig) -> tuple[int, int, int, int]:
    optim, teacher = config.optim, config.teacher
    freezes = (optim.freeze_last_layer_steps, optim.freeze_backbone_steps)
    return optim.warmup_steps, teacher.temperature_warmup_steps, *freezes


@pytest.mark.parametrize("steps", [1, 10, 1000, 5000])
def test_load_config__a_short_run_reaches_its_rate(
    steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        config = load_config("vits14", [f"optim.steps={steps}"])
    assert "schedules are scaled to optim.steps" in caplog.text
    schedules = Schedules.of(config, 1)
    assert max(map(schedules.lr, range(steps))) == pytest.approx(config.peak_lr(1))
    assert lengths(config) == (round(0.16 * steps), round(0.06 * steps), round(0.002 * steps), 0)
    temperature = Linear(*config.teacher.temperature, config.teacher.temperature_warmup_steps)
    assert temperature(steps) == 0.07


def test_load_config__what_fits_and_what_ships_stays(caplog: pytest.LogCaptureFixture) -> None:
    for path in find_config("pretrain", "demo").parent.glob("*.yaml"):
        if path.stem == "copy":  # another method's settings
            continue
        plain = parse_settings(PretrainConfig, read_mapping(path), path.stem)
        if path.stem != "highres_518":  # it is laid over a run's settings
            assert load_config(path.stem) == plain
    assert lengths(load_config("vits14", ["optim.steps=200000"]))[:2] == (100_000, 37_500)
    assert not caplog.records


def test_load_config__what_is_named_is_meant(tmp_path: Path) -> None:
    named = ["optim.steps=5000", "optim.warmup_steps=4000"]
    assert lengths(load_config("vits14", named)) == (4000, 300, 10, 0)
    for name in ("optim.warmup_steps", "teacher.temperature_warmup_steps"):
        with pytest.raises(ConfigError, match=rf"{name} = 11 does not fit optim\.steps = 10;"):
            load_config("demo", ["optim.steps=10", f"{name}=11"])
    path = tmp_path / "own.yaml"
    path.write_text("optim: {steps: 10, warmup_steps: 20}")
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps = 20 does not fit"):
        load_config(str(path))
    path.write_text("optim: {steps: 1000}")
    assert lengths(load_config(str(path))) == (160, 60, 2, 0)


def test_load_config__a_frozen_backbone_stays_frozen() -> None:
    assert load_config("fit_heads", ["optim.steps=100"]).fits_heads


def test_run__the_log_holds_what_the_schedules_gave(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", 4)
    result = run(small_config(optim={"steps": 3}), str(images), str(tmp_path / "out"))
    records = read_lines(result.log)
    assert [record["lr"] for record in records] == [0.0, 1e-3, 1e-3]
    assert [record["images_seen"] for record in records] == [4, 8, 12]
    assert records[0]["weight_decay"] == pytest.approx(0.04)
    assert records[0]["teacher_momentum"] == pytest.approx(0.994)
    assert records[2]["teacher_temperature"] == pytest.approx(0.06)
    assert records[0]["time"] < records[2]["time"]


def test_run_log__stays_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.add({"step": 1, "loss": float("inf"), "grad_norm": {"head": float("nan")}, "alarms": []})
    RunLog(tmp_path, 1)
    (line,) = log.path.read_text().splitlines()
    found = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found == {"step": 1, "loss": None, "grad_norm": {"head": None}, "alarms": []}
