"""Files of weights from strangers: they run nothing, end soon, and fail in one line."""

import gc
import json
import struct
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import Tensor, nn

from embedder.checkpoint import CONFIG_KEY, load_backbone, save_backbone
from embedder.encoder import load_encoder
from embedder.encoders.torchscript import load_torchscript
from embedder.errors import CheckpointError, CurateError, EncoderError
from embedder.vit import VisionTransformer, ViTConfig

TINY = ViTConfig(width=8, depth=2, heads=2, patch=14, image_size=28)
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*:FutureWarning")


# --- TorchScript --------------------------------------------------------------------------------


class MapsFile(nn.Module):
    """Creates a file when it is run."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_file(self.path, shared=True, size=2).expand(images.shape[0], 2)


class Prints(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        print(images)  # noqa: T201
        return images.mean((2, 3))


def scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))
    return path


def test_sscd__a_program_that_writes_files_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "written"
    path = scripted(MapsFile(str(target)), tmp_path / "a.pt")
    with pytest.raises(EncoderError, match=r"names from_file, .* onnx:FILE") as caught:
        load_encoder(f"sscd:{path}")
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_load_torchscript__a_method_that_loading_runs_is_not_run(tmp_path: Path) -> None:
    """`__setstate__` runs while a file is loaded."""
    target = tmp_path / "written"

    class Sets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = torch.zeros(2)

        @torch.jit.export
        def __getstate__(self) -> tuple[str, bool]:
            return "PATH", self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]) -> None:
            self.x = torch.from_file(state[0], shared=True, size=2)
            self.training = state[1]

        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    path = scripted(Sets(), tmp_path / "a.pt")
    with pytest.raises(EncoderError, match="from_file"):
        load_torchscript(path)
    assert not target.exists()


def test_load_torchscript__what_reaches_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="names print"):
        load_torchscript(scripted(Prints(), tmp_path / "a.pt"))


class CopyNetwork(nn.Module):
    """As SSCD: a ResNet, generalized mean, a projection, unit length."""

    def __init__(self) -> None:
        from torchvision.models import resnet18

        super().__init__()
        self.backbone = resnet18(num_classes=16)
        self.backbone.avgpool = GeM()

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(self.backbone(images))


class GeM(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        size = (maps.size(-2), maps.size(-1))
        return nn.functional.avg_pool2d(maps.clamp(min=1e-6).pow(3.0), size).pow(1 / 3)


@pytest.mark.parametrize("traced", [True, False])
def test_load_torchscript__networks_for_images_load(tmp_path: Path, traced: bool) -> None:
    network, images = CopyNetwork().eval(), torch.rand(1, 3, 64, 64)
    path = tmp_path / "a.pt"
    if traced:
        torch.jit.trace(network, images).save(str(path))
    else:
        scripted(network, path)
    assert torch.allclose(load_torchscript(path)(images), network(images), atol=1e-5)


# --- weights that never end ---------------------------------------------------------------------


def tiny_weights() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in VisionTransformer(TINY).state_dict().items()}


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_backbone(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("number", [7, 10**9, 10**30])
def test_load_backbone__a_block_of_any_number(tmp_path: Path, number: int) -> None:
    weights = tiny_weights()
    weights[f"blocks.{number}.norm1.weight"] = torch.zeros(8)
    save_file(weights, tmp_path / "a.safetensors")
    assert f"of its {number + 1} blocks" in refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 10**9},
        {"width": 10**7, "heads": 1},
        {"registers": 10**12},
        {"ffn_ratio": 1e300},
        {"heads": 0},
        {"patch": 0},
        {"patch": 10**9},
        {"depth": "2"},
        {"width": None},
        {"unknown": 1},
    ],
)
def test_load_backbone__metadata_that_claims_anything(
    tmp_path: Path, change: dict[str, object]
) -> None:
    config = json.dumps({"width": 8, "depth": 2, "heads": 2, "image_size": 28, **change})
    save_file(tiny_weights(), tmp_path / "a.safetensors", metadata={CONFIG_KEY: config})
    refused(tmp_path / "a.safetensors")


def test_load_backbone__tensors_larger_than_their_file(tmp_path: Path) -> None:
    weights = tiny_weights()
    weights["blocks.0.mlp.fc1.weight"] = torch.zeros(1, 1).expand(10**7, 10**6)
    torch.save(weights, tmp_path / "a.pth")
    assert "larger than the file" in refused(tmp_path / "a.pth")
    header = json.dumps({"cls_token": {"dtype": "F32", "shape": [1, 1, 10**12],
                                       "data_offsets": [0, 4 * 10**12]}}).encode()  # fmt: skip
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    refused(tmp_path / "b.safetensors")


def test_load_backbone__values_that_are_no_tensors(tmp_path: Path) -> None:
    torch.save({**tiny_weights(), "pos_embed": "x"}, tmp_path / "a.pth")
    assert "'pos_embed' is no tensor but a str" in refused(tmp_path / "a.pth")
    torch.save({"cls_token": torch.zeros(())}, tmp_path / "b.pth")
    refused(tmp_path / "b.pth")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    save_backbone(VisionTransformer(TINY), path)
    torch.save(tiny_weights(), path.with_suffix(".pth"))
    return path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), suffix=st.sampled_from([".safetensors", ".pth"]))
def test_load_backbone__damaged_files_load_or_fail_in_one_line(
    whole: Path, data: st.DataObject, suffix: str
) -> None:
    raw = bytearray(whole.with_suffix(suffix).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(2000, len(raw) - 1)))] = data.draw(st.integers(0, 255))
    path = whole.with_name(f"damaged{suffix}")
    path.write_bytes(raw[: data.draw(st.integers(1, len(raw)))])
    try:
        load_backbone(path)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # libraries leave refused files open
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".npy", ".pt", ".bin", ".onnx"])
@pytest.mark.parametrize(
    "name",
    ["open_clip:RN50/FILE", "timm:resnet10t:FILE", "dinov2:vits14:FILE", "onnx:FILE", "sscd:FILE"],
)
@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04" + bytes(100), bytes(300)])
def test_load_encoder__nonsense_is_one_line(
    tmp_path: Path, name: str, suffix: str, content: bytes
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CurateError) as caught:
        load_encoder(name.replace("FILE", str(path)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    del caught
    gc.collect()


# --- ONNX ---------------------------------------------------------------------------------------


def onnx_file(path: Path, metadata: dict[str, str], location: str = "") -> Path:
    """(1, 3, 8, 8) to (1, 3): a mean times a weight, which may lie in another file."""
    weight = onnx.numpy_helper.from_array(np.ones(3, np.float32), "w")
    if location:
        onnx.external_data_helper.set_external_data(weight, location, 0, 12)
        weight.ClearField("raw_data")
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("Mul", ["m", "w"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, metadata)
    path.write_bytes(model.SerializeToString())
    return path


def test_onnx__reads_no_file_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(np.full(3, 7, np.float32).tobytes())
    (tmp_path / "model").mkdir()
    for location in ("../secret", str(tmp_path / "secret")):
        path = onnx_file(tmp_path / "model" / "a.onnx", {}, location)
        with pytest.raises(EncoderError, match="no ONNX file that runs here"):
            load_encoder(f"onnx:{path}", device="cpu")


@pytest.mark.parametrize(
    "metadata",
    [
        {"image_size": "1e9"},
        {"image_size": "1000000000"},
        {"image_size": "-14"},
        {"image_size": "9" * 5000},
        {"mean": "[1, 2]"},
        {"mean": "nonsense"},
        {"std": '{"a": 1}'},
        {"std": "[null, 1, 2]"},
    ],
)
def test_onnx__metadata_that_says_anything(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = onnx_file(tmp_path / "a.onnx", metadata)
    with pytest.raises(EncoderError) as caught:
        load_encoder(f"onnx:{path}", device="cpu")
    assert "\n" not in str(caught.value)
