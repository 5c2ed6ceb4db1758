"""Single images of any source, in shards: what training draws from and evaluation lists."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import pyarrow as pa
import pyarrow.compute as pc

from curation import storage
from curation.errors import ConfigError
from curation.sources.folders import Listing, fault_of
from curation.sources.images import ImageFiles, tar_references
from curation.sources.names import as_path, shown
from curation.sources.references import Reference
from embedder.errors import ImageError
from embedder.images import Pixels, decode

progress = logging.getLogger("curation.progress")

FILES_PER_SHARD = 1024
"""Image files of a folder that count as one shard."""
_TABLES_HELD = 4
"""Row groups of Parquet files that are kept for the next image: none can be read in part."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image, named and not read yet: of a whole benchmark all are held."""

    name: str
    """Below its source."""
    root: str
    """Of the source; empty for a file by itself."""
    load: Callable[[], bytes]

    @property
    def path(self) -> str:
        """Path of its file, or of what holds it with its name inside."""
        return storage.join(self.root, self.name) if self.root else self.name

    def pixels(self) -> Pixels:
        """(H, W, 3).

        Raises:
            ImageError: it cannot be read or is no image; says which.
        """
        try:
            return decode(self.load())
        except ImageError as error:
            detail = str(error).removeprefix(error.reason).removeprefix(": ")
            raise ImageError(error.reason, f"{self.path}: {detail}") from error


def image_file(path: str) -> StoredImage:
    """An image that is a file of its own."""
    return StoredImage(shown(path), "", Reference(path).read)


class ImageShards:
    """All images of a source, in shards: image files, then tars, then row groups of Parquet.

    Headers of tars are read once, when it is opened; held are a name and 16 bytes an image.

    Raises:
        DatasetError: there is nothing, or what is there is no finished set of images.
    """

    def __init__(self, path: str) -> None:
        self._files = ImageFiles(path)
        self.found: Listing = self._files.find()
        tars = storage.gather(
            lambda name: tar_references(self.found.root, name), self.found.tars, self.found.root
        )
        for _, left_out in tars:
            self.found.left_out += Counter(left_out)
        self._tars = [table for table, _ in tars if table.num_rows]
        held = sum(table.num_rows for table in self._tars) + len(self.found.images)
        self._groups = self._files.table_pieces(self.found, alone=not held)
        images = len(self.found.images)
        self._starts = list(range(0, images, FILES_PER_SHARD))
        self.sizes = [min(FILES_PER_SHARD, images - start) for start in self._starts]
        self.sizes += [table.num_rows for table in self._tars]
        self.sizes += [piece.num_rows for piece in self._groups]
        self._table = lru_cache(maxsize=_TABLES_HELD)(self._read_group)

    def name(self, shard: int, row: int) -> str:
        """Name of an image below the source."""
        if shard < len(self._starts):
            return shown(self.found.images[self._starts[shard] + row])
        return str(self._rows(shard)["path"][row].as_py())

    def load(self, shard: int, row: int) -> bytes:
        """Read the file of an image.

        Raises:
            ImageError: it cannot be read.
        """
        if shard < len(self._starts):
            name = self.found.images[self._starts[shard] + row]
            return Reference(self.found.path(name)).read()
        rows = self._rows(shard)
        file, offset, size, raw = (rows[n][row].as_py() for n in ("file", "offset", "size", "raw"))
        if raw:
            return bytes(raw)
        if file is None:
            raise ImageError("empty", self.name(shard, row))
        return Reference(as_path(file), offset, size).read()

    def readable(self) -> list[StoredImage]:
        """All images in order, but for those that are no files, empty or too large: left out."""
        found = [
            (StoredImage(name, self.found.root, partial(self.load, shard, row)), fault)
            for shard in range(len(self.sizes))
            for row, (name, fault) in enumerate(self._listed(shard))
        ]
        self.found.left_out += Counter(fault for _, fault in found if fault)
        return [image for image, fault in found if not fault]

    def _listed(self, shard: int) -> Iterator[tuple[str, str]]:
        """Name of each image of a shard, and what is known to be wrong with it."""
        if shard < len(self._starts):
            start = self._starts[shard]
            for name in self.found.images[start : start + FILES_PER_SHARD]:
                yield shown(name), self.found.odd.get(name, "")
            return
        rows = self._rows(shard)
        columns = (rows[name].to_pylist() for name in ("path", "offset", "size"))
        lengths = pc.fill_null(pc.binary_length(rows["raw"]), 0).to_pylist()
        held = rows["file"].is_valid().to_pylist()
        for name, offset, size, length, in_file in zip(*columns, lengths, held, strict=True):
            yield name, fault_of(size if in_file else length, offset)

    def _rows(self, shard: int) -> pa.Table:
        """References of a tar or a row group."""
        place = shard - len(self._starts)
        return self._tars[place] if place < len(self._tars) else self._table(place)

    def _read_group(self, place: int) -> pa.Table:
        return self._files.read(self._groups[place - len(self._tars)])


def images_below(path: str) -> list[StoredImage]:
    """The images that a path stands for, as `curate ingest` finds them; says what is left out.

    Raises:
        DatasetError: there is nothing, or what is there is no finished set of images.
        ConfigError: no images there.
    """
    shards = ImageShards(path)
    images = shards.readable()
    if not images:
        raise ConfigError(shards.found.emptiness())
    progress.info(shards.found.summary())
    return images
