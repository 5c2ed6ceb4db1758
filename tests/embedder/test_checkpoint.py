from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from embedder.checkpoint import load_backbone, public_names, read_weights, save_backbone
from embedder.errors import CheckpointError
from embedder.vit import VisionTransformer, ViTConfig

SMALL = ViTConfig(64, 2, 1, patch=14, image_size=70, registers=2, ffn="swiglu")


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(SMALL).eval()


def assert_same(a: VisionTransformer, b: VisionTransformer) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


def test_save_backbone__round_trip_keeps_the_architecture(
    model: VisionTransformer, tmp_path: Path
) -> None:
    save_backbone(model, tmp_path / "a" / "backbone.safetensors")
    loaded = load_backbone(tmp_path / "a" / "backbone.safetensors")
    assert loaded.config == SMALL
    assert_same(model, loaded)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["backbone.safetensors"]


def chunked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As saved by training with two blocks a chunk: blocks.<chunk>.<i>."""
    return {
        "backbone." + key.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): v
        for key, v in state.items()
    }


def test_load_backbone__teacher_dump_with_chunks_and_heads(
    model: VisionTransformer, tmp_path: Path
) -> None:
    state = chunked(model.state_dict()) | {"dino_head.mlp.0.weight": torch.zeros(2, 2)}
    torch.save({"teacher": state}, tmp_path / "teacher.pth")
    assert_same(model, load_backbone(tmp_path / "teacher.pth"))


def test_load_backbone__released_file_without_architecture(
    model: VisionTransformer, tmp_path: Path
) -> None:
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = load_backbone(tmp_path / "w.pth")
    assert (loaded.config.heads, loaded.config.registers, loaded.config.ffn) == (1, 2, "swiglu")


def test_load_backbone__mismatch_lists_keys(model: VisionTransformer, tmp_path: Path) -> None:
    state = model.state_dict()
    del state["blocks.1.ls1.gamma"]
    state["blocks.0.norm1.bias"] = torch.zeros(3)
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        load_backbone(tmp_path / "w.pth", SMALL)
    assert "missing: blocks.1.ls1.gamma" in str(caught.value)
    assert "unexpected: extra" in str(caught.value)
    assert "blocks.0.norm1.bias (3,) for (64,)" in str(caught.value)


def test_load_backbone__another_depth_is_refused(model: VisionTransformer, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"unexpected: blocks\.1"):
        load_backbone(tmp_path / "w.pth", ViTConfig(64, 1, 1, 14, 70, "swiglu", registers=2))


def test_load_backbone__keeps_a_grid_of_another_size(
    model: VisionTransformer, tmp_path: Path
) -> None:
    torch.save(model.state_dict(), tmp_path / "w.pth")
    config = ViTConfig(64, 2, 1, 14, 98, "swiglu", registers=2)
    loaded = load_backbone(tmp_path / "w.pth", config)
    assert loaded.config.image_size == 70
    assert loaded(torch.zeros(1, 3, 98, 98)).patches.shape == (1, 49, 64)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_read_weights__damaged_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="not a readable"):
        read_weights(tmp_path / name)
    with pytest.raises(CheckpointError, match="no such weight file"):
        read_weights(tmp_path / "missing.pth")


class Trap:
    """A pickled call, which loading must refuse to make."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("trapped"),)  # type: ignore[return-value]


def test_read_weights__runs_no_pickled_code(tmp_path: Path) -> None:
    torch.save({"cls_token": Trap()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="not a readable"):
        read_weights(tmp_path / "w.pth")


def test_public_names__nothing_of_a_backbone() -> None:
    with pytest.raises(CheckpointError, match=r"holds no backbone.*fc\.weight"):
        public_names({"fc.weight": torch.zeros(1)}, where="x", max_bytes=4)


def test_load_backbone__any_damaged_byte_is_noticed(tmp_path: Path) -> None:
    config = ViTConfig(width=8, depth=1, heads=2, patch=14, image_size=28)
    path = tmp_path / "w.safetensors"
    save_backbone(VisionTransformer(config), path)
    whole = path.read_bytes()
    found = load_backbone(path).state_dict()
    rng = np.random.default_rng(0)
    for at in [*rng.integers(8, len(whole), 200)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            now = load_backbone(path).state_dict()
        except CheckpointError:
            continue
        assert all(torch.equal(value, found[name]) for name, value in now.items())
