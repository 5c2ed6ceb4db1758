"""The copy method: what it computes once, what it learns, what it leaves, and how it goes on."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from curation.config import parse_settings
from curation.errors import ConfigError
from embedder.checkpoint import save_backbone
from embedder.encoder import embed_images, load_encoder
from embedder.encoders.copy_head import load_copy_head
from embedder.errors import CheckpointError, EncoderError
from embedder.images import decode
from embedder.vit import VisionTransformer, vit_config
from pretrain.building import refuse_misfit
from pretrain.copy_config import CopyConfig
from pretrain.rehearsal import rehearse
from pretrain.run_log import read_lines
from pretrain.sources import open_source
from pretrain.train import run
from pretrain.view_features import ViewFeatures
from tests.pretrain.small_runs import jpeg, stop_after, write_folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("data") / "images", 40))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A toy trunk: the features of tests cost next to nothing."""
    torch.manual_seed(0)
    vit = vit_config("vits14", width=48, depth=3, heads=3, image_size=56, layerscale=1.0)
    path = tmp_path_factory.mktemp("trunk") / "toy.safetensors"
    save_backbone(VisionTransformer(vit), path)
    return f"dinov2:{path}"


@pytest.fixture
def config(backbone: str) -> Callable[..., CopyConfig]:
    def build(**changes: Any) -> CopyConfig:
        values: dict[str, Any] = {
            "trunk": backbone,
            "width": 16,
            "optim": {"steps": 8, "batch_size": 8, "warmup_steps": 2},
            "held_out": {"every_steps": 4},
            "run": {"threads": 1, "device": "cpu", "log_every_steps": 1},
        }
        for key, value in changes.items():
            merged = isinstance(value, dict) and key in values
            values[key] = {**values[key], **value} if merged else value
        return parse_settings(CopyConfig, values, "small")

    return build


def test_run__recall_rises_within_a_minute(
    config: Callable[..., CopyConfig], tmp_path: Path
) -> None:
    """On pictures that edits change more than the trunk, which was never trained, tells apart."""
    folder = write_folder(tmp_path / "images", 200)
    settings = config(
        width=32,
        views={"strong": 0.0},
        optim={"steps": 150, "batch_size": 64},
        held_out={"every_steps": 1, "recall": 0.01, "false_pairs": 0.01},
    )
    run(settings, str(folder), str(tmp_path / "out"))
    recall = [record["recall"] for record in read_lines(tmp_path / "out" / "log.jsonl")]
    assert recall[-1] > recall[0] + 0.02


def test_run__leaves_an_encoder_with_its_thresholds(
    images: str, config: Callable[..., CopyConfig], tmp_path: Path
) -> None:
    result = run(config(), images, str(tmp_path))
    assert result.finished
    assert result.backbone == tmp_path / "copy.safetensors"
    encoder = load_encoder(f"copy:{tmp_path}", device="cpu")
    head = load_copy_head(result.backbone)
    assert encoder.thresholds == head.thresholds
    assert head.measured["recall"] == result.last["recall"]
    (rows,) = embed_images([encoder], [decode(jpeg(number)) for number in range(3)])
    assert rows.shape == (3, 16)
    assert np.allclose(np.linalg.norm(rows.astype(np.float32), axis=1), 1, atol=1e-3)
    listed = json.loads((tmp_path / "closest.json").read_text())
    assert listed[0]["cosine"] >= listed[-1]["cosine"]
    assert load_encoder(f"copy:{result.backbone}", device="cpu").space == encoder.space


def test_run__stopped_and_resumed_is_the_same_head(
    images: str, config: Callable[..., CopyConfig], tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(config(), images, str(whole))
    first = run(config(), images, str(stopped), progress=stop_after(3))
    assert not first.finished
    run(config(), images, str(stopped))
    one, other = (load_copy_head(out / "copy.safetensors") for out in (whole, stopped))
    assert one.projection.digest == other.projection.digest
    assert (one.thresholds, one.measured) == (other.thresholds, other.measured)
    with pytest.raises(CheckpointError, match="width = 16, now it is 8"):
        run(config(width=8), images, str(stopped))


def test_views__held_out_images_are_never_trained_on_and_features_are_kept(
    images: str, config: Callable[..., CopyConfig], tmp_path: Path
) -> None:
    views = ViewFeatures(open_source(images), config(), tmp_path)
    trained, held_out = views.trained(), views.held_out()
    assert len(trained.ids) == 30
    assert not set(trained.ids) & set(held_out.ids)
    assert trained.blocks[0].shape == (30, 4, views.num_statistics)
    assert held_out.blocks[0].shape == (10, 8, views.num_statistics)
    batches = islice(views.batches(0), 8)
    seen = {name for batch in batches for name in batch.ids}
    assert seen == set(trained.ids)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    again = ViewFeatures(open_source(images), config(), tmp_path)
    assert np.array_equal(again.trained().blocks[0], trained.blocks[0])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == stamps
    other = ViewFeatures(open_source(images), config(run={"seed": 1}), tmp_path)
    assert not np.array_equal(other.trained().blocks[0], trained.blocks[0])


def test_run__a_bad_image_is_left_out_and_listed(
    config: Callable[..., CopyConfig], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "images", 40)
    for number in range(4):
        (folder / f"{number:03d}.jpg").write_bytes(b"\xff\xd8 no image")
    result = run(config(optim={"steps": 2}), str(folder), str(tmp_path / "out"))
    assert result.finished
    assert result.bad_images == 4
    listed = read_lines(tmp_path / "out" / "bad_images.jsonl")
    assert sorted(record["id"] for record in listed) == [f"{n:03d}.jpg" for n in range(4)]


def test_rehearse__tells_what_the_features_will_cost(
    images: str, config: Callable[..., CopyConfig]
) -> None:
    found = rehearse(config(), images)
    assert (found.data["images"], found.batch) == (40, 8)
    assert found.seconds_before > 0
    assert set(found.schedules[0]) == {"step", "lr", "weight_decay"}


def test_config__refuses_what_cannot_be(config: Callable[..., CopyConfig]) -> None:
    with pytest.raises(ConfigError, match=r"optim\.accumulate"):
        config(optim={"accumulate": 2})
    with pytest.raises(ConfigError, match=r"held_out\.share"):
        config(held_out={"share": 1.0})
    with pytest.raises(ConfigError, match="one process, found 2"):
        refuse_misfit(config(), 2)


def test_views__too_few_images_or_no_such_trunk(
    config: Callable[..., CopyConfig], tmp_path: Path
) -> None:
    few = open_source(str(write_folder(tmp_path / "few", 12)))
    with pytest.raises(ConfigError, match="12 images, of which 3 are held out"):
        ViewFeatures(few, config(), tmp_path)
    with pytest.raises(EncoderError, match="'resnet': want lite, or dinov2:FILE"):
        ViewFeatures(few, config(trunk="resnet"), tmp_path)


def test_load__no_head_and_another_trunk_are_one_line(
    images: str, config: Callable[..., CopyConfig], backbone: str, tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match="no file"):
        load_encoder(f"copy:{tmp_path / 'gone'}")
    with pytest.raises(EncoderError, match="no copy head"):
        load_encoder(f"copy:{backbone.partition(':')[2]}")
    run(config(optim={"steps": 2}), images, str(tmp_path))
    torch.manual_seed(1)
    vit = vit_config("vits14", width=48, depth=3, heads=3, image_size=56, layerscale=1.0)
    path = Path(backbone.partition(":")[2])
    kept = path.read_bytes()
    save_backbone(VisionTransformer(vit), path)
    try:
        with pytest.raises(EncoderError, match="learned on other weights"):
            load_encoder(f"copy:{tmp_path}")
    finally:
        path.write_bytes(kept)
