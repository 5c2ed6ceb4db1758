"""Features of edited views by a frozen trunk, computed once and kept as files.

The images that are held out are never trained on: their views are the edits by which copy encoders
are measured. Each file holds the views of up to BLOCK images and is written whole, so that a run
which was stopped goes on with the next file.

Legend: N images, V views, D features, B images of a batch.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curation.errors import ConfigError
from embedder.edits import EDITS, Edit, random_edit, strong_edit
from embedder.encoder import ImageSource, LoadOptions, embed_images
from embedder.encoders.copies import StatisticsEncoder, open_copy_trunk
from embedder.encoders.torch_trunk import output_width
from embedder.errors import ImageError
from embedder.images import Pixels, decode
from pretrain.batch import BadImage
from pretrain.copy_config import CopyConfig
from pretrain.digests import FEATURES
from pretrain.order import Order, Place
from pretrain.random_streams import Purpose, stream
from pretrain.sources import Source

progress = logging.getLogger("curation.progress")

BLOCK = 256
"""Images of one file."""
MIN_IMAGES = 8
"""Fewer on either side teach and tell nothing."""


@dataclass(frozen=True)
class ViewBatch:
    """Features of two views of each of B images."""

    rows: Tensor
    """(2 B, D), view 0 of all images, then view 1."""
    ids: tuple[str, ...]
    """The images."""
    bad: tuple[BadImage, ...] = ()
    """Images that could not be read."""

    def to(self, device: torch.device) -> "ViewBatch":
        """Move the features."""
        return replace(self, rows=self.rows.to(device))


@dataclass(frozen=True)
class ViewTable:
    """The views of images in their order, as they lie in files."""

    ids: list[str] = field(default_factory=list)
    """Names of the images that could be read."""
    bad: list[BadImage] = field(default_factory=list)
    """The others, with their reasons."""
    blocks: list[NDArray[np.float16]] = field(default_factory=list)
    """(n, V, D) each, not read before they are asked."""

    def order(self, seed: int) -> Order:
        """Every image once an epoch, without end."""
        return Order([len(block) for block in self.blocks], seed, len(self.blocks))


class ViewFeatures:
    """The features of all views of a source's images, trained on or held out."""

    def __init__(self, source: Source, config: CopyConfig, out: Path) -> None:
        """out: the run's folder, whose `features-*` hold the files.

        Raises:
            ConfigError: there are too few images, or no such trunk.
        """
        self._source, self._config = source, config
        self.trunk = open_copy_trunk(config.trunk, LoadOptions(device=config.run.device))
        self.num_statistics = output_width(config.trunk, self.trunk)
        self._held, self._trained = _split(source, config)
        self._folder = out / f"{FEATURES}{self._key()}"

    def trained(self) -> ViewTable:
        """Views of the images that are trained on: the image itself, then edits at random."""
        views = self._config.views
        strong = round(views.strong * (views.per_image - 1))
        mild = views.per_image - 1 - strong
        return self._table("trained", self._trained, [random_edit] * mild + [strong_edit] * strong)

    def held_out(self) -> ViewTable:
        """Views of the images that are not: the image itself, then each of `EDITS`."""
        return self._table("held_out", self._held, list(EDITS.values()))

    def batches(self, position: int) -> Iterator[ViewBatch]:
        """Give the batches of the endless order of images from a position on."""
        table, seed, size = self.trained(), self._config.run.seed, self._config.optim.batch_size
        order, bad = table.order(seed), (*table.bad, *self.held_out().bad)
        while True:
            places = [order[position + i] for i in range(size)]
            pairs = [_two_views(seed, position + i, self._num_views) for i in range(size)]
            rows = np.stack(
                [
                    table.blocks[place.shard][place.row, pair[side]]
                    for side in (0, 1)
                    for place, pair in zip(places, pairs, strict=True)
                ]
            )
            yield ViewBatch(torch.from_numpy(rows).float(), _names(table, places), bad)
            position, bad = position + size, ()

    def _key(self) -> str:
        """Digest of what decides the features: trunk, images, edits and seed."""
        names = [self._source.name(*place) for place in (*self._held, *self._trained)]
        views, seed = repr(self._config.views), self._config.run.seed
        decides = [self.trunk.key, self.num_statistics, names, views, seed]
        return hashlib.blake2b(json.dumps(decides).encode(), digest_size=6).hexdigest()

    @property
    def _num_views(self) -> int:
        return self._config.views.per_image

    def _table(self, kind: str, places: Sequence[Place], edits: Sequence[Edit]) -> ViewTable:
        table = ViewTable()
        for start in range(0, len(places), BLOCK):
            stem = self._folder / f"{kind}-{start // BLOCK:05d}"
            if not stem.with_suffix(".npy").is_file():
                self._write(stem, places[start : start + BLOCK], edits)
                done = min(start + BLOCK, len(places))
                progress.info("%s: views of %d of %d images", kind, done, len(places))
            about = json.loads(stem.with_suffix(".json").read_text())
            table.ids.extend(about["ids"])
            table.bad.extend((name, reason) for name, reason in about["bad"])
            table.blocks.append(np.load(stem.with_suffix(".npy"), mmap_mode="r"))
        if len(table.ids) < MIN_IMAGES:
            raise ConfigError(f"{len(table.ids)} images of {kind} can be read; want {MIN_IMAGES}")
        return table

    def _write(self, stem: Path, places: Sequence[Place], edits: Sequence[Edit]) -> None:
        ids: list[str] = []
        bad: list[BadImage] = []
        encoder = StatisticsEncoder(self.trunk)
        sources = self._views(places, edits, ids, bad)
        (rows,) = embed_images([encoder], sources, self._config.run.threads)
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".json").write_text(json.dumps({"ids": ids, "bad": bad}))
        partial = stem.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, rows.reshape(len(ids), 1 + len(edits), -1))
        partial.rename(stem.with_suffix(".npy"))

    def _views(
        self,
        places: Sequence[Place],
        edits: Sequence[Edit],
        ids: list[str],
        bad: list[BadImage],
    ) -> Iterator[ImageSource]:
        """Give each readable image and its edits; names are noted as they pass."""
        for place in places:
            name = self._source.name(*place)
            try:
                pixels = decode(self._source.read(*place)[1])
            except ImageError as error:
                bad.append((name, error.reason))
                continue
            ids.append(name)
            yield pixels
            for view, edit in enumerate(edits):
                yield _edited(pixels, edit, self._config.run.seed, _hash(name), view)


def _edited(pixels: Pixels, edit: Edit, seed: int, image: int, view: int) -> Callable[[], Pixels]:
    return lambda: edit(pixels, stream(seed, Purpose.VIEW_EDITS, image, view))


def _two_views(seed: int, position: int, count: int) -> tuple[int, int]:
    first, second = stream(seed, Purpose.VIEW_PAIRS, position).permutation(count)[:2]
    return int(first), int(second)


def _names(table: ViewTable, places: Sequence[Place]) -> tuple[str, ...]:
    starts = np.cumsum([0, *(len(block) for block in table.blocks)])
    return tuple(table.ids[int(starts[place.shard]) + place.row] for place in places)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _split(source: Source, config: CopyConfig) -> tuple[list[Place], list[Place]]:
    """Sort the images by the hashes of their names: the first are held out, the next trained on."""
    places = [Place(shard, row) for shard, size in enumerate(source.sizes) for row in range(size)]
    places.sort(key=lambda place: (_hash(source.name(*place)), place))
    places = places[: config.max_images]
    count = round(config.held_out.share * len(places))
    if min(count, len(places) - count) < MIN_IMAGES:
        raise ConfigError(
            f"{len(places)} images, of which {count} are held out: want {MIN_IMAGES} of both"
        )
    return places[:count], places[count:]
