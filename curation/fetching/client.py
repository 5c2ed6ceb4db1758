"""One safe GET: every hop checked, every step under a deadline, every error one of our reasons."""

import contextlib
import re
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from functools import partial
from typing import Generic, TypeVar
from urllib.parse import urljoin, urlsplit

from curation.config import Settings
from curation.fetching.bodies import BodyReader, ByteBudget
from curation.fetching.connections import Connection, ConnectionPool, Deadline, Head, Origin
from curation.fetching.optouts import check_headers
from curation.fetching.outcomes import TEMPORARY, FetchError, HostError, Trail, http_reason
from curation.fetching.resolver import Resolver
from curation.fetching.robots import RobotsRules, read_robots
from curation.fetching.robots_cache import RobotsCache
from curation.identity import normalize_url

T = TypeVar("T")

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_SMALL_BODY = 1 << 18
"""Bodies that nobody wants are read up to this size, to keep the connection."""
_DRAIN_S = 1.0
_WHOLE_RANGE = re.compile(r"bytes 0-(\d{1,18})/(\d{1,18})")


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
    robots_failure_s: float
    """Seconds for which a robots.txt that could not be had is not asked for again."""
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
            parts = urlsplit(normalize_url(url))
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        except ValueError as error:
            raise FetchError("bad_url") from error
        if not parts.hostname or parts.username is not None or parts.port == 0:
            raise FetchError("bad_url")
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        return cls(url, Origin(parts.scheme, parts.hostname, port), path)


@dataclass(frozen=True)
class _Inquiry(Generic[T]):
    """What is wanted of an answer, and of those that redirect to it."""

    read: Callable[[Head, Iterable[bytes]], T]
    """Takes it from the head, and from the body's parts as they arrive."""
    deadline: Deadline
    trail: Trail


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
        self._robots = RobotsCache(self._ask_for_rules, policy.robots_failure_s)
        self._fields = (
            f"User-Agent: {policy.user_agent}\r\n"
            "Accept: image/*,*/*;q=0.5\r\nAccept-Encoding: identity\r\n"
        ).encode("ascii")

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

        def enter(target: _Target) -> None:
            trail.final_url = target.url
            if self.policy.robots and not self._robots.rules_of(target.origin).allows(target.path):
                raise FetchError("opted_out:robots")

        deadline = Deadline(self.policy.total_timeout_s)
        inquiry = _Inquiry(partial(self._read, trail, deadline), deadline, trail)
        head, body = self._follow(url, enter, inquiry)
        if isinstance(body, FetchError):
            raise body
        if body is None:
            raise FetchError(http_reason(head.status), _retry_after(head))
        return Fetched(body, trail.final_url, head.status, trail.content_type or "")

    def _read(
        self, trail: Trail, deadline: Deadline, head: Head, parts: Iterable[bytes]
    ) -> bytes | FetchError | None:
        trail.http_status = head.status
        trail.content_type = head.get(b"content-type")
        if not _is_success(head):
            return None
        if head.status == 206 and not _is_whole(head):
            raise FetchError("truncated")
        policy = self.policy
        try:
            check_headers(head, policy.user_agent, policy.directives, tdm=policy.tdm)
        except FetchError as refusal:
            return refusal  # an answer like others: its connection is kept
        return self._bodies.read(head, parts, deadline)

    def _ask_for_rules(self, origin: Origin) -> RobotsRules:
        """RFC 9309 section 2.3.1: no file allows all; what cannot be reached forbids all."""
        hops: list[_Target] = []
        url = f"{origin.scheme}://{origin.authority}/robots.txt"
        inquiry = _Inquiry(_read_rules, Deadline(self.policy.total_timeout_s), Trail())
        try:
            head, text = self._follow(url, hops.append, inquiry)
        except FetchError as error:
            if isinstance(error, HostError) and len(hops) == 1:
                raise  # the image's own fetch would end the same way
            if error.reason in ("bad_url", "bad_scheme", "too_many_redirects"):
                return RobotsRules()
            raise FetchError("robots_unreachable") from error
        if text is not None:
            return RobotsRules.parse(text, self.policy.user_agent)
        if (reason := http_reason(head.status)) in TEMPORARY or reason == "http_other":
            raise FetchError("robots_unreachable", _retry_after(head))
        return RobotsRules()

    def _follow(
        self, url: str, enter: Callable[[_Target], None], inquiry: _Inquiry[T]
    ) -> tuple[Head, T]:
        """Ask, and follow redirects; `enter` may refuse each URL before it is asked for."""
        for _ in range(self.policy.max_redirects + 1):
            target = _Target.parse(url)
            enter(target)
            head, found = self._ask(target, inquiry)
            location = head.get(b"location") if head.status in _REDIRECTS else None
            if location is None:
                return head, found
            url = _joined(target.url, location)
        raise FetchError("too_many_redirects")

    def _ask(self, target: _Target, inquiry: _Inquiry[T]) -> tuple[Head, T]:
        """Ask once; again on a new connection where a kept one gave no answer to trust."""
        kept = None if target.path == "/robots.txt" else self._pool.take(target.origin)
        if kept is not None:
            try:
                return self._ask_over(kept, target, inquiry)
            except FetchError as error:
                self._pool.doubt(kept)
                if error.reason not in ("connection", "bad_response"):
                    raise
        fresh = self._pool.dial(target.origin, inquiry.deadline)
        return self._ask_over(fresh, target, inquiry)

    def _ask_over(
        self, connection: Connection, target: _Target, inquiry: _Inquiry[T]
    ) -> tuple[Head, T]:
        try:
            head = connection.get(target.path, self._fields, inquiry.deadline)
            found = inquiry.read(head, connection.parts())
            connection.drain(_SMALL_BODY, Deadline(_DRAIN_S))
            self._pool.give_back(connection, inquiry.trail)
        except BaseException:
            connection.close()
            raise
        return head, found


def _read_rules(head: Head, parts: Iterable[bytes]) -> str | None:
    return read_robots(head, parts) if _is_success(head) else None


def _is_success(head: Head) -> bool:
    return 200 <= head.status < 300


def _is_whole(head: Head) -> bool:
    """Whether a part that nobody asked for is all there is."""
    found = _WHOLE_RANGE.fullmatch((head.get(b"content-range") or "").strip())
    return found is not None and int(found[1]) + 1 == int(found[2])


def _joined(base: str, location: str) -> str:
    # Fields are read as latin-1; browsers take raw bytes in Location for UTF-8.
    with contextlib.suppress(UnicodeError):
        location = location.encode("latin-1").decode("utf-8")
    try:
        return urljoin(base, location.strip())
    except ValueError as error:
        raise FetchError("bad_url") from error


def _retry_after(head: Head) -> float | None:
    """Seconds that a server asks to be left alone; dates count from its own clock."""
    value = (head.get(b"retry-after") or "").strip()
    if value.isdecimal():
        return float(value)
    until, now = (_seconds_of(text) for text in (value, head.get(b"date") or ""))
    return None if until is None else max(until - (now or time.time()), 0.0)


def _seconds_of(date: str) -> float | None:
    """Seconds since the epoch of an HTTP date, None where it is none."""
    try:
        parsed = parsedate_tz(date)
        return None if parsed is None else float(mktime_tz(parsed))
    except (ValueError, OverflowError):
        return None
