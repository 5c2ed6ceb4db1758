"""Other libraries load what we export and see what we see; and what they save loads back."""

import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from embedder.checkpoint import load_backbone
from embedder.encoder import embed_images, load_encoder
from embedder.encoders.torch_trunk import IMAGENET_MEAN, IMAGENET_STD
from embedder.errors import CheckpointError
from embedder.export import export_backbone
from embedder.images import decode, resize
from embedder.onnx_export import resize_matrix
from embedder.peers import Peer, with_interpolation
from embedder.vit import VisionTransformer, ViTConfig, vit_config
from pipelines.audit.model_card import DataFacts, model_card
from pretrain.batch import normalize

SIZES = ((224, 224), (518, 518), (336, 560))
ARCHITECTURES = ("vits14", "vits14_reg", "vitg14", "vitg14_reg")
CLOSE = {"rtol": 0.0, "atol": 1e-4}


def small(name: str, seed: int = 0) -> VisionTransformer:
    """A narrow, shallow model of a kind, all of whose parameters matter."""
    torch.manual_seed(seed)
    model = VisionTransformer(vit_config(name, width=48, depth=2, heads=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def retuned(model: VisionTransformer, peer: Peer) -> VisionTransformer:
    """The same weights, positions interpolated as a peer does."""
    other = VisionTransformer(with_interpolation(model.config, peer))
    other.load_state_dict(model.state_dict())
    return other.eval()


@torch.no_grad()
def tokens(model: VisionTransformer, images: Tensor) -> Tensor:
    found = model(images)
    return torch.cat([found.cls[:, None], found.registers, found.patches], dim=1)


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> list[np.ndarray]:
    return [decode(p.read_bytes()) for p in sorted((shared_data / "photos").glob("*.jpg"))[:20]]


def batch(photos: list[np.ndarray], height: int, width: int) -> Tensor:
    stacked = np.stack([resize(photo, width, height) for photo in photos])
    return normalize(torch.from_numpy(stacked).permute(0, 3, 1, 2))


def exported(name: str, format: str, folder: Path) -> tuple[VisionTransformer, Path]:
    model = small(name)
    out = folder / f"{name}-{format}"
    export_backbone(model, format, out)
    return model, out


def peer_tokens(format: str, folder: Path, model: VisionTransformer, images: Tensor) -> Tensor:
    with torch.no_grad():
        if format == "timm":
            peer = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            return peer.forward_features(images)
        kind = Dinov2WithRegistersModel if model.config.registers else Dinov2Model
        peer, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        return peer.eval()(images).last_hidden_state


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("format", ["huggingface", "timm"])
def test_export__peers_agree_on_photos(
    photos: list[np.ndarray], name: str, format: Peer, tmp_path: Path
) -> None:
    model, out = exported(name, format, tmp_path)
    for height, width in SIZES:
        shown = photos if height == 224 else photos[:4]
        images = batch(shown, height, width)
        theirs = peer_tokens(format, out, model, images)
        torch.testing.assert_close(theirs, tokens(retuned(model, format), images), **CLOSE)
        if model.config.registers or (height, width) == (518, 518):
            torch.testing.assert_close(theirs, tokens(model, images), **CLOSE)
        else:  # the offset of the public code, which the peers do without
            assert (theirs - tokens(model, images)).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["vits14", "vits14_reg"])
@pytest.mark.parametrize("format", ["huggingface", "timm", "onnx"])
def test_export__peers_agree_on_20_photos_at_full_size(
    photos: list[np.ndarray], name: str, format: Peer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(vit_config(name)).eval()
    export_backbone(model, format, tmp_path / "out")
    for height, width in SIZES:
        for start in range(0, len(photos), 5):
            images = batch(photos[start : start + 5], height, width)
            if format == "onnx":
                session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
                outputs = session.run(None, {"images": images.numpy()})
                theirs = torch.cat(
                    [torch.from_numpy(outputs[0])[:, None], *map(torch.from_numpy, outputs[1:])], 1
                )
                ours = tokens(model, images)
            else:
                theirs = peer_tokens(format, tmp_path / "out", model, images)
                ours = tokens(retuned(model, format), images)
            torch.testing.assert_close(theirs, ours, **CLOSE)


@pytest.mark.parametrize("name", ["vits14", "vitg14_reg"])
def test_export__onnx_at_dynamic_sizes(photos: list[np.ndarray], name: str, tmp_path: Path) -> None:
    model, out = exported(name, "onnx", tmp_path)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    for height, width in (*SIZES, (700, 14)):
        images = batch(photos[: 1 + height // 300], height, width)
        outputs = [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]
        theirs = torch.cat([outputs[0][:, None], *outputs[1:]], dim=1)
        torch.testing.assert_close(theirs, tokens(model, images), **CLOSE)
    export_backbone(model, "huggingface", tmp_path / "folder")
    encoders = [
        load_encoder(f"onnx:{out / 'model.onnx'}"),
        load_encoder(f"dinov2:{tmp_path / 'folder'}", precision="float32"),
    ]
    ours, theirs_rows = (rows.astype(np.float32) for rows in embed_images(encoders, photos[:3]))
    assert np.abs(ours - theirs_rows).max() < 1e-3  # both rounded to half precision


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("format", ["safetensors", "huggingface", "timm"])
def test_load_backbone__reads_every_format_back(name: str, format: str, tmp_path: Path) -> None:
    model, out = exported(name, format, tmp_path)
    loaded = load_backbone(out if format != "safetensors" else out / "model.safetensors")
    assert loaded.config == model.config
    images = torch.randn(1, 3, 70, 98)
    torch.testing.assert_close(tokens(loaded, images), tokens(model, images), **CLOSE)


@pytest.mark.parametrize("registers", [0, 4])
def test_load_backbone__random_weights_of_transformers(registers: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
             "patch_size": 14, "image_size": 518}  # fmt: skip
    if registers:
        peer = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape)).eval()
    else:
        peer = Dinov2Model(Dinov2Config(**shape)).eval()
    peer.save_pretrained(tmp_path)
    model = load_backbone(tmp_path)
    assert model.config.registers == registers
    for size in SIZES:
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            theirs = peer(images).last_hidden_state
        torch.testing.assert_close(theirs, tokens(retuned(model, "huggingface"), images), **CLOSE)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"])
def test_load_backbone__random_weights_of_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    shape = {"embed_dim": 192, "depth": 2, "num_heads": 3}
    peer = timm.create_model(name, num_classes=0, dynamic_img_size=True, **shape).eval()
    torch.save(peer.state_dict(), tmp_path / "weights.pth")
    model = load_backbone(tmp_path / "weights.pth")
    for size in SIZES:
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            theirs = peer.forward_features(images)
        torch.testing.assert_close(theirs, tokens(retuned(model, "timm"), images), **CLOSE)


PEER_SHAPE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
              "patch_size": 14, "image_size": 56}  # fmt: skip


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("saved", ["folder", "file", "torch file", "pytorch_model.bin"])
def test_load_backbone__of_a_classifier(
    registers: bool, saved: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same features as the classifier's own backbone gives; what is left out is said."""
    torch.manual_seed(1)
    if registers:
        kind, settings = Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig
    else:
        kind, settings = Dinov2ForImageClassification, Dinov2Config
    peer = kind(settings(**PEER_SHAPE, num_labels=5)).eval()
    path = {"folder": tmp_path, "file": tmp_path / "model.safetensors"}.get(saved)
    if saved == "torch file":  # without config.json heads are taken to be 64 wide
        peer = kind(settings(**{**PEER_SHAPE, "hidden_size": 128, "num_attention_heads": 2})).eval()
    peer.save_pretrained(tmp_path)
    if path is None:
        (tmp_path / "model.safetensors").unlink()
        path = tmp_path / ("w.pth" if saved == "torch file" else "pytorch_model.bin")
        torch.save(peer.state_dict(), path)
        path = path if saved == "torch file" else tmp_path
    model = load_backbone(path)
    assert "left out its classifier (classifier.bias, classifier.weight)" in caplog.text
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        theirs = peer.base_model(images).last_hidden_state
    torch.testing.assert_close(tokens(model, images), theirs, **CLOSE)


def test_load_backbone__of_other_classifiers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shape = {"embed_dim": 64, "depth": 1, "num_heads": 1, "img_size": 28}
    peer = timm.create_model("vit_small_patch14_dinov2", num_classes=3, **shape)
    torch.save(peer.state_dict(), tmp_path / "timm.pth")
    public = {f"backbone.{k}": v for k, v in small("vits14").state_dict().items()}
    torch.save({**public, "linear_head.weight": torch.zeros(3, 96)}, tmp_path / "hub.pth")
    for name, left_out in (("timm.pth", "head.bias, head.weight"), ("hub.pth", "linear_head")):
        load_backbone(tmp_path / name)
        assert f"{name}: left out its classifier ({left_out}" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_norm_eps": 1e-2}, "layer_norm_eps is 0.01; DINOv2's is 1e-06"),
        ({"hidden_act": "relu"}, "hidden_act is relu; DINOv2's is gelu"),
    ],
)
def test_load_backbone__functions_that_dinov2_has_not_are_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    Dinov2Model(Dinov2Config(**PEER_SHAPE, **change)).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
            load_backbone(path)
        assert "\n" not in str(caught.value)
    out = tmp_path / "timm"
    export_backbone(small("vits14"), "timm", out)
    config = json.loads((out / "config.json").read_text())
    config["model_args"]["act_layer"] = "relu"
    (out / "config.json").write_text(json.dumps(config))
    peer = timm.create_model(f"local-dir:{out}", pretrained=True)
    save_file(peer.state_dict(), out / "model.safetensors")
    with pytest.raises(CheckpointError, match="act_layer is relu"):
        load_backbone(out)


def test_load_backbone__an_activation_that_swiglu_does_not_use(tmp_path: Path) -> None:
    torch.manual_seed(1)
    settings = Dinov2Config(**PEER_SHAPE, use_swiglu_ffn=True, hidden_act="relu")
    peer = Dinov2Model(settings).eval()
    peer.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        theirs = peer(images).last_hidden_state
    torch.testing.assert_close(tokens(load_backbone(tmp_path), images), theirs, **CLOSE)


def test_load_backbone__dinov3_is_refused_by_name(tmp_path: Path) -> None:
    shape = {"embed_dim": 48, "depth": 1, "num_heads": 3}
    timm_s = timm.create_model("vit_small_patch16_dinov3", num_classes=0, **shape).state_dict()
    torch.save(timm_s, tmp_path / "timm.pth")
    settings = DINOv3ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96
    )
    DINOv3ViTModel(settings).save_pretrained(tmp_path / "folder")
    public = {"cls_token": torch.zeros(1, 1, 8), "storage_tokens": torch.zeros(1, 4, 8),
              "rope_embed.periods": torch.zeros(4)}  # fmt: skip
    torch.save(public, tmp_path / "public.pth")
    for name in ("timm.pth", "folder", "folder/model.safetensors", "public.pth"):
        with pytest.raises(CheckpointError, match=r"is no DINOv2 .* as DINOv3 is") as caught:
            load_backbone(tmp_path / name)
        assert "\n" not in str(caught.value)
    whole = timm.create_model("vit_small_patch16_dinov3", num_classes=0).state_dict()
    torch.save(whole, tmp_path / "whole.pth")
    load_encoder(f"timm:vit_small_patch16_dinov3:{tmp_path / 'whole.pth'}", device="cpu")


@pytest.mark.parametrize(("grid", "patch"), [(37, 14), (14, 16)])
def test_with_interpolation__positions_of_transformers_at_every_side(grid: int, patch: int) -> None:
    """Factors round to one row less at 546, 602 and 1,092 px, among others."""
    torch.manual_seed(0)
    shape = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 1,
             "patch_size": patch, "image_size": grid * patch}  # fmt: skip
    config = ViTConfig(12, 1, 1, patch, grid * patch)
    peer = Dinov2Model(Dinov2Config(**shape)).eval()
    model = VisionTransformer(with_interpolation(config, "huggingface")).eval()
    with torch.no_grad():
        model.pos_embed.copy_(peer.embeddings.position_embeddings)
        for count in (*range(1, 150), 172):
            tokens = torch.empty(1, 1 + count * (count + 1), 12)
            theirs = peer.embeddings.interpolate_pos_encoding(
                tokens, count * patch, (count + 1) * patch
            )
            ours = model.interpolated_pos_embed(count, count + 1)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(546, 602), (1092, 14)])
def test_export__transformers_agrees_where_factors_round(
    size: tuple[int, int], tmp_path: Path
) -> None:
    model, out = exported("vits14", "huggingface", tmp_path)
    images = torch.randn(1, 3, *size)
    theirs = peer_tokens("huggingface", out, model, images)
    torch.testing.assert_close(theirs, tokens(retuned(model, "huggingface"), images), **CLOSE)


def test_interpolated_pos_embed__plain_models_keep_the_public_factors() -> None:
    model = small("vits14")
    plane = model.pos_embed[:, 1:].detach().view(1, 37, 37, -1).permute(0, 3, 1, 2)
    scale = (39 + 0.1) / 37, (43 + 0.1) / 37
    public = torch.nn.functional.interpolate(plane, scale_factor=scale, mode="bicubic")
    ours = model.interpolated_pos_embed(39, 43)[:, 1:].detach()
    assert torch.equal(ours, public.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("count", [1, 5, 16, 37, 50])
@pytest.mark.parametrize("antialias", [False, True])
def test_resize_matrix__is_torch_s_bicubic(count: int, antialias: bool) -> None:
    torch.manual_seed(0)
    plane = torch.randn(1, 2, 37, 37)
    matrix = resize_matrix(count, torch.tensor(float(count)), 37, antialias=antialias)
    ours = torch.einsum("ia,jb,cab->cij", matrix, matrix, plane[0])
    theirs = torch.nn.functional.interpolate(
        plane, size=(count, count), mode="bicubic", antialias=antialias
    )[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_export__what_cannot_be_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="known: safetensors, onnx, huggingface, timm"):
        export_backbone(small("vits14"), "gguf", tmp_path)
    bare = VisionTransformer(ViTConfig(24, 1, 3, layerscale=None))
    with pytest.raises(CheckpointError, match="no DINOv2 without LayerScale"):
        export_backbone(bare, "huggingface", tmp_path)
    lean = VisionTransformer(ViTConfig(24, 1, 3, ffn_ratio=2.5))
    with pytest.raises(CheckpointError, match=r"wants a whole mlp_ratio, this is 2\.5"):
        export_backbone(lean, "huggingface", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(CheckpointError, match=r"is a folder; expected model\.safetensors"):
        load_backbone(tmp_path)


def test_processor__is_imagenet_s(tmp_path: Path) -> None:
    _, out = exported("vits14", "huggingface", tmp_path)
    values = json.loads((out / "preprocessor_config.json").read_text())
    assert (values["image_mean"], values["image_std"]) == ([*IMAGENET_MEAN], [*IMAGENET_STD])
    assert (values["size"], values["crop_size"]["height"]) == ({"shortest_edge": 256}, 224)


@pytest.mark.parametrize(
    ("patch", "side", "seen"), [(12, 240, 216), (14, 98, 98), (16, 512, 224), (15, 300, 210)]
)
def test_processor__gives_whole_patches(patch: int, side: int, seen: int, tmp_path: Path) -> None:
    """What `transformers` shows the model is what our encoder, the ONNX file and the card say."""
    model = VisionTransformer(ViTConfig(24, 1, 3, patch, side)).eval()
    export_backbone(model, "huggingface", tmp_path)
    photo = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    shown = processor(Image.fromarray(photo), return_tensors="pt")["pixel_values"]
    assert shown.shape == (1, 3, seen, seen)
    peer = Dinov2Model.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert peer(shown).last_hidden_state.shape[1] == 1 + (seen // patch) ** 2
    encoder = load_encoder(f"dinov2:{tmp_path}", device="cpu")
    assert encoder.preprocess(photo).shape == (seen, seen, 3)
    card = model_card(model, "huggingface", str(tmp_path), DataFacts(), {})
    assert f"center {seen} px" in card
