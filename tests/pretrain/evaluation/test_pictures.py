import numpy as np
import pytest
import torch

from curation.errors import ConfigError
from embedder.feature_maps import load_feature_model
from embedder.vit import VisionTransformer, ViTConfig
from pretrain.evaluation.pictures import fitted, neighbors, pca_pictures, principal


def object_in_the_middle(seed: int, flip: float = 1.0) -> np.ndarray:
    """Features (10, 12, 16): a block with a gradient of its own on a plain ground."""
    rng = np.random.default_rng(seed)
    features = 0.05 * rng.normal(size=(10, 12, 16))
    features[3:7, 4:9, 0] += 5 * flip
    features[3:7, 4:9, 1] += np.linspace(-1, 1, 5)
    return features.astype(np.float32)


@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_pca_pictures__foreground_is_the_middle_whatever_the_sign(flip: float) -> None:
    pictures = pca_pictures([object_in_the_middle(0, flip), object_in_the_middle(1, flip)])
    for picture in pictures:
        assert picture.shape == (10, 12, 3)
        lit = picture.any(-1)
        assert lit[3:7, 4:9].all()
        assert not lit[0].any()
        assert lit.sum() == 20
    row = np.abs(np.diff(pictures[0][4, 4:9].astype(int), axis=0)).sum()
    assert row > 100  # the gradient inside the object shows


def test_pca_pictures__too_few_patches() -> None:
    with pytest.raises(ConfigError, match="4 patches are too few"):
        pca_pictures([np.zeros((2, 2, 8), np.float32)])


def test_principal__is_the_singular_value_decomposition() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 7)) * np.arange(1, 8)
    centered = rows - rows.mean(0)
    u, s, _ = np.linalg.svd(centered, full_matrices=False)
    scores = principal(rows.astype(np.float32), 3)
    assert np.abs(np.abs(scores) - np.abs(u[:, :3] * s[:3])).max() < 1e-4


@torch.no_grad()
def test_class_attention__is_that_of_the_block() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(24, 2, 3, patch=14, image_size=70, registers=2)).eval()
    weights = model.class_attention(torch.randn(2, 3, 28, 42))
    assert weights.shape == (2, 3, 6)
    assert (weights > 0).all()
    assert (weights.sum(-1) < 1).all()
    # A class token that attends to values alone: the block's own output is their mixture.
    x, layout = model._pack([torch.randn(1, 3, 28, 28)], [None])
    attention = model.blocks[0].attn
    qkv = attention.qkv(x).view(1, 7, 3, 3, 8)
    mixed = torch.einsum("bhn,bnhd->bhd", attention.class_weights(x, layout[0]), qkv[:, :, 2])
    whole = attention._mix(attention.qkv(x), *layout[0])[:1]
    torch.testing.assert_close(mixed.flatten(1), whole)


def test_fitted__whole_patches_and_the_same_aspect() -> None:
    model = load_feature_model("dinov2:vits14:random", device="cpu")
    image = fitted(np.zeros((100, 200, 3), np.uint8), model, 224)
    assert image.shape == (224, 448, 3)
    assert fitted(np.zeros((90, 100, 3), np.uint8), model, 100).shape == (98, 112, 3)


def test_neighbors__most_similar_first() -> None:
    bank = np.eye(3, dtype=np.float32)
    order, cosines = neighbors(np.array([[0.0, 0.8, 0.6]], np.float32), bank, 2)
    assert order.tolist() == [[1, 2]]
    assert cosines[0].tolist() == pytest.approx([0.8, 0.6])
