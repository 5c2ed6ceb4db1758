"""Frozen features of labelled images: vectors of any encoder, stored ones, or layers.

With several processes each looks at its share of the images, and all get all features.

Legend: N images, D width, n layers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from curation.dataset import Dataset
from curation.errors import ConfigError
from curation.neighbors.vectors import vectors_of
from curation.sources.shards import StoredImage
from embedder.encoder import Encoder, available_cpus, embed_images
from embedder.feature_maps import FeatureModel
from embedder.images import Pixels
from pretrain.crops import draw_box
from pretrain.distributed import gather_rows, max_over_ranks, rank, world_size
from pretrain.evaluation.datasets import LabelledImage
from pretrain.evaluation.knn import center_crop

CROP_SCALE = (0.08, 1.0)
"""Area of a training view as a share of the image, as for ImageNet."""


@dataclass(frozen=True)
class Features:
    """Rows of features, and the class of each."""

    rows: Tensor
    """(N, D) float32; or (N, n + 1, D) class tokens of the last n layers, then the mean patch."""
    labels: list[str]

    def __len__(self) -> int:
        return len(self.labels)


def is_stored(path: str) -> bool:
    """Whether a path holds the output of `curate embed`."""
    return Dataset.is_finished(path) and "embedding" in Dataset.open(path).columns


def stored_vectors(path: str) -> Features:
    """Read the output of `curate embed`; the class is the folder that an image lay in.

    Raises:
        ConfigError: the sources name no folders.
    """
    dataset = Dataset.open(path)
    tables = [
        dataset.read_shard(i, ["source", "embedding"]) for i in range(dataset.num_shards)
    ]  # embedding: (N, D)
    table = pa.concat_tables(tables)
    order = np.argsort(np.asarray(table["source"].to_pylist(), dtype=np.str_), kind="stable")
    table = table.take(order)
    labels = [PurePosixPath(source).parent.name for source in table["source"].to_pylist()]
    if not all(labels):
        source = table["source"][labels.index("")]
        raise ConfigError(f"{path}: source '{source}' names no class; expected CLASS/IMAGE")
    rows = vectors_of(table["embedding"], path).astype(np.float32)
    return Features(torch.from_numpy(rows), labels)


def vectors(encoder: Encoder, images: Sequence[Callable[[], Pixels]]) -> Tensor:
    """Embed images as `curate embed` does: unit rows (N, D), rounded to half precision."""
    (rows,) = embed_images([encoder], images[rank() :: world_size()])
    return gathered(torch.from_numpy(rows), len(images)).float()


def layer_features(
    model: FeatureModel,
    images: Sequence[LabelledImage],
    num_layers: int,
    *,
    batch_size: int = 32,
    view: np.random.Generator | None = None,
) -> Features:
    """Look at images with the last layers of a model: (N, n + 1, D), in half precision inside.

    view: draws a random crop and flip of each image; None takes the centre.
    Layers of other widths than the last (of convolutional networks) are left out.
    """
    mine = images[rank() :: world_size()]
    seeds = None if view is None else view.integers(2**63, size=len(images))[rank() :: world_size()]
    crops = (
        partial(_view, item.image, model.image_size, None if seeds is None else int(seeds[i]))
        for i, item in enumerate(mine)
    )
    parts = [_look(model, batch, num_layers) for batch in _batches(crops, batch_size)]
    rows = torch.cat(parts) if parts else torch.zeros(0)
    return Features(gathered(rows, len(images)), [item.label for item in images])


def class_numbers(train: Features, test: Features) -> tuple[Tensor, Tensor, list[str]]:
    """Number the classes: (N,) of the training rows, (n,) of the others, -1 for unknown ones."""
    names, numbers = np.unique(train.labels, return_inverse=True)
    known = {name: i for i, name in enumerate(names.tolist())}
    truth = torch.tensor([known.get(label, -1) for label in test.labels])
    return torch.from_numpy(numbers), truth, names.tolist()


def _look(model: FeatureModel, crops: list[Pixels], num_layers: int) -> Tensor:
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    count = min(num_layers, model.depth)
    layers = model.layers(pixels, range(model.depth - count, model.depth))
    last = layers[-1]
    classes = [layer.cls for layer in layers if layer.cls.shape == last.cls.shape]
    return torch.stack([*classes, last.map.mean((2, 3))], dim=1).half().cpu()  # (B, n + 1, D)


def _batches(crops: Iterable[partial[Pixels]], size: int) -> Iterator[list[Pixels]]:
    with ThreadPoolExecutor(available_cpus()) as pool:
        waiting: list[Pixels] = []
        for crop in pool.map(lambda make: make(), crops):
            waiting.append(crop)
            if len(waiting) == size:
                yield waiting
                waiting = []
        if waiting:
            yield waiting


def _view(stored: StoredImage, side: int, seed: int | None) -> Pixels:
    """(side, side, 3): the centre, or a random crop, perhaps mirrored."""
    pixels = stored.pixels()
    if seed is None:
        return center_crop(pixels, side)
    rng = np.random.default_rng(seed)
    left, top, width, height = draw_box(pixels.shape[1], pixels.shape[0], CROP_SCALE, rng)
    box = (left, top, left + width, top + height)
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC, box=box)
    view: NDArray[np.uint8] = np.asarray(image)
    return view[:, ::-1] if rng.random() < 0.5 else view


def gathered(mine: Tensor, total: int) -> Tensor:
    """Put rows rank::world of every process back in order; (N, …)."""
    if world_size() == 1:
        return mine
    shape = max_over_ranks(torch.tensor([len(mine), *mine.shape[1:]]))
    padded = torch.zeros(*shape.tolist(), dtype=mine.dtype)
    padded[: len(mine)] = mine
    parts = gather_rows(padded).chunk(world_size())  # world x (most, …)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total].contiguous()
