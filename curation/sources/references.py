"""Where the bytes of images lie, and reading them: capped, by byte range, never from a device."""

from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from curation import storage
from curation.sources.names import as_path
from curation.sources.tars import NOWHERE
from embedder.errors import ImageError
from embedder.images import DEFAULT_LIMITS

MAX_BYTES = DEFAULT_LIMITS.max_bytes
WHOLE = -1
"""Size of an image that is a file of its own."""
REASONS = ("unreadable", "too_large", "truncated", "empty")
"""Why bytes are not there."""

REFERENCES = pa.schema(
    [
        *(("path", pa.string()), ("url", pa.string()), ("file", pa.binary())),
        *(("offset", pa.int64()), ("size", pa.int64()), ("raw", pa.large_binary())),
    ]
)
"""An image each: its name below the source, its URL where known, its place or its bytes."""


class Reference(NamedTuple):
    """Where an image lies."""

    file: str
    offset: int = 0
    size: int = WHOLE

    def read(self, max_bytes: int = MAX_BYTES) -> bytes:
        """Read the bytes.

        Raises:
            ImageError: `unreadable`, `too_large`, `truncated` or `empty`: this image's own fault.
            StorageError: the file system's or the tar's: another try may help.
        """
        try:
            with storage.open_regular(self.file) as file:
                return read_range(file, self, max_bytes)
        except storage.UnreadableFileError as error:
            if self.size != WHOLE:
                raise
            raise ImageError("unreadable", str(error)) from error


def read_range(file: IO[bytes], where: Reference, max_bytes: int) -> bytes:
    """Read an image of a file that is open.

    Raises:
        ImageError: as `Reference.read`.
    """
    if where.offset == NOWHERE:
        raise ImageError("unreadable", f"{where.file}: names it, and does not hold it in one piece")
    size = file.seek(0, 2) if where.size == WHOLE else where.size
    if size > max_bytes:
        raise ImageError("too_large", f"{where.file}: {size} bytes, allowed are {max_bytes}")
    file.seek(where.offset)
    data: bytes = file.read(size)
    if len(data) < size:
        end = where.offset + len(data)
        raise ImageError("truncated", f"{where.file}: ends at byte {end}, inside the image")
    if not data:
        raise ImageError("empty", f"{where.file}: no bytes")
    return data


def read_references(
    references: pa.Table, max_bytes: int = MAX_BYTES
) -> tuple[pa.Array | pa.ChunkedArray, list[str]]:
    """Bytes of each image, and why there are none, else ""; each tar is opened once.

    Raises:
        StorageError: the file system's or a tar's fault.
    """
    raw, files = references["raw"], references["file"].to_pylist()
    reasons = ["" if size else "empty" for size in pc.binary_length(raw).to_pylist()]
    groups: dict[bytes, list[tuple[int, int, int]]] = {}
    places = zip(references["offset"].to_pylist(), references["size"].to_pylist(), strict=True)
    for row, (file, (offset, size)) in enumerate(zip(files, places, strict=True)):
        if file is not None:
            groups.setdefault(file, []).append((offset, size, row))
    if not groups:
        return raw, reasons
    data: list[bytes | None] = raw.to_pylist()

    def read_file(file: bytes) -> None:
        for row, found in _read_ranges(as_path(file), sorted(groups[file]), max_bytes):
            if isinstance(found, bytes):
                data[row], reasons[row] = found, ""
            else:
                reasons[row] = found.reason

    storage.gather(read_file, list(groups), as_path(next(iter(groups))))
    return pa.array(data, pa.large_binary()), reasons


def _read_ranges(
    file: str, ranges: list[tuple[int, int, int]], max_bytes: int
) -> Iterator[tuple[int, bytes | ImageError]]:
    """Row and bytes of each range (offset, size, row) of a file, or why there are none."""
    if ranges[0][1] == WHOLE:
        for offset, size, row in ranges:
            yield row, _tried(lambda one: one.read(max_bytes), Reference(file, offset, size))
        return
    with storage.open_regular(file) as opened:
        for offset, size, row in ranges:
            where = Reference(file, offset, size)
            yield row, _tried(lambda one: read_range(opened, one, max_bytes), where)


def _tried(read: Callable[[Reference], bytes], where: Reference) -> bytes | ImageError:
    try:
        return read(where)
    except ImageError as error:
        return error
