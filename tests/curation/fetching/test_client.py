"""Whatever a server says and when, no row holds another URL's bytes."""

import contextlib
import socket
import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from raw_server import answer, reset, serving

from curation.fetching.client import Client
from curation.fetching.outcomes import REASONS, FetchError, Trail
from curation.stages.download import Download

MAX_BYTES = 200_000


def client(**changes: object) -> Client:
    quick = {"read_timeout_s": 0.2, "total_timeout_s": 1.0, "connect_timeout_s": 1.0}
    stage = Download(
        allow_private=True, max_bytes=MAX_BYTES, **{**quick, "robots": False, **changes}
    )
    return Client(stage.policy)


def image_of(path: str) -> bytes:
    return f"<{path}>".encode() * 50


def chunked(body: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    middle = len(body) // 2
    parts = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:middle], body[middle:]))
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + parts + end


def head(*fields: bytes, status: bytes = b"200 OK") -> bytes:
    return b"\r\n".join([b"HTTP/1.1 " + status, *fields, b"", b""])


def interim(status: bytes, *fields: bytes) -> bytes:
    return head(*fields, status=status)


OTHER = answer(b"another URL's image")
HINTS = interim(b"103 Early Hints", b"Link: </s.css>; rel=preload")

Answer = Callable[[bytes], bytes]
ARRIVING: dict[str, Answer] = {
    "plain": answer,
    "100": lambda body: interim(b"100 Continue") + answer(body),
    "102": lambda body: interim(b"102 Processing") + answer(body),
    "103": lambda body: HINTS + answer(body),
    "several-103": lambda body: HINTS * 5 + interim(b"100 Continue") + HINTS + answer(body),
    "unknown-1xx": lambda body: interim(b"199 Whatever", b"Content-Length: 7") + answer(body),
    "chunked": chunked,
    "trailer": lambda body: chunked(body, b"0\r\nX-Sum: 1\r\nContent-Length: 5\r\n\r\n"),
    "length-twice": lambda body: answer(body, b"Content-Length: %d" % len(body)),
    "length-and-chunks": lambda body: chunked(body).replace(
        b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n", 1
    ),
    "says-it-closes": lambda body: answer(body, b"Connection: close"),
    "identity": lambda body: answer(body, b"Transfer-Encoding: identity"),
    "odd-lines": lambda body: answer(body, b"X Y: z", b"no colon", b": none", b"A : b"),
    "bare-newlines": lambda body: answer(body).replace(b"\r\n", b"\n"),
    "extra-newline": lambda body: answer(body) + b"\r\n",
    "extra-bytes": lambda body: answer(body) + b"x" * 3000,
    "another-answer": lambda body: answer(body) + OTHER,
    "hints-after": lambda body: answer(body) + HINTS,
}
CLOSING: dict[str, Answer] = {
    "http-1.0": lambda body: b"HTTP/1.0 200 OK\r\n\r\n" + body,
    "until-close": lambda body: head() + body,
}
FAILING: dict[str, Answer] = {
    "101": lambda body: interim(b"101 Switching Protocols", b"Upgrade: h2c") + answer(body),
    "endless-hints": lambda body: HINTS * 200 + answer(body),
    "large-hints": lambda body: interim(b"103 x", b"Link: " + b"x" * 70_000) * 4 + answer(body),
    "short": lambda body: answer(body)[:-10],
    "no-last-chunk": lambda body: chunked(body, b""),
    "broken-chunk": lambda body: chunked(body, b"zz\r\nabc\r\n0\r\n\r\n"),
    "broken-trailer": lambda body: chunked(body, b"0\r\nnot a field\r\n\r\n"),
    "lengths-differ": lambda body: answer(body, b"Content-Length: 5"),
    "length-nonsense": lambda body: answer(body, b"Content-Length: -5"),
    "chunks-twice": lambda body: chunked(body).replace(b"chunked", b"chunked, chunked", 1),
    "close-in-head": lambda body: answer(body)[:30],
    "nothing": lambda body: b"",
    "204-with-body": lambda body: head(status=b"204 No Content") + OTHER,
    "304-with-body": lambda body: head(b"Content-Length: 19", status=b"304 x") + OTHER,
    "404-with-more": lambda body: answer(b"gone", status=b"404 Not Found") + OTHER,
    "404-short": lambda body: answer(b"gone" * 9, status=b"404 Not Found")[:-9],
    "partial": lambda body: answer(body, b"Content-Range: bytes 5-9/9999", status=b"206 x"),
    "large": lambda body: answer(bytes(MAX_BYTES + 1)),
    "large-unannounced": lambda body: head() + bytes(MAX_BYTES + 70_000),
    "no-http": lambda body: b"\0\xff\r\n\r\n" + body,
}
ENDS = ("open", "close", "reset")
NAMES = (*ARRIVING, *CLOSING, *FAILING, "stall", "redirect", "redirect-unread", "late")


def reply(connection: socket.socket, path: str) -> bool:
    """Paths are /BEHAVIOR/END/NUMBER."""
    name, end, number = path.strip("/").split("/")
    body = image_of(path)
    if name.startswith("redirect"):
        size = 10 if name == "redirect" else 60_000
        location = b"Location: /plain/open/%s" % number.encode()
        connection.sendall(answer(bytes(size), location, status=b"302 Found"))
        return True
    if name in ("stall", "late"):
        connection.sendall(answer(body)[: -5 if name == "stall" else None])
        time.sleep(0.3 if name == "stall" else 0.05)
        connection.sendall(b"" if name == "stall" else OTHER)
        return name == "late"
    connection.sendall({**ARRIVING, **CLOSING, **FAILING}[name](body))
    if end == "reset":
        time.sleep(0.01)  # what was sent would be lost with the connection
        return reset(connection)
    return end == "open" and name not in (*CLOSING, "short", "nothing", "no-last-chunk")


def fetched(one: Client, url: str, trail: Trail | None = None) -> bytes | str:
    try:
        return one.fetch(url, trail or Trail()).body
    except FetchError as error:
        return error.reason


@pytest.fixture(scope="module")
def site():
    with serving(reply) as address:
        yield address


def check(site: str, steps: list[tuple[str, str]]) -> None:
    """Each step ends with its own bytes or a reason; what can arrive does, as in a shard."""
    one = client()
    try:
        trails = [Trail() for _ in steps]
        urls = [f"{site}/{name}/{end}/{number}" for number, (name, end) in enumerate(steps)]
        found = [fetched(one, url, trail) for url, trail in zip(urls, trails, strict=True)]
        one.rest()
        for number, trail in enumerate(trails):
            name, end = steps[number]
            was_hit = found[number] == "timeout" and name != "stall"  # by the answer before it
            if trail.is_doubtful or was_hit:
                found[number] = fetched(one, urls[number])
            path = f"/plain/open/{number}" if "redirect" in name else f"/{name}/{end}/{number}"
            if name in FAILING or name == "stall":
                assert found[number] in (*REASONS, b""), steps
            elif end != "reset" or isinstance(found[number], bytes):
                assert found[number] == image_of(path), steps
    finally:
        one.close()


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(ENDS)), max_size=12))
@example([("103", "open"), ("plain", "open"), ("late", "open"), ("plain", "open")])
@settings(max_examples=60, deadline=None)
def test_fetch__no_url_gets_another_ones_bytes(site, steps):
    check(site, steps)


@pytest.mark.parametrize("name", NAMES)
def test_fetch__what_follows_on_a_kept_connection_is_its_own(site, name):
    around = [("plain", "open")] * 2
    check(site, [*around, (name, "open"), *around, (name, "open"), ("103", "open"), *around])


def test_fetch__a_kept_connection_is_used_again(site):
    seen = Counter()

    def counting(connection: socket.socket, path: str) -> bool:
        seen[connection.getpeername()] += 1
        return reply(connection, path)

    with serving(counting) as address:
        one = client()
        for number, name in enumerate(("plain", "103", "chunked", "trailer", "redirect", "plain")):
            assert isinstance(fetched(one, f"{address}/{name}/open/{number}"), bytes)
        assert list(seen.values()) == [7]  # the redirect's second request among them
        fetched(one, f"{address}/another-answer/open/7")
        fetched(one, f"{address}/plain/open/8")
        fetched(one, f"{address}/plain/open/9")
        one.close()
    assert len(seen) > 2  # whoever answers unasked is not kept


def test_fetch__more_answers_than_requests_on_a_kept_connection_are_not_believed():
    asked = Counter()

    def out_of_step(connection: socket.socket, path: str) -> bool:
        """The answer to the first request comes twice, the second time when the next has come."""
        asked[path] += 1
        late = answer(image_of("/1")) if path == "/2" and asked[path] == 1 else b""
        connection.sendall(late + answer(image_of(path)))
        return True

    with serving(out_of_step) as address:
        one = client()
        for number in (1, 2, 3):
            assert fetched(one, f"{address}/{number}") == image_of(f"/{number}")
        one.close()
    assert asked == {"/1": 1, "/2": 2, "/3": 1}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ((b"Retry-After: 7",), 7.0),
        ((b"Retry-After: 99999999999999999999",), 1e20),
        (
            (b"Retry-After: Mon, 30 Nov 2026 15:00:20 GMT", b"Date: Mon, 30 Nov 2026 15:00:00 GMT"),
            20,
        ),
        ((b"Retry-After: Mon, 30 Nov 2020 15:00:20 GMT", b"Date: nonsense"), 0.0),
        ((b"Retry-After: soon",), None),
        ((b"Retry-After: -1",), None),
        ((b"Retry-After: \xb2",), None),
        ((), None),
    ],
)
def test_fetch__servers_say_when_to_come_back(fields, expected):
    def busy(connection: socket.socket, path: str) -> bool:
        connection.sendall(answer(b"busy", *fields, status=b"503 Busy"))
        return True

    raising = pytest.raises(FetchError, match="http_503")
    with serving(busy) as address, contextlib.closing(client()) as one, raising as failure:
        one.fetch(address, Trail())
    assert failure.value.retry_after_s == expected


def test_fetch__a_part_is_not_the_whole():
    def partial(connection: socket.socket, path: str) -> bool:
        span = b"Content-Range: bytes 0-%d/10" % (9 if path == "/whole" else 4)
        connection.sendall(answer(b"0123456789", span, status=b"206 Partial Content"))
        return True

    with serving(partial) as address:
        one = client()
        assert fetched(one, f"{address}/whole") == b"0123456789"
        assert fetched(one, f"{address}/part") == "truncated"
        one.close()
