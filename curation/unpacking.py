"""Packed files (gzip, bzip2, xz, zstd), unpacked a block at a time."""

import bz2
import io
import logging
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

import pyarrow as pa

from curation import storage
from curation.errors import DatasetError

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_OTHER_UNICODE = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"


def plain_name(path: str) -> str:
    """The name without a suffix of packing, in lower case."""
    lower = path.lower()
    for suffix in _UNPACKERS:
        lower = lower.removesuffix(suffix)
    return lower


def unpacked_blocks(path: str) -> Iterator[bytes]:
    """The bytes of a file, unpacked as its name says; a file of no bytes has none, packed or not.

    Raises:
        DatasetError: the file ends early, or is not packed so.
        StorageError: it cannot be read.
    """
    unpack = next((one for end, one in _UNPACKERS.items() if path.lower().endswith(end)), _plain)
    with storage.open_read(path) as file:
        blocks = unpack(file, path)
        while True:
            with _unpacking_errors(path):
                block = next(blocks, None)
            if block is None:
                return
            yield block


def without_mark(blocks: Iterable[bytes], path: str) -> Iterator[bytes]:
    """Blocks of UTF-8 without its byte order mark.

    Raises:
        DatasetError: another encoding's mark.
    """
    blocks = iter(blocks)
    head = b""
    while len(head) < len(_UTF8_MARK) and (block := next(blocks, None)) is not None:
        head += block
    if head.startswith(_OTHER_UNICODE):
        raise DatasetError(
            f"{path}: is UTF-16 or UTF-32; lists are UTF-8: iconv -f UTF-16 -t UTF-8 makes it so"
        )
    yield head.removeprefix(_UTF8_MARK)
    yield from blocks


def text_of(blocks: Iterator[bytes]) -> io.TextIOWrapper:
    """UTF-8 text whose lines keep their ends: LF, CRLF or CR.

    Bytes that are no UTF-8 become lone surrogates (`surrogateescape`).
    """
    stream = io.BufferedReader(_Stream(blocks), _BLOCK)
    return io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline="")


def text_lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file, packed or not, without their ends, with their numbers from 1.

    Raises:
        DatasetError: see `unpacked_blocks` and `without_mark`.
    """
    text = text_of(without_mark(unpacked_blocks(path), path))
    for number, line in enumerate(text, start=1):
        yield number, line.rstrip("\r\n")


class _Stream(io.RawIOBase):
    """Blocks as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


# --- kinds of packing ---------------------------------------------------------------------------


def _plain(file: IO[bytes], path: str) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _gunzip(file: IO[bytes], path: str) -> Iterator[bytes]:
    """All members; what follows the last one and is no member is left out, as gzip(1) does."""
    data = file.read(_BLOCK)
    while data:
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        while not member.eof:
            if not data:
                raise EOFError
            yield member.decompress(data, _BLOCK)
            data = member.unconsumed_tail or (b"" if member.eof else file.read(_BLOCK))
        data = member.unused_data
        data += file.read(_BLOCK) if len(data) < len(_GZIP_MAGIC) else b""
        if not data.startswith(_GZIP_MAGIC):
            if data.strip(b"\0"):
                logger.warning("%s: what follows its gzip data is none, and is left out", path)
            return


def _unpack_with(library: Any, file: IO[bytes], path: str) -> Iterator[bytes]:
    if not file.read(1):
        return
    file.seek(0)
    with library.open(file) as unpacked:
        yield from _plain(unpacked, path)


def _unzstd(file: IO[bytes], path: str) -> Iterator[bytes]:
    with pa.CompressedInputStream(file, "zstd") as unpacked:
        yield from _plain(unpacked, path)


_UNPACKERS: dict[str, Callable[[IO[bytes], str], Iterator[bytes]]] = {
    ".gz": _gunzip,
    ".bz2": partial(_unpack_with, bz2),
    ".xz": partial(_unpack_with, lzma),
    ".zst": _unzstd,
}
PACKED_SUFFIXES = tuple(_UNPACKERS)


@contextmanager
def _unpacking_errors(path: str) -> Iterator[None]:
    """Turn the libraries' errors about packed bytes into ours; those of the file system pass."""
    try:
        yield
    except EOFError as error:
        raise DatasetError(f"{path}: ends early; copy or fetch the file again") from error
    except (zlib.error, lzma.LZMAError, pa.ArrowInvalid) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        if "Truncated" in str(error):
            raise DatasetError(f"{path}: ends early; copy or fetch the file again") from error
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> DatasetError:
    suffix = path.rpartition(".")[2]
    return DatasetError(f"{path}: is damaged, or no .{suffix} file at all ({error})")
