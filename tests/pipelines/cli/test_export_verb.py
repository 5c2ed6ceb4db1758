"""`curate export` on a run that `curate pretrain` left."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from curation.dataset import commit, write_shard
from curation.errors import ConfigError
from curation.schema import schema_of
from embedder.encoder import load_encoder
from embedder.encoders.dinov2 import license_of
from pipelines.audit.model_card import data_facts
from pipelines.cli.app import app
from pretrain.train import run
from tests.pretrain.small_runs import jpeg, small_config, write_shards

CLI = CliRunner()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    images = [(f"{i:032x}", jpeg(i), None) for i in range(8)]
    packed = write_shards(folder / "packed", [images]) / "_manifest.json"
    packed.write_text(
        packed.read_text().replace('"content_digest": ""', '"content_digest": "c0de"')
    )
    run(small_config(optim={"steps": 1}), str(folder / "packed"), str(folder / "run"))
    return folder


@pytest.mark.parametrize("format", ["safetensors", "huggingface", "timm"])
def test_export__writes_weights_and_card(trained: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / "model"
    command = ["export", str(trained / "run"), "--format", format, "--out", str(out)]
    result = CLI.invoke(app, [*command, "--license", "cc-by-4.0"], catch_exceptions=False)
    assert result.exit_code == 0
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "manifest digest: `c0de`" in card
    assert "images: 8" in card
    assert "method: DINOv2 pretraining" in card
    assert "images: unknown; the data names no licenses" in card
    with safe_open(out / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["license"] == "cc-by-4.0"
    assert json.loads(metadata["vit_config"])["width"] == 24


def export(*arguments: object) -> None:
    result = CLI.invoke(app, ["export", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("safetensors", "dinov2:{out}/model.safetensors"),
        ("huggingface", "dinov2:{out}"),
        ("timm", "dinov2:{out}"),
        ("onnx", "onnx:{out}/model.onnx"),
    ],
)
def test_export__the_license_stays_with_the_weights(
    trained: Path, tmp_path: Path, format: str, name: str
) -> None:
    given, again = tmp_path / "given", tmp_path / "again"
    export(trained / "run", "--format", format, "--out", given, "--license", "cc-by-nc-4.0")
    assert load_encoder(name.format(out=given), device="cpu").license == "cc-by-nc-4.0"
    if format == "timm":
        config = json.loads((given / "config.json").read_text())
        assert config["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
    if format != "onnx":
        export(given if format != "safetensors" else given / "model.safetensors", "--out", again)
        assert (again / "README.md").read_text().startswith("---\nlicense: cc-by-nc-4.0\n")


def test_license__of_weights_that_name_none_is_unknown(trained: Path, tmp_path: Path) -> None:
    file = trained / "run" / "backbone.safetensors"
    assert load_encoder(f"dinov2:{file}").license == "unknown"
    export(file, "--out", tmp_path)
    assert (tmp_path / "README.md").read_text().startswith("---\nlicense: unknown\n")
    assert load_encoder("dinov2:vits14:random").license == "none (random weights)"
    assert license_of("vits14") == "Apache-2.0 (public weights)"
    assert license_of("/w/dinov2_vitb14_reg4_pretrain.pth") == "Apache-2.0 (public weights)"


def test_export__what_cannot_be_is_one_line(trained: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([str(trained / "run"), "--format", "gguf"], "known: safetensors, onnx, huggingface, timm"),
        ([str(trained / "nowhere")], "no such run or weight file"),
    ):
        result = CLI.invoke(app, ["export", *arguments, "--out", str(tmp_path)])
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)


def test_data_facts__counts_sets_and_licenses(tmp_path: Path) -> None:
    schema = schema_of(["id", "source_set", "license"])
    rows = {
        "id": [f"{i:032x}" for i in range(4)],
        "source_set": ["web", "web", "web", "seeds"],
        "license": ["CC0", None, "CC0", None],
    }
    info = write_shard(str(tmp_path / "m"), 0, pa.table(rows, schema=schema))
    commit(str(tmp_path / "m"), schema, [info])
    facts = data_facts(str(tmp_path / "m"))
    assert facts.images == 4
    assert facts.sets == {"web": 3, "seeds": 1}
    assert facts.licenses == {"CC0": 2, "unknown": 2}
