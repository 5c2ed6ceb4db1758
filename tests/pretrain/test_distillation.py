from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from curation.config import find_config, parse_settings
from curation.errors import ConfigError
from embedder.checkpoint import load_backbone
from embedder.errors import CheckpointError
from pipelines.cli.train import distill
from pretrain import checkpoint
from pretrain.building import build_method
from pretrain.collapse import Flatness
from pretrain.config import DistillConfig, load_distill_config
from pretrain.data import Batches, Part
from pretrain.methods.distillation import Distillation
from pretrain.run_log import read_lines
from pretrain.train import Trainer, TrainResult, run
from tests.pretrain.small_runs import HEAD, small_config, stop_after, write_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("data") / "images"))


@pytest.fixture(scope="module")
def teacher_run(images: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("teacher") / "run"
    run(small_config(optim={"steps": 3}), images, str(out))
    return str(out)


def distill_config(teacher_run: str | None, /, **changes: Any) -> DistillConfig:
    """A student narrower and shallower than the teacher of `small_config`."""
    head = {**HEAD, "hidden": 16, "bottleneck": 8}
    values = small_config(loss={"dino_head": head, "ibot_head": head}).model_dump(mode="json")
    values["model"] |= {"width": 12, "depth": 1, "heads": 2, "drop_path": 0.0}
    values["teacher_run"] = teacher_run
    for section, keys in changes.items():
        values[section] = {**values[section], **keys} if isinstance(keys, dict) else keys
    return parse_settings(DistillConfig, values, "small")


def losses(result: TrainResult) -> list[tuple[float, ...]]:
    names = ("dino_global_crops_loss", "dino_local_crops_loss", "ibot_loss", "koleo_loss", "loss")
    return [tuple(record[name] for name in names) for record in read_lines(result.log)]


def trainer_of(config: DistillConfig, images: str, out: Path) -> tuple[Trainer, Distillation]:
    trainer = Trainer(config, images, out, CPU, resume=True)
    assert isinstance(trainer.method, Distillation)
    return trainer, trainer.method


def test_teacher__is_that_of_the_run_and_does_not_change(
    images: str, teacher_run: str, tmp_path: Path
) -> None:
    trainer, method = trainer_of(distill_config(teacher_run), images, tmp_path)
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    saved = {f"method.teacher.{name}": torch.zeros_like(value) for name, value in before.items()}
    checkpoint.load_into(Path(teacher_run), 3, saved)
    student = {name: value.clone() for name, value in method.student.state_dict().items()}
    batch = Batches(trainer.source, trainer.config).batch(Part(0, 4, 0, 4)).to(CPU)
    for _ in range(3):
        trainer.take_step([batch])
    after = method.teacher.state_dict()
    assert not method.teacher.training
    for name, value in before.items():
        assert torch.equal(value, after[name])
        assert torch.equal(value, saved[f"method.teacher.{name}"])
    assert any(
        not torch.equal(value, method.student.state_dict()[n]) for n, value in student.items()
    )
    assert not any(name.startswith("teacher.") for name in method.state_dict())


@pytest.mark.parametrize("tokens", ["all", "masked"])
def test_take_step__losses_fall_on_one_repeated_batch(
    images: str, teacher_run: str, tmp_path: Path, tokens: str
) -> None:
    config = distill_config(
        teacher_run,
        ibot_tokens=tokens,
        loss={"koleo_weight": 0.0},
        optim={"steps": 60, "base_lr": 3e-3, "freeze_last_layer_steps": 0},
        teacher={"temperature": [0.04, 0.04]},
    )
    trainer, _ = trainer_of(config, images, tmp_path)
    batch = Batches(trainer.source, config).batch(Part(0, 4, 0, 4)).to(CPU)
    totals = [trainer.take_step([batch]) for _ in range(60)]
    for name in ("loss", "ibot_loss", "dino_global_crops_loss", "dino_local_crops_loss"):
        assert totals[-1][name] < 0.9 * totals[0][name], name


def test_losses__ibot_is_the_mean_over_all_unmasked_patches(
    images: str, teacher_run: str, tmp_path: Path
) -> None:
    trainer, method = trainer_of(distill_config(teacher_run), images, tmp_path)
    batch = Batches(trainer.source, trainer.config).batch(Part(0, 4, 0, 4)).to(CPU)
    targets = method.targets([batch], 0.05)
    got = method.losses(batch, targets, 0, torch.Generator())["ibot_loss"]
    patches = method.student.backbone(batch.global_crops).patches.flatten(0, 1)  # (2 B P, D)
    logits = method.student.ibot_head.logits(patches) / 0.1  # (2 B P, K)
    q = targets.ibot.rows(torch.arange(len(patches)))
    assert len(patches) == 8 * 16
    torch.testing.assert_close(2 * got, -(q * logits.log_softmax(-1)).sum(-1).mean())


def test_run__leaves_the_student_s_moving_average(
    images: str, teacher_run: str, tmp_path: Path
) -> None:
    config = distill_config(
        teacher_run, teacher={"momentum": [0.5, 0.5]}, optim={"steps": 1, "warmup_steps": 0}
    )
    start = build_method(config).student.backbone.state_dict()
    result = run(config, images, str(tmp_path))
    backbone = load_backbone(result.backbone)
    assert backbone.config.width == 12
    name = "blocks.0.attn.qkv.weight"
    saved = {f"method.student.backbone.{name}": torch.zeros_like(start[name])}
    checkpoint.load_into(tmp_path, 1, saved)
    moved = saved[f"method.student.backbone.{name}"]
    assert not torch.equal(moved, start[name])
    torch.testing.assert_close(backbone.state_dict()[name], start[name].lerp(moved, 0.5))


def test_run__stopped_and_resumed_gives_the_same_losses(
    images: str, teacher_run: str, tmp_path: Path
) -> None:
    config = distill_config(teacher_run)
    calm = run(config, images, str(tmp_path / "calm"))
    assert not run(config, images, str(tmp_path / "halting"), progress=stop_after(2)).finished
    resumed = run(config, images, str(tmp_path / "halting"))
    assert resumed.finished
    assert losses(resumed) == losses(calm)
    ours, theirs = (load_backbone(r.backbone).state_dict() for r in (calm, resumed))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_run__another_teacher_does_not_resume(
    images: str, teacher_run: str, tmp_path: Path
) -> None:
    run(distill_config(teacher_run, optim={"steps": 1}), images, str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="was trained with teacher_run = "):
        run(distill_config(str(tmp_path / "out")), images, str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="teacher_run = None, now it is "):
        run(distill_config(teacher_run), images, teacher_run)


def test_load_teacher__a_distilled_student_may_teach(
    images: str, teacher_run: str, tmp_path: Path
) -> None:
    result = run(distill_config(teacher_run, optim={"steps": 1}), images, str(tmp_path))
    teacher = build_method(distill_config(str(tmp_path))).teacher
    saved = load_backbone(result.backbone).state_dict()
    for name, value in teacher.backbone.state_dict().items():
        assert torch.equal(value, saved[name])


def test_load_teacher__keeps_the_grid_of_weights_it_started_from(
    images: str, teacher_run: str, tmp_path: Path
) -> None:
    init = str(Path(teacher_run) / "backbone.safetensors")
    sizes = {"global_size": 70}
    run(small_config(optim={"steps": 1}, crops=sizes, init=init), images, str(tmp_path))
    method = build_method(distill_config(str(tmp_path)))
    assert method.teacher.backbone.pos_embed.shape == (1, 17, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"dino_head": {**HEAD, "prototypes": 16}}}, r"dino_head\.prototypes = 32, .* 16"),
        ({"loss": {"separate_heads": False}}, r"loss\.separate_heads = True, the student False"),
        ({"model": {"patch": 7}}, r"patch = 14, the student 7; set model\.patch to 14"),
        ({"teacher_run": "nowhere"}, "nowhere: holds no checkpoint"),
        ({"teacher_run": None}, "no teacher: name the folder"),
    ],
)
def test_run__teacher_that_does_not_fit_is_one_line(
    images: str, teacher_run: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        run(distill_config(teacher_run, **changes), images, str(tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_load_distill_config__shipped_config_names_command_and_cost() -> None:
    config = load_distill_config("tiny", ["optim.steps=3"])
    assert (config.optim.steps, config.model.drop_path) == (3, 0.0)
    header = find_config("distill", "tiny").read_text().splitlines()[:3]
    assert header[0].startswith("# curate distill tiny --teacher ")
    assert header[1].startswith("# Cost: ")
    assert "Expected: " in header[1]
    with pytest.raises(ConfigError, match="configs/distill: tiny, vitb14, vitl14, vits14"):
        load_distill_config("missing")


def test_distill__verb(
    images: str, teacher_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(distill_config(None).model_dump(mode="json")))
    out = tmp_path / "out"
    distill(str(config), images, str(out), teacher_run, ["optim.steps=1"])
    assert (out / "backbone.safetensors").is_file()
    assert "distill" in capsys.readouterr().out


def test_run__two_students_match_two_single_runs(
    images: str, teacher_run: str, tmp_path: Path
) -> None:
    wide = {**distill_config(teacher_run).model.model_dump(), "width": 18, "name": "wide"}
    small = {**distill_config(teacher_run).model.model_dump(), "name": "small"}
    both = run(distill_config(teacher_run, students=[small, wide]), images, str(tmp_path / "both"))
    records = read_lines(both.log)
    for student in (small, wide):
        name = student.pop("name")
        alone = run(distill_config(teacher_run, model=student), images, str(tmp_path / name))
        assert [r["loss"] for r in read_lines(alone.log)] == [
            r[f"{name}.total_loss"] for r in records
        ]
        ours = load_backbone(tmp_path / "both" / name / "backbone.safetensors").state_dict()
        for key, value in load_backbone(alone.backbone).state_dict().items():
            assert torch.equal(value, ours[key])
    sums = [r["small.total_loss"] + r["wide.total_loss"] for r in records]
    assert [r["loss"] for r in records] == pytest.approx(sums)


def test_run__two_students_resume_together(images: str, teacher_run: str, tmp_path: Path) -> None:
    students = [
        {**distill_config(teacher_run).model.model_dump(), "name": name} for name in ("a", "b")
    ]

    config = distill_config(teacher_run, students=students, optim={"steps": 4})
    calm = run(config, images, str(tmp_path / "calm"))
    run(config, images, str(tmp_path / "halting"), progress=stop_after(2))
    resumed = run(config, images, str(tmp_path / "halting"))
    assert resumed.finished
    first, second = (
        [r["b.total_loss"] for r in read_lines(result.log)] for result in (calm, resumed)
    )
    assert first == second


def test_single__sizes_archs_and_names() -> None:
    config = distill_config(None, model={"width": None, "depth": None, "heads": None})
    two = config.replace(students=("s", "vitb14_reg")).single()
    assert {name: one.model.arch for name, one in two.items()} == {
        "s": "vits14",
        "vitb14_reg": "vitb14_reg",
    }
    with pytest.raises(ConfigError, match="two are named 's'"):
        config.replace(students=("s", "s")).single()
    with pytest.raises(ConfigError, match="student 'q'"):
        config.replace(students=("q",)).single()


def test_features__student_approaches_the_teacher_s_tokens(
    images: str, teacher_run: str, tmp_path: Path
) -> None:
    config = distill_config(
        str(Path(teacher_run) / "backbone.safetensors"),
        objective="features",
        optim={"steps": 40, "base_lr": 3e-3},
    )
    result = run(config, images, str(tmp_path / "out"))
    records = read_lines(result.log)
    for name in ("cls_loss", "patch_loss"):
        assert records[-1][name] < 0.5 * records[0][name]
    assert load_backbone(result.backbone).config.width == 12
    with pytest.raises(ConfigError, match="a file of weights has no heads to teach by"):
        run(distill_config(result.backbone), images, str(tmp_path / "next"))
    with pytest.raises(ConfigError, match="hold no single student with heads to teach"):
        run(distill_config(str(tmp_path / "out")), images, str(tmp_path / "next"))
    with pytest.raises(ConfigError, match="patch = 14, the student 7"):
        build_method(config.replace(model=config.model.replace(patch=7)))


def test_build_method__a_frozen_backbone_only_fits_heads(
    images: str, teacher_run: str, tmp_path: Path
) -> None:
    """Heads on a released backbone: then they teach like those of a run of our own."""
    weights = str(Path(teacher_run) / "backbone.safetensors")
    changes = {"steps": 200, "freeze_backbone_steps": 200, "freeze_last_layer_steps": 0,
               "stop_when_flat": 2}  # fmt: skip
    config = small_config(
        init=weights, optim=changes, model={"drop_path": 0.0}, run={"checkpoint_every_steps": 2}
    )
    run(config, images, str(tmp_path / "heads"), progress=stop_after(3))
    result = run(config, images, str(tmp_path / "heads"))
    assert result.steps > 3
    assert result.finished
    assert result.steps < 200
    before = load_backbone(weights).state_dict()
    for name, value in load_backbone(result.backbone).state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-7)
    teacher = build_method(distill_config(str(tmp_path / "heads"))).teacher
    fresh = build_method(config).teacher
    assert not torch.equal(teacher.dino_head.mlp[0].weight, fresh.dino_head.mlp[0].weight)


def test_refuse_too_many_prototypes__fifty_class_tokens_each(images: str, tmp_path: Path) -> None:
    config = small_config(optim={"steps": 10, "freeze_backbone_steps": 10})
    with pytest.raises(ConfigError, match=r"80 class tokens are seen, 50 .* take at most 1, or"):
        run(config, images, str(tmp_path / "out"))


def test_flatness__two_equal_windows() -> None:
    flat = Flatness(2)
    losses = [5.0, 4.0, 3.0, 2.0, 2.0, 2.001, 2.0]
    loss_alone = Flatness(2)  # features have no prototypes
    assert [loss_alone.add({"loss": x}) for x in losses] == [False] * 6 + [True]
    assert [flat.add({"loss": x, "prototypes_in_use": 8.0}) for x in losses] == [False] * 6 + [True]
