"""Arrays in one file, with a header that says what they are: written whole, read by range.

A column is an array of any shape, of which rows, along its first axis, can be read alone; columns
may differ in length. Locally a file is mapped once and nothing is copied; on an object store the
first request brings the header and all columns that end within `_HEAD_BYTES`, and one more batch
of requests, side by side, brings what is asked for of the others. In use:

    write_columns(path, {"bounds": bounds, "position": positions, "score": scores})
    file = ColumnFile.open(path)
    start, stop = file["bounds"][partition : partition + 2]
    positions, scores = file.read(["position", "score"], start, stop)

The header is a mark, the length and the CRC-32 of a text, and that text: JSON of each column's
type, shape and first byte after the header. Put small columns, such as offsets, first.
"""

import json
import math
import mmap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from curation import storage
from curation.errors import StorageError

_MARK = b"columns1"
_PREFIX_BYTES = 16
"""The mark, then two numbers of four bytes."""
_ALIGNMENT = 64
"""Columns begin at multiples of this, as vector instructions like it."""
_HEAD_BYTES = 1 << 14
"""Fetched with the header from an object store: a request takes longer than so few bytes."""


TypeAndShape = tuple[np.dtype | str, tuple[int, ...]]


@dataclass(frozen=True)
class Column:
    """Where one array lies."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The byte behind its last."""
        return self.offset + self.shape[0] * self.row_bytes

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """First byte and end of some rows."""
        return self.offset + start * self.row_bytes, self.offset + stop * self.row_bytes

    def rows(self, data: bytes | mmap.mmap, first_byte: int, start: int, stop: int) -> np.ndarray:
        """Rows of it, out of bytes of the file that begin at `first_byte`."""
        shape = (stop - start, *self.shape[1:])
        place = self.offset + start * self.row_bytes - first_byte
        count = math.prod(shape)
        if count == 0:
            return np.empty(shape, self.dtype)
        return np.frombuffer(data, self.dtype, count, place).reshape(shape)


def write_columns(path: str, columns: Mapping[str, np.ndarray]) -> None:
    """Write arrays of numbers, whole or not at all."""
    head, described = _layout({name: (one.dtype, one.shape) for name, one in columns.items()})
    with storage.open_whole(path) as file:
        written = file.write(head)
        for name, array in columns.items():
            file.write(bytes(described[name].offset - written))
            raw = np.ascontiguousarray(array, described[name].dtype)
            file.write(raw.reshape(-1).view(np.uint8).data if raw.size else b"")
            written = described[name].end


def _layout(shapes: Mapping[str, TypeAndShape]) -> tuple[bytes, dict[str, Column]]:
    """The header of some columns, up to the first of them, and where each lies."""
    listed, end = {}, 0
    for name, (kind, shape) in shapes.items():
        dtype = np.dtype(kind).newbyteorder("<")
        start = _aligned(end)
        listed[name] = [dtype.str, list(shape), start]
        end = start + math.prod(shape) * dtype.itemsize
    text = json.dumps(listed).encode()
    head = _MARK + len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little") + text
    first = _aligned(len(head))
    return head.ljust(first, b"\0"), _columns_of(text, first)


@dataclass(frozen=True)
class ColumnFile:
    """An open file of columns; it holds no handle of the file system."""

    path: str
    columns: Mapping[str, Column]
    data: bytes | mmap.mmap
    """The whole file where it is local, else its first bytes."""

    @classmethod
    def expect(cls, path: str, shapes: Mapping[str, TypeAndShape]) -> "ColumnFile":
        """One of which the columns are known, in their order: nothing is read, nor checked."""
        return cls(path, _layout(shapes)[1], b"")

    @classmethod
    def open(cls, path: str) -> "ColumnFile":
        """Read the header.

        Raises:
            StorageError: the file is missing or damaged.
        """
        data = _mapped(path) if storage.is_local(path) else storage.read_start(path, _HEAD_BYTES)
        size = len(data) if storage.is_local(path) else None
        length = int.from_bytes(data[8:12], "little")
        if data[:8] != _MARK or len(data) < _PREFIX_BYTES:
            _damaged(path, "has no header of columns")
        if len(data) < _PREFIX_BYTES + length and size is None:
            data = storage.read_start(path, _PREFIX_BYTES + length)
        text = data[_PREFIX_BYTES : _PREFIX_BYTES + length]
        if len(text) < length or zlib.crc32(text) != int.from_bytes(data[12:16], "little"):
            _damaged(path, "its header is not what was written")
        try:
            columns = _columns_of(text, _aligned(_PREFIX_BYTES + length))
        except (ValueError, TypeError, AttributeError):
            _damaged(path, "its header lists no columns")
        end = max((column.end for column in columns.values()), default=0)
        if size is not None and size < end:
            _damaged(path, f"has {size} bytes, needs {end}")
        return cls(path, columns, data)

    def __getitem__(self, name: str) -> np.ndarray:
        """A column, mapped where the file is local."""
        return self.read([name], 0, self.num_rows(name))[0]

    def num_rows(self, name: str) -> int:
        """Rows of a column.

        Raises:
            StorageError: there is none of this name.
        """
        if name not in self.columns:
            _damaged(self.path, f"has no column '{name}', only {', '.join(self.columns)}")
        return self.columns[name].shape[0]

    def read(self, names: Sequence[str], start: int, stop: int) -> list[np.ndarray]:
        """Some rows of some columns, mapped or with one batch of requests.

        Raises:
            StorageError: no such column or rows, or the file is too short.
        """
        for name in names:
            if not 0 <= start <= stop <= self.num_rows(name):
                _damaged(self.path, f"has no rows {start} to {stop} of '{name}'")
        wanted = [self.columns[name] for name in names]
        spans = [(self.path, *one.span(start, stop)) for one in wanted]
        far = [span for span in spans if span[2] > len(self.data) and span[1] < span[2]]
        fetched = dict(zip(far, storage.read_ranges(far), strict=True))
        return [
            one.rows(fetched.get(span, self.data), span[1] if span in fetched else 0, start, stop)
            for one, span in zip(wanted, spans, strict=True)
        ]


def _columns_of(text: bytes, start: int) -> dict[str, Column]:
    """The columns that a header lists. start: the first byte behind the header."""
    return {
        name: Column(np.dtype(kind), tuple(shape), start + offset)
        for name, (kind, shape, offset) in json.loads(text).items()
    }


def _mapped(path: str) -> mmap.mmap | bytes:
    """All bytes of a local file, read when they are touched; b"" of an empty one."""
    with storage.storage_errors(path), Path(path.removeprefix("file://")).open("rb") as file:
        if not file.seek(0, 2):
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _damaged(path: str, what: str) -> NoReturn:
    raise StorageError(f"{path}: {what}; remove it and run the stage again")
