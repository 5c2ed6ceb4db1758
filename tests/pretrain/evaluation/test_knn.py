from pathlib import Path

import pytest
import torch

from curation.errors import ConfigError
from embedder.checkpoint import save_backbone
from embedder.vit import VisionTransformer
from pretrain.evaluation.knn import center_crop, evaluate, knn_classify, stored
from tests.pretrain.small_runs import jpeg, small_config


def test_knn_classify__votes_by_the_softmax_over_the_largest_k() -> None:
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.1, 1.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    guesses = knn_classify(train, labels, torch.tensor([[1.0, 0.05], [0.0, 2.0]]), k=(1, 5))
    assert {k: guess.tolist() for k, guess in guesses.items()} == {1: [0, 1], 5: [0, 1]}


def test_knn_classify__hot_softmax_counts_heads() -> None:
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.9, 0.2]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_classify(train, labels, query, k=(3,), temperature=100.0)[3].item() == 1
    assert knn_classify(train, labels, query, k=(3,), temperature=0.001)[3].item() == 0


def test_evaluate__images_find_themselves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_backbone(VisionTransformer(small_config().vit()), tmp_path / "b.safetensors")
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    images = [(jpeg(i), f"class {i}") for i in range(1, 6)]
    result = evaluate(
        tmp_path / "b.safetensors", [(tmp_path / "0.jpg", "zero"), *images], images, (1,)
    )
    assert result == {"knn_1": 1.0, "train": 6, "test": 5, "bad_images": 0}
    with pytest.raises(ConfigError, match="k-NN needs images"):
        evaluate(tmp_path / "b.safetensors", images, [])


def test_center_crop__middle_square() -> None:
    assert center_crop(stored(jpeg(0, side=64)).pixels(), 56).shape == (56, 56, 3)
    assert center_crop(stored(jpeg(0, side=20)).pixels(), 56).shape == (56, 56, 3)
