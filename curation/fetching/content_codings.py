"""Undoes Content-Encodings as browsers do: what they do not know passes through as it is."""

import gzip
import io
import zlib
from collections.abc import Callable, Sequence

import pyarrow as pa

from curation.fetching.outcomes import FetchError

_MAX_CODINGS = 4
_GZIP_MAGIC = b"\x1f\x8b"
_ZLIB_STARTS = tuple(bytes([0x08 | window << 4]) for window in range(8))
"""No raw deflate begins so: it would be a stored block with a padding bit set."""


def codings_in(values: Sequence[str]) -> list[str]:
    """Codings that can be undone, in the order in which they were applied.

    values: of all Content-Encoding fields. Servers also write UTF-8, aws-chunked, none or a type.

    Raises:
        FetchError: bad_encoding, where there are more than anybody would apply.
    """
    names = [name.strip().lower() for value in values for name in value.split(",")]
    known = [name for name in names if name in _UNPACKERS]
    if len(known) > _MAX_CODINGS:
        raise FetchError("bad_encoding")
    return known


def unpack(body: bytes, codings: Sequence[str], max_bytes: int) -> bytes:
    """Undo codings, the last one first. An empty body is one, whatever it is said to be.

    Raises:
        FetchError: too_large; bad_encoding for what never was packed that way; truncated for what
            is short or damaged.
    """
    for name in reversed(codings if body else ()):
        try:
            body = _UNPACKERS[name](body, max_bytes + 1)
        except (EOFError, OSError, zlib.error) as error:
            raise FetchError("truncated") from error
        if len(body) > max_bytes:
            raise FetchError("too_large")
    return body


def is_gzip(body: bytes) -> bool:
    """Whether bytes begin as gzip does."""
    return body.startswith(_GZIP_MAGIC)


def _gunzip(body: bytes, max_bytes: int) -> bytes:
    """All members of a gzip file; some servers say gzip and send zlib."""
    if _is_zlib(body):
        return _inflate(body, max_bytes)
    if len(body) > 1 and not is_gzip(body):
        raise FetchError("bad_encoding")
    with gzip.GzipFile(fileobj=io.BytesIO(body)) as file:
        return file.read(max_bytes)


def _inflate(body: bytes, max_bytes: int) -> bytes:
    """Deflate, which is zlib by the standard, and raw or even gzip by some servers."""
    if is_gzip(body):
        return _gunzip(body, max_bytes)
    inflater = zlib.decompressobj(zlib.MAX_WBITS if _is_zlib(body) else -zlib.MAX_WBITS)
    out = inflater.decompress(body, max_bytes)
    if len(out) < max_bytes and (not inflater.eof or inflater.unused_data):
        raise EOFError
    return out


def _is_zlib(body: bytes) -> bool:
    return body[:1] in _ZLIB_STARTS and int.from_bytes(body[:2]) % 31 == 0


def _arrow(name: str) -> Callable[[bytes, int], bytes]:
    def read(body: bytes, max_bytes: int) -> bytes:
        return bytes(pa.CompressedInputStream(pa.BufferReader(body), name).read(max_bytes))

    return read


_UNPACKERS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gunzip,
    "x-gzip": _gunzip,
    "deflate": _inflate,
    "br": _arrow("brotli"),
    "zstd": _arrow("zstd"),
}
