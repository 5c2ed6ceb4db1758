"""Where images come from: shards whose images can be read singly."""

import tarfile
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curation import storage
from curation.dataset import Dataset
from curation.errors import DatasetError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FOLDER_SHARD = 1024
"""Files of a plain folder that count as one shard."""
NO_SET = "none"
"""Name of the rows without a seed set."""


class Source(Protocol):
    """Images in shards."""

    sizes: list[int]
    """Images of each shard."""

    def read(self, shard: int, row: int) -> tuple[str, bytes]:
        """Give the id and the file of one image."""

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


class ImageFolder:
    """All images below a folder; their ids are their relative paths."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._files = [name for name in storage.walk_files(path) if is_image(name)]
        starts = range(0, len(self._files), FOLDER_SHARD)
        self.sizes = [min(FOLDER_SHARD, len(self._files) - start) for start in starts]

    def read(self, shard: int, row: int) -> tuple[str, bytes]:
        """Give the id and the file of one image."""
        name = self._files[shard * FOLDER_SHARD + row]
        return name, storage.read_bytes(storage.join(self._path, name))

    def seed_sets(self, shard: int) -> NDArray[np.str_]:
        """No image of a plain folder has a seed set."""
        return np.full(self.sizes[shard], NO_SET)


class TarFolder:
    """WebDataset tars without an index: their headers are read once, when the run begins.

    Held are 12 bytes an image; its id is `tar name/number`.
    """

    def __init__(self, path: str, names: list[str]) -> None:
        self._path = path
        self._names = names
        self._members = [self._scan(name) for name in names]
        self.sizes = [len(offsets) for offsets, _ in self._members]

    def read(self, shard: int, row: int) -> tuple[str, bytes]:
        """Give the id and the file of one image, by its byte range in the tar."""
        offsets, lengths = self._members[shard]
        with storage.open_read(storage.join(self._path, self._names[shard])) as file:
            file.seek(int(offsets[row]))
            return f"{self._names[shard]}/{row}", file.read(int(lengths[row]))

    def seed_sets(self, shard: int) -> NDArray[np.str_]:
        """No image of a plain tar has a seed set."""
        return np.full(self.sizes[shard], NO_SET)

    def _scan(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        path = storage.join(self._path, name)
        try:
            with storage.open_read(path) as file, tarfile.open(fileobj=file) as tar:
                found = [(m.offset_data, m.size) for m in tar if m.isfile() and is_image(m.name)]
        except tarfile.TarError as error:
            raise DatasetError(f"{path}: not a readable tar: {error}; remove it") from error
        offsets, lengths = zip(*found, strict=True) if found else ((), ())
        return np.asarray(offsets, np.int64), np.asarray(lengths, np.int32)


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def open_source(path: str) -> Source:
    """Open packed shards, a folder of WebDataset tars or a folder of images.

    Raises:
        DatasetError: there are no images, with what was looked for.
    """
    if not storage.exists(path):
        raise DatasetError(f"{path}: no such folder; give packed shards or a folder of images")
    source = _open(path)
    if sum(source.sizes) == 0:
        raise DatasetError(
            f"{path}: holds no images; want packed shards (_manifest.json, shard-*.tar) with at "
            "least one row, a folder of tars, or a folder of image files"
        )
    return source


def describe_source(path: str, source: Source) -> dict[str, str | int | None]:
    """Say what a run learns from, for its checkpoints and its model's card."""
    digest = None
    if Dataset.is_finished(path):
        digest = Dataset.open(path).manifest.content_digest
    return {"path": path, "images": sum(source.sizes), "content_digest": digest}


def _open(path: str) -> Source:
    if Dataset.is_finished(path):
        return PackedShards(path)
    tars = storage.list_files(path, ".tar")
    return TarFolder(path, tars) if tars else ImageFolder(path)
