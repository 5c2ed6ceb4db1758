"""Connections to checked addresses whose every read keeps to a deadline, kept alive per origin.

What HTTP says about heads, bodies and their ends is h11's affair; sockets and time are ours.
"""

import contextlib
import itertools
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import h11

from curation.fetching.outcomes import FetchError, HostError, Trail
from curation.fetching.resolver import Resolver

_CHUNK = 1 << 17
_HEAD_CHUNK = 1 << 13
_MAX_HEAD_BYTES = 1 << 18
"""Of all heads of one answer together, as in browsers."""
_MAX_FIELDS = 100
_MAX_INTERIM = 100
"""Answers of class 1xx before the real one."""
_MAX_SETTLING_S = 0.25
_DISTRUST_S = 600.0
_BLANK_LINE = re.compile(rb"\n\r?\n")
_IGNORED_LINE = re.compile(
    rb"\n(?![-!#$%&'*+.^_`|~0-9a-zA-Z]+:|[ \t]|\r?\n|\Z)[^\n]*"
    rb"|\ntransfer-encoding:[ \t]*identity[ \t]*\r?(?=\n)",
    re.IGNORECASE,
)
"""Lines of a head that are no field, and a coding that never was one: browsers skip them."""


class Deadline:
    """The moment by which a whole fetch must be over."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def remaining(self, at_most_s: float) -> float:
        """Seconds that one step may take.

        Raises:
            FetchError: timeout, when none are left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise FetchError("timeout")
        return min(left, at_most_s)


@dataclass(frozen=True)
class Origin:
    """What a connection leads to."""

    scheme: str
    host: str
    port: int

    @property
    def authority(self) -> str:
        """Host, and port where it is not the scheme's own, as in a Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = {"http": 80, "https": 443}[self.scheme]
        return host if self.port == default else f"{host}:{self.port}"


@dataclass(frozen=True)
class Head:
    """The status and the header fields of an answer."""

    status: int
    fields: Mapping[bytes, Sequence[bytes]]
    """Values by names in lower case."""

    @classmethod
    def of(cls, response: h11.Response) -> "Head":
        """Take a head from h11."""
        fields: dict[bytes, list[bytes]] = {}
        for name, value in response.headers:
            fields.setdefault(name, []).append(value)
        return cls(response.status_code, fields)

    def get_all(self, name: bytes) -> list[str]:
        """Values of a field, whose name is given in lower case."""
        return [value.decode("latin-1") for value in self.fields.get(name, ())]

    def get(self, name: bytes) -> str | None:
        """The first value of a field."""
        values = self.fields.get(name)
        return values[0].decode("latin-1") if values else None

    @property
    def body_bytes(self) -> int | None:
        """Announced length of the body, if it is."""
        if b"transfer-encoding" in self.fields or b"content-length" not in self.fields:
            return None
        return int(self.fields[b"content-length"][0])


class Connection:
    """An open connection to one origin."""

    def __init__(self, origin: Origin, inner: socket.socket, read_timeout_s: float) -> None:
        self.origin = origin
        self.is_kept = False
        """Whether it has carried an answer before."""
        self.carried: list[Trail] = []
        """Of the answers since then: what comes too late shows that they were others' answers."""
        self.settles_at = 0.0
        """When a late answer would have come."""
        self.is_free = False
        """Whether another request may follow."""
        self._slowest_s = 0.0
        self._socket = inner
        self._readable = select.poll()
        self._readable.register(inner, select.POLLIN)
        self._read_timeout_s = read_timeout_s
        self._deadline = Deadline(read_timeout_s)
        self._http = h11.Connection(h11.CLIENT, _MAX_HEAD_BYTES)
        self._received = bytearray()
        """Of heads that are not complete."""

    def get(self, path: str, fields: bytes, deadline: Deadline) -> Head:
        """Send a GET and read the head of its answer, past every interim one.

        fields: lines of the request's head beside Host, ready to send.

        Raises:
            FetchError: timeout, connection, or bad_response.
        """
        self._deadline = deadline
        host = [("Host", self.origin.authority)]
        try:
            request = self._http.send(h11.Request(method="GET", target=path, headers=host)) or b""
            self._http.send(h11.EndOfMessage())
            self._arm()
            began = time.monotonic()
            self._socket.sendall(request.removesuffix(b"\r\n") + fields + b"\r\n")
            head = self._receive_answer()
        except (OSError, h11.ProtocolError) as error:
            raise FetchError(_reason_of(error)) from error
        self._slowest_s = max(self._slowest_s, time.monotonic() - began)
        return head

    def parts(self) -> Iterator[bytes]:
        """The body as it arrives, to its very end.

        Raises:
            FetchError: timeout, connection, or truncated where it ends early or is damaged.
        """
        try:
            while self._http.their_state is h11.SEND_BODY:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    self._http.receive_data(self._receive())
                elif isinstance(event, h11.Data):
                    yield event.data
        except h11.RemoteProtocolError as error:
            raise FetchError("truncated") from error
        except OSError as error:
            raise FetchError(_reason_of(error)) from error

    def drain(self, max_bytes: int, deadline: Deadline) -> None:
        """Read what is left of a body that nobody wants, unless that is more than it is worth."""
        self._deadline = deadline
        with contextlib.suppress(FetchError):
            for part in self.parts():
                max_bytes -= len(part)
                if max_bytes < 0:
                    break

    def surplus(self) -> bytes | None:
        """What has come and was not asked for; empty where the connection is over, else None."""
        if self._http.their_state in (h11.SEND_BODY, h11.ERROR):
            return b""
        trailing, is_closed = self._http.trailing_data
        if trailing or is_closed:
            return trailing
        pending = self._socket.pending() if isinstance(self._socket, ssl.SSLSocket) else 0
        if not pending and not self._readable.poll(0):
            return None
        try:
            self._socket.settimeout(0)
            return self._socket.recv(1)
        except ssl.SSLWantReadError:  # a session ticket, say
            return None
        except OSError:
            return b"what a reset may have hidden"

    def is_settled(self) -> bool:
        """Whether an answer that is late would have come."""
        return time.monotonic() >= self.settles_at

    def end_answer(self, trail: Trail) -> bool:
        """Note that all of an answer has come, for the fetch of `trail`, if it has."""
        if self._http.their_state not in (h11.DONE, h11.MUST_CLOSE):
            return False
        if self.is_kept:
            self.carried.append(trail)
        self.settles_at = time.monotonic() + min(2 * self._slowest_s, _MAX_SETTLING_S)
        self.is_free = self._http.their_state is h11.DONE
        if self.is_free:
            self._http.start_next_cycle()
            self.is_kept = True
        return True

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _receive_answer(self) -> Head:
        room = _MAX_HEAD_BYTES
        for _ in range(_MAX_INTERIM):
            raw = self._receive_head(room)
            room -= len(raw)
            if room < 0:
                break
            self._http.receive_data(_IGNORED_LINE.sub(b"", raw))
            event = cast("h11.Response | h11.InformationalResponse", self._http.next_event())
            if len(event.headers) > _MAX_FIELDS:
                break
            if isinstance(event, h11.Response):
                if self._received:
                    self._http.receive_data(bytes(self._received))
                self._received.clear()
                return Head.of(event)
        raise FetchError("bad_response")

    def _receive_head(self, max_bytes: int) -> bytes:
        """Take the bytes of the next head, with its blank line."""
        searched = 0
        while not (end := _BLANK_LINE.search(self._received, max(searched - 3, 0))):
            searched = len(self._received)
            if searched > max_bytes:
                raise FetchError("bad_response")
            chunk = self._receive(_HEAD_CHUNK)
            if not chunk:
                raise FetchError("connection")
            self._received += chunk
        head = bytes(self._received[: end.end()])
        del self._received[: end.end()]
        return head

    def _receive(self, max_bytes: int = _CHUNK) -> bytes:
        self._arm()
        return self._socket.recv(max_bytes)

    def _arm(self) -> None:
        """Give a step what is left of the deadline, so that no drip can hold a thread."""
        self._socket.settimeout(self._deadline.remaining(self._read_timeout_s))


class ConnectionPool:
    """Dials checked addresses, and keeps idle connections for the next request to an origin."""

    def __init__(
        self,
        resolver: Resolver,
        tls: ssl.SSLContext,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        max_idle: int = 64,
    ) -> None:
        self._resolver = resolver
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._max_idle = max_idle
        self._lock = threading.Lock()
        self._idle: list[Connection] = []  # oldest first
        self._distrusted: dict[Origin, float] = {}  # until when

    def take(self, origin: Origin) -> Connection | None:
        """Give an idle connection to the origin, if there is one that has been quiet."""
        while (connection := self._pop(origin)) is not None:
            if self._is_quiet(connection):
                if connection.is_settled():
                    connection.carried.clear()
                return connection
            connection.close()
        return None

    def dial(self, origin: Origin, deadline: Deadline) -> Connection:
        """Connect to a checked address of the origin; the name is not looked up again after it.

        Raises:
            HostError: private_address, public_address, dns, dns_unavailable, timeout, connection
                or tls.
        """
        try:
            inner = self._secured(self._connect(origin, deadline), origin, deadline)
        except (FetchError, OSError, ValueError) as error:
            raise HostError(_reason_of(error)) from error
        return Connection(origin, inner, self._read_timeout_s)

    def give_back(self, connection: Connection, trail: Trail) -> None:
        """Keep a connection whose answer, of the fetch of `trail`, was read to its end.

        Raises:
            FetchError: bad_response, where a kept connection did not end its answer, or more has
                come than was asked for: nobody can say to which request the answer belonged.
        """
        was_kept = connection.is_kept
        is_quiet = self._is_quiet(connection)
        with self._lock:
            is_trusted = time.monotonic() >= self._distrusted.get(connection.origin, 0.0)
        is_whole = is_trusted and connection.end_answer(trail)
        if was_kept and not is_whole:
            raise FetchError("bad_response")
        if was_kept or (is_whole and is_quiet and connection.is_free):
            self._keep(connection)
        else:
            connection.close()

    def doubt(self, connection: Connection) -> None:
        """Keep no connections for a while to an origin that breaks them or sends more than asked.

        What this one has carried is doubtful, and what others have that may still bring more.
        """
        origin = connection.origin
        with self._lock:
            self._distrusted[origin] = time.monotonic() + _DISTRUST_S
            others = [one for one in self._idle if one.origin == origin]
            self._idle = [one for one in self._idle if one.origin != origin]
        unsettled = [one for one in others if not one.is_settled() or one.surplus()]
        for trail in itertools.chain(*(one.carried for one in (connection, *unsettled))):
            trail.is_doubtful = True
        for one in others:
            one.close()

    def close(self) -> None:
        """Close all idle connections, when what they may still bring has had its time."""
        with self._lock:
            idle, self._idle = self._idle, []
        settles_at = max((one.settles_at for one in idle if one.carried), default=0.0)
        time.sleep(max(settles_at - time.monotonic(), 0.0))
        for connection in idle:
            self._is_quiet(connection)
            connection.close()

    def _is_quiet(self, connection: Connection) -> bool:
        """Whether a connection is open and nothing has come that was not asked for."""
        surplus = connection.surplus()
        if surplus:
            self.doubt(connection)
        return surplus is None

    def _keep(self, connection: Connection) -> None:
        with self._lock:
            self._idle.append(connection)
            oldest = self._idle.pop(0) if len(self._idle) > self._max_idle else None
        if oldest is not None:
            self._is_quiet(oldest)
            oldest.close()

    def _pop(self, origin: Origin) -> Connection | None:
        with self._lock:
            for index in range(len(self._idle) - 1, -1, -1):
                if self._idle[index].origin == origin and self._idle[index].is_free:
                    return self._idle.pop(index)
        return None

    def _connect(self, origin: Origin, deadline: Deadline) -> socket.socket:
        failure: OSError | None = None
        for address in self._resolver.addresses(origin.host)[:4]:
            timeout = deadline.remaining(self._connect_timeout_s)
            try:
                inner = socket.create_connection((address, origin.port), timeout)
            except OSError as error:
                failure = error
                continue
            inner.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return inner
        assert failure is not None, "the resolver gives at least one address"
        raise failure

    def _secured(self, inner: socket.socket, origin: Origin, deadline: Deadline) -> socket.socket:
        if origin.scheme == "http":
            return inner
        try:
            inner.settimeout(deadline.remaining(self._connect_timeout_s))
            return self._tls.wrap_socket(inner, server_hostname=origin.host)
        except BaseException:
            inner.close()
            raise


def _reason_of(error: Exception) -> str:
    """Our reason for what sockets, TLS and h11 raise, in one place."""
    if isinstance(error, FetchError):
        return error.reason
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):  # it hung up
        return "connection"
    if isinstance(error, ssl.SSLError):
        return "tls"
    if isinstance(error, OSError):  # refused, reset, unreachable
        return "connection"
    return "bad_response"
