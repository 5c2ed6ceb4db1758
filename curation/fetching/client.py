"""One safe GET: every hop checked, every step under a deadline, every error one of our reasons."""

import contextlib
import http.client
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from curation.config import Settings
from curation.fetching.bodies import BodyReader, ByteBudget, read_up_to
from curation.fetching.connections import Connection, ConnectionPool, Deadline, Origin
from curation.fetching.optouts import check_headers
from curation.fetching.outcomes import FetchError, http_reason
from curation.fetching.resolver import Resolver
from curation.fetching.robots import MAX_BYTES, RobotsRules
from curation.identity import normalise_url

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_SMALL_BODY = 1 << 14
"""Bodies of redirects and errors up to this size are read, to keep the connection."""


class FetchPolicy(Settings):
    """What a fetch may do and for how long."""

    user_agent: str
    """Sent with each request; its leading letters are the token that robots.txt files name."""
    allow_private: bool
    """Whether private, loopback and link-local addresses may be fetched from."""
    allow_public: bool
    """Whether public addresses may: only for crawlers that say who they are."""
    max_bytes: int
    """Larger bodies are refused."""
    max_bytes_in_flight: int
    """Room for large bodies that are being read at the same time."""
    max_redirects: int
    """Longer chains of redirects are refused."""
    connect_timeout_s: float
    """Seconds for one connection, and for its TLS handshake."""
    read_timeout_s: float
    """Seconds of silence."""
    total_timeout_s: float
    """Seconds for one attempt with all its redirects."""
    robots: bool
    """Whether robots.txt is read and respected."""
    directives: tuple[str, ...]
    """Directives of X-Robots-Tag that opt out."""
    tdm: bool
    """Whether tdm-reservation: 1 opts out."""
    ca_file: str | None
    """Certificates to trust beside the system's."""


@dataclass(frozen=True)
class Fetched:
    """A body that arrived."""

    body: bytes
    final_url: str
    http_status: int
    content_type: str


@dataclass
class Trail:
    """How far a fetch got; filled in as it goes, so that failures can tell."""

    final_url: str = ""
    http_status: int | None = None
    content_type: str | None = None


@dataclass(frozen=True)
class _Target:
    url: str
    origin: Origin
    path: str

    @classmethod
    def parse(cls, url: str) -> "_Target":
        """Take a URL apart.

        Raises:
            FetchError: bad_scheme or bad_url.
        """
        try:
            scheme = urlsplit(url.strip()).scheme.lower()
            if scheme not in ("http", "https"):
                raise FetchError("bad_scheme" if scheme else "bad_url")
            parts = urlsplit(normalise_url(url))
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        except ValueError as error:
            raise FetchError("bad_url") from error
        if not parts.hostname or parts.username is not None or parts.port == 0:
            raise FetchError("bad_url")
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        return cls(url, Origin(parts.scheme, parts.hostname, port), path)


class Client:
    """Fetches URLs from many threads; remembers names, robots.txt files and connections."""

    def __init__(self, policy: FetchPolicy, resolver: Resolver | None = None) -> None:
        self.policy = policy
        self._resolver = resolver or Resolver(
            allow_private=policy.allow_private, allow_public=policy.allow_public
        )
        tls = ssl.create_default_context()
        if policy.ca_file is not None:
            tls.load_verify_locations(policy.ca_file)
        self._pool = ConnectionPool(
            self._resolver,
            tls,
            connect_timeout_s=policy.connect_timeout_s,
            read_timeout_s=policy.read_timeout_s,
        )
        self._bodies = BodyReader(policy.max_bytes, ByteBudget(policy.max_bytes_in_flight))
        self._lock = threading.Lock()
        self._robots: dict[Origin, Future[RobotsRules | None]] = {}

    def rest(self) -> None:
        """Close idle connections: nobody waits with an open one until the next shard."""
        self._pool.close()

    def close(self) -> None:
        """Close connections and stop lookups."""
        self._pool.close()
        self._resolver.close()

    def fetch(self, url: str, trail: Trail) -> Fetched:
        """Fetch an image's bytes, following redirects.

        Raises:
            FetchError: with one of our reasons.
        """
        deadline = Deadline(self.policy.total_timeout_s)
        for _ in range(self.policy.max_redirects + 1):
            target = _Target.parse(url)
            trail.final_url = target.url
            if self.policy.robots:
                self._check_robots(target)
            with self._get(target, deadline) as response:
                trail.http_status = response.status
                trail.content_type = response.headers.get("Content-Type")
                if 200 <= response.status < 300:
                    return self._read(response, trail, deadline)
            location = _location(response)
            if location is None:
                raise _status_error(response)
            url = _joined(target.url, location)
        raise FetchError("too_many_redirects")

    def _read(
        self, response: http.client.HTTPResponse, trail: Trail, deadline: Deadline
    ) -> Fetched:
        policy = self.policy
        check_headers(response.headers, policy.user_agent, policy.directives, tdm=policy.tdm)
        body = self._bodies.read(response, deadline)
        return Fetched(body, trail.final_url, response.status, trail.content_type or "")

    @contextlib.contextmanager
    def _get(self, target: _Target, deadline: Deadline) -> Iterator[http.client.HTTPResponse]:
        """A response; its connection is kept if the body was read to its end."""
        with _foreign_errors():
            connection, response = self._send(target, deadline)
            try:
                yield response
                if not response.isclosed() and (response.length or _SMALL_BODY) <= _SMALL_BODY:
                    read_up_to(response, _SMALL_BODY)
                reusable = response.isclosed() and not response.will_close
            except BaseException:
                response.close()
                connection.close()
                raise
            if reusable:
                self._pool.give_back(connection)
            else:
                response.close()
                connection.close()

    def _send(
        self, target: _Target, deadline: Deadline
    ) -> tuple[Connection, http.client.HTTPResponse]:
        headers = {
            "User-Agent": self.policy.user_agent,
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "identity",
        }
        connection = self._pool.take(target.origin, deadline)
        while True:
            try:
                return connection, connection.get(target.path, headers, deadline)
            except BaseException as error:
                connection.close()
                # A server may close an idle connection at any time: that is nobody's failure.
                if not (connection.is_reused and isinstance(error, ConnectionError)):
                    raise
                connection = self._pool.dial(target.origin, deadline)

    # --- robots.txt -----------------------------------------------------------------------------

    def _check_robots(self, target: _Target) -> None:
        rules = self._rules_of(target.origin)
        if rules is None:
            raise FetchError("robots_unreachable")
        if not rules.allows(target.path):
            raise FetchError("opted_out:robots")

    def _rules_of(self, origin: Origin) -> RobotsRules | None:
        """Rules of an origin, fetched by the first who asks; the others wait for them."""
        with self._lock:
            known = self._robots.get(origin)
            if known is None:
                mine: Future[RobotsRules | None] = Future()
                self._robots[origin] = mine
        if known is not None:
            return known.result()
        try:
            mine.set_result(self._fetch_rules(origin))
        except BaseException as error:
            mine.set_exception(error)
            with self._lock:
                del self._robots[origin]
            raise
        return mine.result()

    def _fetch_rules(self, origin: Origin) -> RobotsRules | None:
        """RFC 9309 section 2.3.1: no file allows all; None where the server cannot be reached."""
        url = f"{origin.scheme}://{origin.authority}/robots.txt"
        deadline = Deadline(self.policy.total_timeout_s)
        for _ in range(self.policy.max_redirects + 1):
            target = _Target.parse(url)
            try:
                with self._get(target, deadline) as response:
                    location = _location(response)
                    if location is None:
                        return self._rules_in(response)
                url = _joined(target.url, location)
                _Target.parse(url)
            except FetchError as error:
                if error.reason in ("dns", "private_address", "public_address", "tls"):
                    raise  # the image's own fetch would end the same way
                return RobotsRules() if error.reason in ("bad_url", "bad_scheme") else None
        return RobotsRules()

    def _rules_in(self, response: http.client.HTTPResponse) -> RobotsRules | None:
        if response.status >= 500 or response.status == 429:
            return None
        if not 200 <= response.status < 300:
            return RobotsRules()
        text = read_up_to(response, MAX_BYTES).decode("utf-8", "replace")
        return RobotsRules.parse(text, self.policy.user_agent)


def _location(response: http.client.HTTPResponse) -> str | None:
    if response.status not in _REDIRECTS:
        return None
    return response.headers.get("Location")


def _joined(base: str, location: str) -> str:
    # http.client reads headers as latin-1; browsers take raw bytes in Location for UTF-8.
    with contextlib.suppress(UnicodeError):
        location = location.encode("latin-1").decode("utf-8")
    try:
        return urljoin(base, location.strip())
    except ValueError as error:
        raise FetchError("bad_url") from error


def _status_error(response: http.client.HTTPResponse) -> FetchError:
    error = FetchError(http_reason(response.status))
    error.retry_after_s = _retry_after(response.headers.get("Retry-After"))
    return error


def _retry_after(value: str | None) -> float | None:
    """Seconds that a server asks to be left alone; dates are not worth a clock's trust."""
    return float(value) if value is not None and value.strip().isdecimal() else None


@contextlib.contextmanager
def _foreign_errors() -> Iterator[None]:
    """Map what sockets, TLS and http.client raise to our reasons, in one place."""
    try:
        yield
    except FetchError:
        raise
    except TimeoutError as error:
        raise FetchError("timeout") from error
    except ssl.SSLError as error:
        raise FetchError("tls") from error
    except http.client.IncompleteRead as error:
        raise FetchError("truncated") from error
    except OSError as error:  # refused, reset, unreachable; RemoteDisconnected is one
        raise FetchError("connection") from error
    except (http.client.HTTPException, ValueError) as error:
        raise FetchError("bad_response") from error
