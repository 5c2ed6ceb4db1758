"""Reads bodies under a cap that holds for the bytes received and for what they unpack to."""

import http.client
import zlib

from curation.fetching.outcomes import FetchError

_CHUNK = 1 << 16


def read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """Read a whole body of at most `max_bytes`, unpacked where it was sent gzipped.

    Raises:
        FetchError: too_large, truncated or bad_encoding.
    """
    if response.length is not None and response.length > max_bytes:
        raise FetchError("too_large")
    unpacker = _unpacker(response.headers.get("Content-Encoding", ""))
    parts: list[bytes] = []
    received = size = 0
    while chunk := response.read(_CHUNK):
        received += len(chunk)
        part = chunk if unpacker is None else _unpack(unpacker, chunk, max_bytes - size)
        size += len(part)
        if max(received, size) > max_bytes:
            raise FetchError("too_large")
        parts.append(part)
    if response.length or (unpacker is not None and not unpacker.eof and received):
        raise FetchError("truncated")
    return b"".join(parts)


def read_up_to(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """Read the beginning of a body, as sent."""
    parts: list[bytes] = []
    left = max_bytes
    while left and (chunk := response.read(min(_CHUNK, left))):
        parts.append(chunk)
        left -= len(chunk)
    return b"".join(parts)


def _unpacker(encoding: str) -> "zlib._Decompress | None":
    """A decompressor, for servers that compress although they were asked not to."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return None
    if name in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(zlib.MAX_WBITS | 32)  # finds out whether gzip or zlib
    raise FetchError("bad_encoding")


def _unpack(unpacker: "zlib._Decompress", chunk: bytes, room: int) -> bytes:
    """Unpack a chunk, to at most one byte more than there is room for."""
    try:
        part = unpacker.decompress(chunk, room + 1)
    except zlib.error as error:
        raise FetchError("bad_encoding") from error
    if len(part) > room:
        raise FetchError("too_large")
    return part
