"""Reads bodies under a cap that holds for the bytes received and for what they unpack to."""

import contextlib
import http.client
import io
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from curation.fetching.connections import Deadline
from curation.fetching.outcomes import FetchError

_CHUNK = 1 << 16
_SMALL = 1 << 20
"""Bodies up to this size are read without asking for room."""


class ByteBudget:
    """Room for large bodies that are being read; shared by all threads."""

    def __init__(self, capacity: int) -> None:
        self._capacity = self._free = capacity
        self._condition = threading.Condition()

    @contextlib.contextmanager
    def reserve(self, num_bytes: int, deadline: Deadline) -> Iterator[None]:
        """Hold room, all at once: who holds some never waits for more.

        Raises:
            FetchError: timeout, when there is none until the deadline.
        """
        num_bytes = min(num_bytes, self._capacity)
        with self._condition:
            while self._free < num_bytes:
                self._condition.wait(deadline.remaining(1.0))
            self._free -= num_bytes
        try:
            yield
        finally:
            with self._condition:
                self._free += num_bytes
                self._condition.notify_all()


@dataclass(frozen=True)
class BodyReader:
    """Reads whole bodies."""

    max_bytes: int
    """Larger ones are refused."""
    budget: ByteBudget

    def read(self, response: http.client.HTTPResponse, deadline: Deadline) -> bytes:
        """Read a body, unpacked where it was sent gzipped.

        Raises:
            FetchError: too_large, truncated, bad_encoding or timeout.
        """
        length = response.length
        if length is not None and length > self.max_bytes:
            raise FetchError("too_large")
        unpacker = _unpacker(response.headers.get("Content-Encoding", ""))
        body = io.BytesIO()  # one growing block: thousands of pieces would fragment the memory
        with contextlib.ExitStack() as held:
            room = _SMALL
            if unpacker is None and length is not None:
                room = length
                if length > _SMALL:
                    held.enter_context(self.budget.reserve(length, deadline))
            for part in self._parts(response, unpacker):
                if body.tell() + len(part) > room:
                    room = self.max_bytes
                    held.enter_context(self.budget.reserve(room, deadline))
                body.write(part)
        return body.getvalue()

    def _parts(
        self, response: http.client.HTTPResponse, unpacker: "zlib._Decompress | None"
    ) -> Iterator[bytes]:
        received = size = 0
        while chunk := response.read(_CHUNK):
            received += len(chunk)
            room = self.max_bytes - size
            part = chunk if unpacker is None else _unpack(unpacker, chunk, room)
            size += len(part)
            if max(received, size) > self.max_bytes:
                raise FetchError("too_large")
            yield part
        if response.length or (unpacker is not None and not unpacker.eof and received):
            raise FetchError("truncated")


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
