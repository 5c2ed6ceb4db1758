"""Connections to checked addresses whose every read keeps to a deadline, kept alive per origin."""

import http.client
import io
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any

from curation.fetching.outcomes import FetchError
from curation.fetching.resolver import Resolver


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


class _TimedStream(io.RawIOBase):
    """Reads a socket; each read gets what is left of the deadline, so no drip can hold a thread."""

    def __init__(self, raw: Any, owner: "_TimedSocket") -> None:
        self._raw = raw
        self._owner = owner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._owner.arm()
        return int(self._raw.readinto(buffer))

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedSocket:
    """The part of a socket that http.client uses, under a deadline that each request renews."""

    def __init__(self, inner: socket.socket, read_timeout_s: float) -> None:
        self._inner = inner
        self._read_timeout_s = read_timeout_s
        self.deadline = Deadline(read_timeout_s)

    def arm(self) -> None:
        self._inner.settimeout(self.deadline.remaining(self._read_timeout_s))

    def sendall(self, data: Any) -> None:
        self.arm()
        self._inner.sendall(data)

    def makefile(self, mode: str, *args: Any, **kwargs: Any) -> io.BufferedReader:
        raw = self._inner.makefile("rb", buffering=0)
        return io.BufferedReader(_TimedStream(raw, self), 1 << 16)

    def close(self) -> None:
        self._inner.close()  # the file descriptor stays open until its streams are closed


class Connection(http.client.HTTPConnection):
    """An open connection to one origin."""

    def __init__(self, origin: Origin, inner: socket.socket, read_timeout_s: float) -> None:
        super().__init__(origin.host, origin.port)
        self.auto_open = 0  # http.client would connect anew by name, past the address check
        self.origin = origin
        self.is_reused = False
        self._timed = _TimedSocket(inner, read_timeout_s)
        self.sock = self._timed

    def get(
        self, path: str, headers: dict[str, str], deadline: Deadline
    ) -> http.client.HTTPResponse:
        """Send a GET and read the response's head."""
        self._timed.deadline = deadline
        self.putrequest("GET", path, skip_host=True, skip_accept_encoding=True)
        self.putheader("Host", self.origin.authority)
        for name, value in headers.items():
            self.putheader(name, value)
        self.endheaders()
        return self.getresponse()


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

    def take(self, origin: Origin, deadline: Deadline) -> Connection:
        """Give an idle connection to the origin, or dial a new one."""
        with self._lock:
            for index in range(len(self._idle) - 1, -1, -1):
                if self._idle[index].origin == origin:
                    connection = self._idle.pop(index)
                    connection.is_reused = True
                    return connection
        return self.dial(origin, deadline)

    def dial(self, origin: Origin, deadline: Deadline) -> Connection:
        """Connect to a checked address of the origin; the name is not looked up again after it.

        Raises:
            FetchError: private_address, dns, timeout, connection or tls.
        """
        inner = self._connect(origin, deadline)
        try:
            if origin.scheme == "https":
                inner.settimeout(deadline.remaining(self._connect_timeout_s))
                inner = self._tls.wrap_socket(inner, server_hostname=origin.host)
        except BaseException:
            inner.close()
            raise
        return Connection(origin, inner, self._read_timeout_s)

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose response was read to its end."""
        with self._lock:
            self._idle.append(connection)
            surplus = self._idle.pop(0) if len(self._idle) > self._max_idle else None
        if surplus is not None:
            surplus.close()

    def close(self) -> None:
        """Close all idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

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
