import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from embedder.vit import VisionTransformer, ViTConfig, draw_subset, vit_config

GOLDEN = json.loads((Path(__file__).parents[1] / "pretrain" / "golden.json").read_text())
SMALL = ViTConfig(24, 2, 3, patch=14, image_size=70)


def g(shape: tuple[int, ...], a: float = 0.37, b: float = 0.0) -> Tensor:
    count = int(np.prod(shape))
    return torch.from_numpy(np.sin(a * np.arange(count) + b).astype(np.float32)).view(shape)


def formula_vit(config: ViTConfig = SMALL, shift: float = 0.0) -> VisionTransformer:
    model = VisionTransformer(config)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        one = 1.0 if ("norm" in name and name.endswith("weight")) or "gamma" in name else 0.0
        parameter.data = 0.05 * g(tuple(parameter.shape), 0.37, i + shift) + one
    return model.eval()


def near(ours: Tensor, golden: list[float]) -> None:
    torch.testing.assert_close(ours, torch.tensor(golden), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", [70, 98])
@torch.no_grad()
def test_vit__golden(side: int) -> None:
    golden = GOLDEN[f"vit_mlp_{side}x{side}"]
    tokens = formula_vit()(g((2, 3, side, side), 0.013))
    near(tokens.cls[0, :4], golden["cls"])
    near(tokens.patches[-1, -1, :4], golden["patch_last"])
    near(tokens.prenorm.abs().mean(), golden["mean_abs"])


@torch.no_grad()
def test_vit__golden_masked() -> None:
    masks = torch.zeros(2, 25, dtype=torch.bool)
    masks[0, 3:9] = True
    tokens = formula_vit()(g((2, 3, 70, 70), 0.013), masks)
    near(tokens.cls[0, :4], GOLDEN["vit_mlp_masked"]["cls"])
    near(tokens.patches[0, 5, :4], GOLDEN["vit_mlp_masked"]["patch5"])


def test_vit__public_parameter_order() -> None:
    assert [n for n, _ in VisionTransformer(SMALL).named_parameters()] == GOLDEN[
        "vit parameter order"
    ]


def test_vit__swiglu_shapes() -> None:
    state = VisionTransformer(ViTConfig(24, 2, 3, 14, 70, "swiglu")).state_dict()
    for name, shape in GOLDEN["swiglu_shapes"].items():
        assert list(state[name].shape) == shape


@pytest.mark.parametrize(
    ("key", "antialias", "side"),
    [
        ("posemb off0.1 aaFalse 224x224", False, 224),
        ("posemb off0.0 aaTrue 98x98", True, 98),
        ("posemb off0.1 aaFalse 518x518", False, 518),
    ],
)
@torch.no_grad()
def test_interpolated_pos_embed__golden(key: str, antialias: bool, side: int) -> None:
    with torch.device("meta"):
        model = VisionTransformer(vit_config("vits14", antialias=antialias))
    model.pos_embed = torch.nn.Parameter(g((1, 1370, 384)))
    ours = model.interpolated_pos_embed(side // 14, side // 14)
    assert list(ours.shape) == GOLDEN[key]["shape"]
    near(ours[0, 1, :4], GOLDEN[key]["patch0"])
    near(ours[0, -1, :4], GOLDEN[key]["last"])
    near(ours.abs().sum(), GOLDEN[key]["sum_abs"])


@pytest.mark.parametrize(
    ("name", "parameters", "keys"),
    [
        ("vits14", 22_056_576, 175),
        ("vitb14", 86_580_480, None),
        ("vitl14", 304_368_640, None),
        ("vitg14", 1_136_480_768, 567),
        ("vits14_reg", 22_058_112, None),
        ("vitg14_reg", 1_136_486_912, None),
    ],
)
def test_vit_config__released_sizes(name: str, parameters: int, keys: int | None) -> None:
    with torch.device("meta"):
        model = VisionTransformer(vit_config(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert keys is None or len(model.state_dict()) == keys


def test_vit_config__unknown_name() -> None:
    with pytest.raises(ValueError, match="vitx14"):
        vit_config("vitx14")


@torch.no_grad()
def test_forward_packed__equals_one_pass_a_size() -> None:
    config = ViTConfig(24, 2, 3, 14, 70, registers=4, antialias=True)
    model = formula_vit(config)
    crops = [g((3, 3, 70, 70), 0.013), g((4, 3, 42, 56), 0.029)]
    packed = model.forward_packed(crops, [None, None])
    for crop, tokens in zip(crops, packed, strict=True):
        alone = model(crop)
        torch.testing.assert_close(tokens.cls, alone.cls)
        torch.testing.assert_close(tokens.patches, alone.patches)
        assert tokens.registers.shape == (len(crop), 4, 24)


def test_draw_subset__keeps_whole_images_and_expectation() -> None:
    subset = draw_subset(
        ((4, 3), (5, 2)), 0.5, torch.Generator().manual_seed(0), torch.device("cpu")
    )
    assert subset is not None
    assert subset.layout == ((2, 3), (2, 2))
    first, second = subset.rows[:6].view(2, 3), subset.rows[6:].view(2, 2)
    assert torch.equal(first - first[:, :1], torch.arange(3).expand(2, 3))
    assert (second >= 12).all()
    assert subset.scale[0] == 2
    assert subset.scale[-1] == 2.5


def test_forward_packed__stochastic_depth_is_seeded_and_survives_recomputation() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(24, 2, 3, 14, 70, drop_path=0.5)).train()
    crops = [g((4, 3, 70, 70), 0.013)]

    def gradient(checkpointed: bool) -> Tensor:
        model.checkpoint_blocks = checkpointed
        model.zero_grad()
        tokens = model.forward_packed(crops, [None], torch.Generator().manual_seed(3))
        tokens[0].cls.square().sum().backward()
        assert model.cls_token.grad is not None
        return model.cls_token.grad.clone()

    assert torch.equal(gradient(False), gradient(True))


@torch.no_grad()
def test_intermediate__last_is_forward() -> None:
    model, images = formula_vit(), g((2, 3, 70, 70), 0.013)
    first, last = model.intermediate(images, [0, -1])
    assert torch.equal(last.cls, model(images).cls)
    assert not torch.equal(first.cls, last.cls)


def test_forward__refuses_sizes_off_the_patch() -> None:
    with pytest.raises(ValueError, match="75x70"):
        formula_vit()(torch.zeros(1, 3, 75, 70))
