"""Layers as their own libraries give them, and the last one as the encoder's vector."""

import numpy as np
import pytest
import timm
import torch

from embedder.encoder import load_encoder
from embedder.errors import EncoderError
from embedder.feature_maps import load_feature_model

NAMES = [
    "dinov2:vits14:random",
    "timm:vit_tiny_patch16_224:random",
    "timm:resnet18:random",
    "open_clip:ViT-B-32/random",
    "lite-semantic",
]


@pytest.mark.parametrize("name", NAMES)
def test_layers__are_finite_maps_of_each_layer_asked_for(name: str) -> None:
    model = load_feature_model(name, device="cpu")
    side = model.side(model.image_size)
    pixels = torch.randint(0, 255, (2, 3, side, side), dtype=torch.uint8)
    first, last, again = model.layers(pixels, [0, model.depth - 1, -1])
    for layer in (first, last):
        assert layer.cls.shape == layer.map.shape[:2]
        assert layer.map.dtype == torch.float32
        assert layer.map.isfinite().all()
    assert torch.equal(last.map, again.map)
    assert last.map.shape[2] == side // model.patch
    assert model.depth > 3
    assert model.evenly_spaced(4)[-1] == model.depth - 1


def test_layers__last_class_token_is_the_encoder_s_vector() -> None:
    name = "dinov2:vits14:random"
    encoder = load_encoder(name, device="cpu", precision="float32")
    batch = np.random.default_rng(0).integers(0, 255, (8, 224, 224, 3)).astype(np.uint8)
    model = load_feature_model(name, device="cpu")
    (layer,) = model.layers(torch.from_numpy(batch).permute(0, 3, 1, 2), [-1])
    ours = torch.nn.functional.normalize(layer.cls, dim=1).numpy()
    tolerance = 1e-5 if model.placement.dtype == torch.float32 else 2e-2
    assert np.abs(ours - encoder.encode(batch)).max() < tolerance


def test_layers__of_timm_are_its_own() -> None:
    model = load_feature_model("timm:vit_tiny_patch16_224:random", device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peer = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)
    pixels = torch.randint(0, 255, (1, 3, 224, 160), dtype=torch.uint8)
    (layer,) = model.layers(pixels, [-1])
    images = (pixels.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        tokens = peer.eval().forward_features(images)  # (1, 1 + 14 x 10, D)
    tolerance = 1e-4 if model.placement.dtype == torch.float32 else 0.1
    assert layer.map.shape == (1, 192, 14, 10)
    assert (layer.cls - tokens[:, 0]).abs().max() < tolerance
    assert (layer.map.flatten(2).mT - tokens[:, 1:]).abs().max() < tolerance


def test_load_feature_model__without_layers_is_one_line() -> None:
    with pytest.raises(EncoderError, match="shows no layers; dinov2, timm, open_clip"):
        load_feature_model("onnx:file.onnx")
    with pytest.raises(EncoderError, match="unknown encoder 'bogus'"):
        load_feature_model("bogus")
    with pytest.raises(EncoderError, match="is no vision transformer"):
        load_feature_model("open_clip:RN50/random", device="cpu")
