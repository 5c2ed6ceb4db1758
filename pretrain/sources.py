"""Where images come from: shards whose images can be read singly."""

import hashlib
import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curation import storage
from curation.dataset import Dataset
from curation.errors import DatasetError
from curation.sources.places import image_place
from curation.sources.shards import ImageShards
from embedder.errors import ImageError
from pretrain.distributed import rank

progress = logging.getLogger("curation.progress")

SAMPLED = 32
"""Images that are read to know a data set again."""

NO_SET = "none"
"""Name of the rows without a seed set."""


class Source(Protocol):
    """Images in shards."""

    sizes: list[int]
    """Images of each shard."""

    def name(self, shard: int, row: int) -> str:
        """Give the id of one image."""

    def read(self, shard: int, row: int) -> tuple[str, bytes]:
        """Give the id and the file of one image.

        Raises:
            ImageError: that image cannot be read.
        """

    def seed_sets(self, shard: int) -> NDArray[np.str_]:
        """Give the seed set of each image of a shard, `none` for those without one."""


class PackedShards:
    """Shards that `pack` wrote: a tar of images each, and its index as Parquet."""

    def __init__(self, path: str) -> None:
        self._path = path
        dataset = Dataset.open(path)
        self._names = [shard.name for shard in dataset.manifest.shards]
        self.sizes = [shard.num_rows for shard in dataset.manifest.shards]
        self._index = lru_cache(maxsize=256)(self._read_index)

    def name(self, shard: int, row: int) -> str:
        """Give the id of one image."""
        return str(self._index(shard)["id"][row].as_py())

    def read(self, shard: int, row: int) -> tuple[str, bytes]:
        """Give the id and the file of one image, by its byte range in the tar."""
        index = self._index(shard)
        offset, length = index["offset"][row].as_py(), index["num_bytes"][row].as_py()
        with storage.open_read(self._tar(shard)) as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise DatasetError(
                f"{self._tar(shard)}: ends before byte {offset + length} that its index names; "
                "pack the images again"
            )
        return str(index["id"][row].as_py()), data

    def seed_sets(self, shard: int) -> NDArray[np.str_]:
        """Give the seed set of each image of a shard, `none` for those without one."""
        sets = pc.fill_null(self._index(shard)["seed_set"], NO_SET)
        return np.asarray(sets.to_pylist(), dtype=np.str_)

    def _read_index(self, shard: int) -> pa.Table:
        path = storage.join(self._path, self._names[shard])
        return storage.read_parquet(path, columns=["id", "offset", "num_bytes", "seed_set"])

    def _tar(self, shard: int) -> str:
        return storage.join(self._path, str(PurePosixPath(self._names[shard]).with_suffix(".tar")))


class LooseImages:
    """Images of any other source: files, tars without an index, Parquet."""

    def __init__(self, path: str) -> None:
        self.shards = ImageShards(path)
        self.sizes = self.shards.sizes

    def name(self, shard: int, row: int) -> str:
        """Give the id of one image: its name below the source."""
        return self.shards.name(shard, row)

    def read(self, shard: int, row: int) -> tuple[str, bytes]:
        """Give the id and the file of one image."""
        return self.shards.name(shard, row), self.shards.load(shard, row)

    def seed_sets(self, shard: int) -> NDArray[np.str_]:
        """None of these images has a seed set."""
        return np.full(self.sizes[shard], NO_SET)


def open_source(path: str) -> Source:
    """Open what a path stands for; of a work folder or a manifest, its packed images.

    Raises:
        DatasetError: there are no images, with what was looked for.
    """
    place = image_place(path)
    if Dataset.is_finished(place) and "offset" in Dataset.open(place).columns:
        packed = PackedShards(place)
        if sum(packed.sizes) == 0:
            raise DatasetError(f"{place}: holds no images; its shards are empty")
        return packed
    source = LooseImages(place)
    if sum(source.sizes) == 0:
        raise DatasetError(source.shards.found.emptiness())
    if rank() == 0:
        progress.info(source.shards.found.summary())
    return source


def describe_source(path: str, source: Source) -> dict[str, Any]:
    """Say what a run learns from, for its checkpoints and its model's card.

    `digest` is of names, sizes and order, and of some of the images: what training draws from.
    """
    place, digest = image_place(path), None
    if Dataset.is_finished(place):
        digest = Dataset.open(place).manifest.content_digest
    return {
        "path": place,
        "images": sum(source.sizes),
        "content_digest": digest,
        "digest": _digest_of(source, digest),
    }


def _digest_of(source: Source, content_digest: str | None) -> str:
    found = hashlib.blake2b(f"{content_digest} {source.sizes}".encode(), digest_size=16)
    if isinstance(source, LooseImages):
        stamps = sorted(source.shards.found.stamps.items())
        found.update("\n".join(f"{name} {stamp.split(' ')[0]}" for name, stamp in stamps).encode())
    for shard, row in _spread(source.sizes):
        try:
            name, data = source.read(shard, row)
        except ImageError as error:
            name, data = source.name(shard, row), error.reason.encode()
        found.update(name.encode() + hashlib.sha256(data).digest())
    return found.hexdigest()


def _spread(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Places of some images, evenly over all."""
    ends = np.cumsum(sizes)
    for position in np.unique(np.linspace(0, ends[-1] - 1, SAMPLED).astype(int)):
        shard = int(np.searchsorted(ends, position, side="right"))
        yield shard, int(position - (ends[shard - 1] if shard else 0))
