"""k-nearest-neighbor classification of frozen features.

Each test image asks its k nearest training images (cosine of class tokens), which vote with
weights softmax(similarity / temperature), taken over the largest k that is asked for.

Legend: N training images, n test images, D width, C classes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, PositiveInt
from torch import Tensor

from curation.config import Settings
from curation.errors import ConfigError
from curation.sources.shards import StoredImage, image_file
from embedder.checkpoint import load_backbone
from embedder.encoder import available_cpus
from embedder.images import Pixels
from embedder.vit import VisionTransformer
from pretrain.batch import normalize
from pretrain.config import KnnSettings
from pretrain.evaluation.bad_images import Reading
from pretrain.evaluation.datasets import labeled_images

Labeled = Sequence[tuple[bytes | str | Path | StoredImage, Any]]
"""(image file or where it lies, label)."""

RESIZE = 256 / 224
"""Shorter side before the center crop, as a share of the crop."""


class KnnTaskSettings(Settings):
    """The paper's."""

    k: tuple[PositiveInt, ...] = Field(default=(10, 20, 100, 200), min_length=1)
    """Neighbors that vote."""
    temperature: float = Field(default=0.07, gt=0)
    """Of their votes' weights."""


def evaluate(
    backbone_file: str | Path,
    train: Labeled,
    test: Labeled,
    k: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    *,
    image_size: int | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """Classify test images by training images: {"knn_10": accuracy, …, "train": N, "test": n}.

    `image_size` is the side of the center crop; by default 224, or what the backbone was trained
    at where that is less.

    Raises:
        ConfigError: there are no images to compare.
        CheckpointError: the file holds no backbone.
    """
    if not train or not test:
        raise ConfigError(f"k-NN needs images: {len(train)} to learn from, {len(test)} to test")
    model = load_backbone(backbone_file)
    return evaluate_model(
        model, train, test, k, temperature, image_size=image_size, batch_size=batch_size
    )


def evaluate_model(
    model: VisionTransformer,
    train: Labeled,
    test: Labeled,
    k: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    *,
    image_size: int | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """Do what `evaluate` does with a backbone at hand, where it is."""
    size = image_size or default_size(model)
    names, train_labels = np.unique([str(label) for _, label in train], return_inverse=True)
    known = {name: i for i, name in enumerate(names)}
    truth = torch.tensor([known.get(str(label), -1) for _, label in test])
    bank, bank_rows = _good_tokens(model, train, size, batch_size)
    asked, asked_rows = _good_tokens(model, test, size, batch_size)
    labels, truth = torch.from_numpy(train_labels)[bank_rows], truth[asked_rows]
    guesses = knn_classify(bank, labels, asked, k=k, temperature=temperature)
    result = {f"knn_{n}": (guess == truth).float().mean().item() for n, guess in guesses.items()}
    bad = len(train) + len(test) - len(bank) - len(asked)
    return {**result, "train": len(bank), "test": len(asked), "bad_images": bad}


class KnnProbe:
    """k-NN on a labeled set, again and again during training.

    Each image is decoded once at the start: a set with many bad ones is refused before training.

    Raises:
        ConfigError: there are no images, or more than a few cannot be decoded.
    """

    def __init__(self, settings: KnnSettings) -> None:
        self._settings = settings
        self._train, self._test = (_readable(path) for path in (settings.train, settings.test))

    def accuracy(self, model: VisionTransformer) -> float:
        """Give the share of test images that get their class."""
        k = self._settings.k
        return evaluate_model(model, self._train, self._test, (k,))[f"knn_{k}"]


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    block_rows: int = 1024,
) -> dict[int, Tensor]:
    """Give the class (n,) of each test row for every k.

    train_features: (N, D). train_labels: (N,), classes counted from 0. test_features: (n, D).
    A k above N asks all N.
    """
    bank = F.normalize(train_features.float(), dim=1)
    classes = int(train_labels.max()) + 1
    most = min(max(k), len(bank))
    guesses: dict[int, list[Tensor]] = {n: [] for n in k}
    for queries in torch.split(test_features.float(), block_rows):
        similarity, index = (F.normalize(queries, dim=1) @ bank.T).topk(most)  # (r, most)
        weights = (similarity / temperature).softmax(1)
        votes = F.one_hot(train_labels[index], classes) * weights[..., None]  # (r, most, C)
        for n in k:
            guesses[n].append(votes[:, :n].sum(1).argmax(1))
    return {n: torch.cat(parts) for n, parts in guesses.items()}


def _readable(path: str) -> list[tuple[StoredImage, str]]:
    """The labeled images of a folder that can be decoded."""
    labeled = labeled_folder(path)
    reading = Reading([image for image, _ in labeled])
    with ThreadPoolExecutor(available_cpus()) as pool:
        for _ in pool.map(_decode, reading.readers()):
            pass
    return [labeled[index] for index in reading.good(reading.is_bad)]


def _decode(read: Callable[[], Pixels]) -> None:
    read()  # the pixels are not kept


def labeled_folder(path: str | Path) -> list[tuple[StoredImage, str]]:
    """List the images of a folder that holds a folder for each class.

    Raises:
        ConfigError: there are none.
    """
    return [(item.image, item.label) for item in labeled_images(str(path))]


def class_tokens(
    model: VisionTransformer,
    images: Sequence[bytes | str | Path | StoredImage],
    size: int,
    batch_size: int = 32,
) -> Tensor:
    """Give the class tokens (N, D) of image files, center-cropped to `size`.

    Raises:
        ImageError: one cannot be decoded.
    """
    return _tokens(model, [stored(image).pixels for image in images], size, batch_size)


def _good_tokens(
    model: VisionTransformer, labeled: Labeled, size: int, batch_size: int
) -> tuple[Tensor, list[int]]:
    """Class tokens (n, D) of the images that can be decoded, and which these are."""
    reading = Reading([stored(image) for image, _ in labeled])
    tokens = _tokens(model, reading.readers(), size, batch_size)
    good = reading.good(reading.is_bad)
    return tokens[good], good


@torch.no_grad()
def _tokens(
    model: VisionTransformer, readers: Sequence[Callable[[], Pixels]], size: int, batch_size: int
) -> Tensor:
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(readers), batch_size):
        crops = [center_crop(read(), size) for read in readers[start : start + batch_size]]
        pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
        tokens = model.forward_packed([normalize(pixels.to(device))], [None])[0]
        parts.append(tokens.cls.float().cpu())
    return torch.cat(parts)


def stored(image: bytes | str | Path | StoredImage) -> StoredImage:
    """An image file, a path to one, or its bytes, to be read."""
    if isinstance(image, bytes):
        return StoredImage("bytes", "bytes", lambda: image)
    return image if isinstance(image, StoredImage) else image_file(str(image))


def center_crop(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Scale the shorter side to 256/224 of `size` (bicubic) and cut the middle (size, size, 3)."""
    image = Image.fromarray(pixels)
    scale = round(size * RESIZE) / min(image.size)
    wide, high = (max(size, round(side * scale)) for side in image.size)
    left, top = (wide - size) // 2, (high - size) // 2
    resized = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC))
    return resized[top : top + size, left : left + size]


def default_size(model: VisionTransformer) -> int:
    """Give 224, or the largest size that the position embedding was made for."""
    side = min(224, model.config.image_size)
    return side // model.config.patch * model.config.patch
