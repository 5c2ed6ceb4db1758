import json
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from curation.errors import ConfigError
from embedder.checkpoint import load_backbone, save_backbone
from embedder.errors import CheckpointError
from embedder.vit import VisionTransformer
from pretrain import checkpoint
from pretrain.collapse import effective_rank
from pretrain.config import PretrainConfig, load_config
from pretrain.data import (
    Batches,
    Part,
    batch_bytes,
    read_batches,
    refuse_little_shared_memory,
)
from pretrain.errors import TrainingError
from pretrain.run_log import Record, RunLog, read_lines
from pretrain.sources import open_source
from pretrain.train import Trainer, TrainResult, run
from tests.pretrain.small_runs import jpeg, small_config, stop_after, write_folder, write_shards

LOSSES = (
    "dino_global_crops_loss",
    "dino_local_crops_loss",
    "ibot_loss",
    "koleo_loss",
    "loss",
)


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("data") / "images"))


def losses(result: TrainResult) -> list[tuple[float, ...]]:
    return [tuple(record[name] for name in LOSSES) for record in read_lines(result.log)]


def test_run__leaves_backbone_log_and_checkpoint(images: str, tmp_path: Path) -> None:
    result = run(small_config(), images, str(tmp_path))
    assert result.finished
    assert result.steps == 6
    assert [record["step"] for record in read_lines(result.log)] == [1, 2, 3, 4, 5, 6]
    assert result.first["loss"] != result.last["loss"]
    backbone = load_backbone(result.backbone)
    assert backbone.config.image_size == 56
    assert checkpoint.read_about(tmp_path, 6)["position"] == 24
    saved = {"method.teacher.backbone.cls_token": torch.zeros(1, 1, 24)}
    checkpoint.load_into(tmp_path, 6, saved)
    assert torch.equal(saved["method.teacher.backbone.cls_token"], backbone.cls_token)


def test_run__stopped_and_resumed_is_bit_exact(images: str, tmp_path: Path) -> None:
    config = small_config()
    calm = run(config, images, str(tmp_path / "calm"))
    for step in (2, 4):
        stopped = run(config, images, str(tmp_path / "halting"), progress=stop_after(step))
        assert not stopped.finished
        assert stopped.steps == step
    resumed = run(config, images, str(tmp_path / "halting"))
    assert resumed.finished
    assert losses(resumed) == losses(calm)
    ours, theirs = (load_backbone(r.backbone).state_dict() for r in (calm, resumed))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_run__loader_workers_change_nothing(images: str, tmp_path: Path) -> None:
    alone = run(small_config(optim={"steps": 2}), images, str(tmp_path / "a"))
    config = small_config(optim={"steps": 2}, data={"workers": 2})
    assert losses(run(config, images, str(tmp_path / "b"))) == losses(alone)


def test_run__finished_run_does_nothing(images: str, tmp_path: Path) -> None:
    first = run(small_config(optim={"steps": 2}), images, str(tmp_path))
    calls: list[Record] = []
    again = run(small_config(optim={"steps": 2}), images, str(tmp_path), progress=calls.append)
    assert not calls
    assert again == first
    with pytest.raises(CheckpointError, match="holds a run of 2 steps"):
        run(small_config(), images, str(tmp_path), resume=False)


def test_run__another_model_does_not_resume(images: str, tmp_path: Path) -> None:
    run(small_config(optim={"steps": 2}), images, str(tmp_path))
    with pytest.raises(CheckpointError, match=r"model\.depth = 2, now it is 1"):
        run(small_config(model={"depth": 1}), images, str(tmp_path))


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
@pytest.mark.parametrize("separate", [True, False])
def test_take_step__losses_fall_on_one_repeated_batch(
    images: str, tmp_path: Path, centering: str, separate: bool
) -> None:
    config = small_config(
        model={"drop_path": 0.0},
        loss={"centering": centering, "separate_heads": separate, "koleo_weight": 0.0},
        optim={"steps": 60, "base_lr": 1e-3, "freeze_last_layer_steps": 0, "batch_size": 4},
        teacher={"momentum": [0.996, 1.0], "temperature": [0.04, 0.04]},
    )
    trainer = Trainer(config, images, tmp_path, CPU, resume=True)
    batch = Batches(trainer.source, config).batch(Part(0, 4, 0, 4)).to(trainer.device)
    for _ in range(60):  # a fresh center lags, which moves the loss more than learning does
        trainer.method.targets([batch], 0.04)
    totals = [trainer.take_step([batch])["loss"] for _ in range(60)]
    assert sum(totals[-5:]) < 0.8 * sum(totals[:5])


def test_run__bad_image_is_replaced_counted_and_listed(tmp_path: Path) -> None:
    rows = [(f"{i:032x}", jpeg(i) if i else b"\xff\xd8 no image", "a") for i in range(6)]
    path = write_shards(tmp_path / "packed", [rows[:3], rows[3:]])
    result = run(small_config(optim={"steps": 3}), str(path), str(tmp_path / "out"))
    assert result.finished
    assert result.bad_images == 1
    listed = [
        json.loads(line) for line in (tmp_path / "out/bad_images.jsonl").read_text().splitlines()
    ]
    assert [record["id"] for record in listed] == ["0" * 32]


def test_run__nothing_readable_is_an_error(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "packed", [[("0" * 32, b"no image", None)]])
    with pytest.raises(TrainingError, match="100 images in a row"):
        run(small_config(), str(path), str(tmp_path / "out"))


def test_run__nan_names_step_and_images(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(small_config(), images, tmp_path, CPU, resume=True)
    torch.nn.init.constant_(trainer.method.student.backbone.norm.bias, torch.nan)
    batch = Batches(trainer.source, trainer.config).batch(Part(0, 4, 0, 4)).to(trainer.device)
    with pytest.raises(TrainingError, match=r"step 1: .* images of the batch: .*\.jpg"):
        trainer.take_step([batch])


def test_run__gradients_that_are_no_numbers_change_nothing(images: str, tmp_path: Path) -> None:
    trainer = Trainer(small_config(), images, tmp_path, CPU, resume=True)
    batch = Batches(trainer.source, trainer.config).batch(Part(0, 4, 0, 4)).to(trainer.device)
    weight = trainer.method.student.backbone.norm.weight
    weight.register_hook(lambda gradient: gradient * torch.nan)
    before = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    with pytest.raises(TrainingError, match=r"step 1: the gradients are no .*'backbone': nan"):
        trainer.take_step([batch])
    networks = {name for name in before if name.startswith(("student.", "teacher."))}
    after = trainer.method.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in networks)
    assert checkpoint.saved_steps(tmp_path) == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_run__a_rate_that_blows_up_is_one_line(images: str, tmp_path: Path, precision: str) -> None:
    config = small_config(
        optim={"steps": 60, "base_lr": 1e8, "warmup_steps": 0},
        run={"precision": precision, "checkpoint_every_steps": 1, "keep_checkpoints": 60},
    )
    with pytest.raises(TrainingError, match=r"no longer numbers.*images of the batch: .*\.jpg"):
        run(config, images, str(tmp_path))
    for step in checkpoint.saved_steps(tmp_path):
        shapes = checkpoint.saved_shapes(tmp_path, step, "method")
        state = {f"method.{name}": torch.zeros(shape) for name, shape in shapes.items()}
        checkpoint.load_into(tmp_path, step, state)
        assert all(value.isfinite().all() for value in state.values())


def test_effective_rank__of_what_is_no_number_is_none() -> None:
    assert effective_rank(torch.tensor([[1.0, torch.nan], [0.0, 1.0]])).isnan()


def test_run_log__half_a_line_is_dropped_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "bad_images.jsonl"
    path.write_text('{"id": "a.jpg", "reason": "empty"}\n{"id": "x.jpg", "rea')
    RunLog(tmp_path, 0).add_bad([("b.jpg", "no_image"), ("a.jpg", "empty")])
    assert [record["id"] for record in read_lines(path)] == ["a.jpg", "b.jpg"]
    assert RunLog(tmp_path, 0).num_bad == 2


def test_read_batches__little_shared_memory_is_one_line(images: str) -> None:
    config = small_config(data={"workers": 2})
    batch = Batches(open_source(images), config).batch(Part(0, 4, 0, 4))
    tensors = (getattr(batch, field.name) for field in fields(batch))
    taken = sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))
    assert taken <= batch_bytes(config) < 1.1 * taken
    refuse_little_shared_memory(config, 5 * batch_bytes(config))
    refuse_little_shared_memory(small_config(), 0)
    with pytest.raises(
        TrainingError, match=r"data\.workers = 2: .*/dev/shm has 0\.1 MB .*--shm-size"
    ):
        refuse_little_shared_memory(config, 10**5)


def test_run__a_checkpoint_past_mending_is_named(images: str, tmp_path: Path) -> None:
    run(small_config(optim={"steps": 2}), images, str(tmp_path))
    trainer = Trainer(small_config(), images, tmp_path, CPU, resume=True)
    torch.nn.init.constant_(trainer.method.student.backbone.norm.bias, torch.nan)
    batch = Batches(trainer.source, trainer.config).batch(Part(0, 4, 0, 4)).to(trainer.device)
    with pytest.raises(TrainingError, match=r"step 3: .*remove .*step-00000002: it is finite"):
        trainer.take_step([batch])


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"[1]", b'{"step": 1', b"\0"])
def test_read_lines__a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n{"step"')
    with pytest.raises(TrainingError, match=r"log\.jsonl: line 2 is damaged"):
        read_lines(path)


def test_batches__a_rank_s_share_is_part_of_the_whole(images: str) -> None:
    source, config = open_source(images), small_config()
    whole = Batches(source, config).batch(Part(8, 4, 0, 4))
    first, second = (Batches(source, config).batch(Part(8, 4, start, 2)) for start in (0, 2))
    assert first.ids + second.ids == whole.ids
    for name in ("global_crops", "local_crops", "masks"):
        split = [getattr(half, name).unflatten(0, (-1, 2)) for half in (first, second)]
        assert torch.equal(torch.cat(split, dim=1).flatten(0, 1), getattr(whole, name))


def test_read_batches__goes_on_from_any_position(images: str) -> None:
    source, config = open_source(images), small_config()
    stream = read_batches(source, config, 0, 0, 1)
    later = read_batches(source, config, 8, 0, 1)
    batches = [next(stream) for _ in range(3)]
    assert torch.equal(batches[2].global_crops, next(later).global_crops)


def test_init__keeps_the_grid_and_fits_or_fails(images: str, tmp_path: Path) -> None:
    vit = small_config(crops={"global_size": 70}).vit()
    model = VisionTransformer(vit)
    save_backbone(model, tmp_path / "w.safetensors")
    config = small_config(init=str(tmp_path / "w.safetensors"))
    trainer = Trainer(config, images, tmp_path / "out", CPU, resume=True)
    for network in (trainer.method.student, trainer.method.teacher):
        assert torch.equal(network.backbone.pos_embed, model.pos_embed)
    with pytest.raises(CheckpointError, match="weights do not fit"):
        Trainer(config.replace(model={**config.model.model_dump(), "depth": 3}), images,
                tmp_path / "other", CPU, resume=True)  # fmt: skip


def test_config__refuses_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"crops\.local_size 30 is no multiple.*28 or 42"):
        small_config(crops={"local_size": 30})
    with pytest.raises(ConfigError, match="did you mean 'drop_path'"):
        small_config(model={"drop_pth": 0.1})
    with pytest.raises(ConfigError, match="one of configs/pretrain: copy, demo"):
        load_config("missing")
    with pytest.raises(ConfigError, match="want key=value"):
        load_config("demo", ["optim.steps"])


def test_load_config__name_and_overrides() -> None:
    config = load_config("demo", ["optim.steps=3", "crops.blur=nominal"])
    assert isinstance(config, PretrainConfig)
    assert (config.optim.steps, config.crops.blur) == (3, "nominal")


def test_peak_lr__follows_the_effective_batch() -> None:
    config = small_config(optim={"lr_scaling": "sqrt_wrt_1024", "batch_size": 256, "base_lr": 2e-4})
    assert config.peak_lr(12) == pytest.approx(2e-4 * 3**0.5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_run__half_precision_with_recomputed_activations(
    images: str, tmp_path: Path, precision: str
) -> None:
    settings = {"precision": precision, "checkpoint_activations": True}
    full = run(small_config(optim={"steps": 3}), images, str(tmp_path / "full"))
    half = run(small_config(optim={"steps": 3}, run=settings), images, str(tmp_path / "half"))
    assert half.first["loss"] == pytest.approx(full.first["loss"], rel=0.02)
    assert half.finished  # float16's scaler skips steps until its scale fits


def test_run__accumulated_parts_are_the_whole_batch(images: str, tmp_path: Path) -> None:
    """Apart from KoLeo, which seeks neighbors within a part."""
    loss = {**small_config().loss.model_dump(), "koleo_weight": 0.0}
    rest = {"model": {"drop_path": 0.0}, "loss": loss}
    whole = run(small_config(**rest), images, str(tmp_path / "whole"))
    config = small_config(**rest, optim={"batch_size": 2, "accumulate": 2})
    parts = run(config, images, str(tmp_path / "parts"))
    ours, theirs = ([r["loss"] for r in read_lines(x.log)] for x in (parts, whole))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_run__knn_and_signs_of_collapse_are_logged(images: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.jpg").write_bytes(jpeg(i + 3 * (name == "b")))
    (tmp_path / "labeled").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).rename(tmp_path / "labeled" / name)
    labeled = str(tmp_path / "labeled")
    knn = {"train": labeled, "test": labeled, "every_steps": 2, "k": 1}
    result = run(small_config(optim={"steps": 2}, knn=knn), images, str(tmp_path / "out"))
    assert result.last["knn"] == 1.0
    assert result.last["feature_rank"] > 1
    assert 0 < result.last["teacher_entropy"] <= 1


@pytest.mark.slow
def test_run__killed_at_three_steps_and_resumed(images: str, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pretrain.train import run\n"
        "from tests.pretrain.small_runs import small_config\n"
        "def progress(record):\n"
        "    if record['step'] == int(sys.argv[3]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "run(small_config(run={'checkpoint_every_steps': 2}), *sys.argv[1:3], progress=progress)\n"
    )
    for step in (1, 3, 5):
        command = [sys.executable, "-c", script, images, str(tmp_path / "killed"), str(step)]
        assert subprocess.run(command, check=False, timeout=200).returncode == -signal.SIGKILL
    config = small_config(run={"checkpoint_every_steps": 2})
    resumed = run(config, images, str(tmp_path / "killed"))
    assert losses(resumed) == losses(run(config, images, str(tmp_path / "calm")))
