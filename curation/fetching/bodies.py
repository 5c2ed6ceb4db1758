"""Reads bodies under a cap that holds for the bytes received and for what they unpack to."""

import contextlib
import io
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from curation.fetching.connections import Deadline, Head
from curation.fetching.content_codings import codings_in, unpack
from curation.fetching.outcomes import FetchError

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

    def read(self, head: Head, parts: Iterable[bytes], deadline: Deadline) -> bytes:
        """Read a body, unpacked where it was sent packed.

        Raises:
            FetchError: too_large, truncated, bad_encoding or timeout.
        """
        codings = codings_in(head.get_all(b"content-encoding"))
        body = self._receive(head.body_bytes, parts, deadline)
        if not codings:
            return body
        with self.budget.reserve(self.max_bytes, deadline):
            return unpack(body, codings, self.max_bytes)

    def _receive(self, length: int | None, parts: Iterable[bytes], deadline: Deadline) -> bytes:
        if length is not None and length > self.max_bytes:
            raise FetchError("too_large")
        room = _SMALL if length is None else length
        body = io.BytesIO()  # one growing block: thousands of pieces would fragment the memory
        with contextlib.ExitStack() as held:
            if room > _SMALL:
                held.enter_context(self.budget.reserve(room, deadline))
            for part in parts:
                size = body.tell() + len(part)
                if size > self.max_bytes:
                    raise FetchError("too_large")
                if size > room:
                    room = self.max_bytes
                    held.enter_context(self.budget.reserve(room, deadline))
                body.write(part)
            return body.getvalue()
