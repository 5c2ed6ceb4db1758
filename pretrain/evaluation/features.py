"""Frozen features of labeled images: vectors of any encoder, stored ones, or layers.

With several processes each looks at its share of the images, and all get all features.

Legend: N images, D width, n layers.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from curation import storage
from curation.dataset import Dataset
from curation.errors import ConfigError
from curation.neighbors.rows.vectors import vectors_of
from curation.schema import ID
from embedder.encoder import Encoder, available_cpus, embed_images
from embedder.feature_maps import FeatureModel
from embedder.images import Pixels
from pretrain.crops import draw_box
from pretrain.distributed import gather_rows, max_over_ranks, rank, sum_over_ranks, world_size
from pretrain.evaluation.bad_images import Reading
from pretrain.evaluation.datasets import LabeledImage
from pretrain.evaluation.knn import center_crop

logger = logging.getLogger(__name__)

CROP_SCALE = (0.08, 1.0)
"""Area of a training view as a share of the image, as for ImageNet."""


@dataclass(frozen=True)
class Features:
    """Rows of features, and the class of each."""

    rows: Tensor
    """(N, D) float32; or (N, n + 1, D) class tokens of the last n layers, then the mean patch."""
    labels: list[str]
    keys: list[str]
    """What tells an image from all others: the path of its file, or its id."""
    bad_images: int = 0
    """Images that could not be decoded, and have no row."""

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
        dataset.read_shard(i, [ID, "source", "embedding"]) for i in range(dataset.num_shards)
    ]  # embedding: (N, D)
    table = pa.concat_tables(tables)
    order = np.argsort(np.asarray(table["source"].to_pylist(), dtype=np.str_), kind="stable")
    table = table.take(order)
    labels = [PurePosixPath(source).parent.name for source in table["source"].to_pylist()]
    if not all(labels):
        source = table["source"][labels.index("")]
        raise ConfigError(f"{path}: source '{source}' names no class; expected CLASS/IMAGE")
    rows = vectors_of(table["embedding"], path).astype(np.float32)
    return Features(torch.from_numpy(rows), labels, table[ID].to_pylist())


def vectors(encoder: Encoder, images: Sequence[Callable[[], Pixels]]) -> Tensor:
    """Embed images as `curate embed` does: unit rows (N, D), rounded to half precision."""
    (rows,) = embed_images([encoder], images[rank() :: world_size()])
    return gathered(torch.from_numpy(rows), len(images)).float()


def image_vectors(encoder: Encoder, items: Sequence[LabeledImage]) -> Features:
    """Embed labeled images (see `vectors`), but for bad ones."""
    reading = Reading([item.image for item in items])
    return _features_of(vectors(encoder, reading.readers()), items, reading)


def layer_features(
    model: FeatureModel,
    images: Sequence[LabeledImage],
    num_layers: int,
    *,
    batch_size: int = 32,
    view: np.random.Generator | None = None,
) -> Features:
    """Look at images with the last layers of a model: (N, n + 1, D), in half precision inside.

    view: draws a random crop and flip of each image; None takes the center.
    Layers of other widths than the last (of convolutional networks) are left out.
    """
    reading = Reading([item.image for item in images])
    mine = reading.readers()[rank() :: world_size()]
    seeds = None if view is None else view.integers(2**63, size=len(images))[rank() :: world_size()]
    crops = (
        partial(_view, read, model.image_size, None if seeds is None else int(seeds[i]))
        for i, read in enumerate(mine)
    )
    parts = [_look(model, batch, num_layers) for batch in _batches(crops, batch_size)]
    if not parts:  # fewer images than processes: no rows, of the shape that all agree on
        parts = [_look(model, [np.zeros((model.image_size,) * 2 + (3,), np.uint8)], num_layers)[:0]]
    return _features_of(gathered(torch.cat(parts), len(images)), images, reading)


def _features_of(rows: Tensor, items: Sequence[LabeledImage], reading: Reading) -> Features:
    """Rows (N, …) of all images without those of bad ones."""
    is_bad = sum_over_ranks(reading.is_bad)
    good = reading.good(is_bad)
    kept = [items[i] for i in good]
    keys = [_key(item.image.path) for item in kept]
    return Features(rows[good], [item.label for item in kept], keys, len(items) - len(good))


def _key(path: str) -> str:
    """One file, one key: whatever links lead to it."""
    full = storage.full_path(path)
    return str(Path(full).resolve()) if storage.is_local(path) else full


def compare(train: Features, test: Features) -> dict[str, float]:
    """Count what makes a comparison of two sets less than it seems; say it where it does."""
    shared = len(set(train.keys) & set(test.keys))
    known = set(train.labels)
    unknown = sum(label not in known for label in test.labels)
    if shared:
        logger.warning("%d of %d test images are training images, too", shared, len(test))
    if unknown:
        logger.warning(
            "%d of %d test images are of classes without a training image: they count as wrong",
            unknown,
            len(test),
        )
    return {
        "shared_images": float(shared),
        "unknown_class_images": float(unknown),
        "bad_images": float(train.bad_images + test.bad_images),
    }


def class_numbers(train: Features, test: Features) -> tuple[Tensor, Tensor, list[str]]:
    """Number the classes: (N,) of the training rows, (n,) of the others, -1 for unknown ones.

    Raises:
        ConfigError: all of the test classes are unknown.
    """
    names, numbers = np.unique(train.labels, return_inverse=True)
    known = {name: i for i, name in enumerate(names.tolist())}
    truth = torch.tensor([known.get(label, -1) for label in test.labels])
    if (truth < 0).all():
        raise ConfigError(
            f"no test class ({_listed(test.labels)}) is a training class "
            f"({_listed(train.labels)}); the folders' names must be the same"
        )
    return torch.from_numpy(numbers), truth, names.tolist()


def _listed(labels: Sequence[str], most: int = 5) -> str:
    names = sorted(set(labels))
    return ", ".join([*names[:most], *(["…"] if len(names) > most else [])])


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


def _view(read: Callable[[], Pixels], side: int, seed: int | None) -> Pixels:
    """(side, side, 3): the center, or a random crop, perhaps mirrored."""
    pixels = read()
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
