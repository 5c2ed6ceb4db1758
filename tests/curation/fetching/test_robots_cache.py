import contextlib
import gzip
import socket
import time
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from raw_server import answer, reset, serving

from curation.fetching.client import Client
from curation.fetching.connections import Origin
from curation.fetching.outcomes import FetchError, Trail
from curation.fetching.resolver import Resolver
from curation.fetching.robots import RobotsRules
from curation.fetching.robots_cache import RobotsCache
from curation.schema import make_id
from curation.stage import Shard
from curation.stages.download import Download
from embedder.images import encode_jpeg

SITE, OTHER = Origin("http", "a.test", 80), Origin("http", "b.test", 80)
IMAGE = encode_jpeg(np.zeros((8, 8, 3), np.uint8))
NO_ONE = b"User-agent: *\nDisallow: /\n"
QUICK = {
    "allow_private": True,
    "back_off_s": 0.1,
    "connect_timeout_s": 1.0,
    "read_timeout_s": 0.3,
    "total_timeout_s": 1.0,
}


class Asked:
    """Answers from a list, the last for ever."""

    def __init__(self, *answers: RobotsRules | FetchError) -> None:
        self.answers = list(answers)
        self.origins: list[Origin] = []

    def __call__(self, origin: Origin) -> RobotsRules:
        self.origins.append(origin)
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(found, FetchError):
            raise found
        return found


def test_rules_of__rules_are_asked_for_once_an_origin():
    asked = Asked(RobotsRules())
    cache = RobotsCache(asked, 1.0)
    assert [cache.rules_of(one) for one in (SITE, OTHER, SITE)] == [RobotsRules()] * 3
    assert asked.origins == [SITE, OTHER]


def test_rules_of__a_failure_holds_for_a_while_and_is_asked_about_again():
    asked = Asked(FetchError("connection"), RobotsRules())
    cache = RobotsCache(asked, 0.1)
    for _ in range(3):
        with pytest.raises(FetchError, match="connection"):
            cache.rules_of(SITE)
    assert len(asked.origins) == 1
    time.sleep(0.11)
    assert cache.rules_of(SITE) == RobotsRules()


def test_rules_of__a_server_says_how_long_a_failure_holds():
    asked = Asked(FetchError("robots_unreachable", 1e6))
    cache = RobotsCache(asked, 0.0)
    waits = []
    for _ in range(2):
        with pytest.raises(FetchError) as failure:
            cache.rules_of(SITE)
        waits.append(failure.value.retry_after_s)
    assert len(asked.origins) == 1
    assert all(50 < wait <= 60 for wait in waits)


def test_rules_of__a_mistake_of_ours_is_not_kept():
    def mistake(_: Origin) -> RobotsRules:
        raise KeyError("ours")

    cache = RobotsCache(mistake, 60.0)
    for _ in range(2):
        with pytest.raises(KeyError, match="ours"):
            cache.rules_of(SITE)


def downloaded(address: str, count: int, **changes: object) -> Shard:
    urls = [f"{address}/{number}.jpg" for number in range(count)]
    shard = Shard(pa.table({"id": [make_id(url) for url in urls], "source": urls}), 0)
    stage = Download(**{**QUICK, **changes})
    client = stage.open()
    try:
        stage.process(shard, client)
    finally:
        client.close()
    return shard


def stalled(connection: socket.socket) -> bool:
    connection.sendall(answer(NO_ONE)[:-5])
    time.sleep(0.5)
    return False


FAILURES = {
    "reset": reset,
    "closed": lambda _: False,
    "stalled": stalled,
    "short": lambda one: one.sendall(answer(NO_ONE)[:-5]),
    "503": lambda one: one.sendall(answer(b"", status=b"503 x")) or True,
    "429": lambda one: one.sendall(answer(b"", b"Retry-After: 0", status=b"429 x")) or True,
    "408": lambda one: one.sendall(answer(b"", status=b"408 x")) or True,
    "no HTTP": lambda one: one.sendall(b"\0\r\n\r\n"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_download__robots_txt_that_fails_once_costs_no_row(failure):
    asked: Counter[str] = Counter()

    def reply(connection: socket.socket, path: str) -> bool:
        asked[path] += 1
        if path == "/robots.txt" and asked[path] == 1:
            return bool(FAILURES[failure](connection))
        connection.sendall(answer(IMAGE) if path != "/robots.txt" else answer(b"", status=b"404 x"))
        return True

    with serving(reply) as address:
        shard = downloaded(address, 30)
    assert shard.reasons.tolist() == [None] * 30
    assert asked["/robots.txt"] == 2
    assert max(shard.emitted["fetches"]["attempts"]) <= 3


def test_download__robots_txt_that_always_fails_is_asked_for_now_and_then():
    asked: Counter[str] = Counter()

    def reply(connection: socket.socket, path: str) -> bool:
        asked[path] += 1
        connection.sendall(answer(b"", status=b"503 x"))
        return True

    with serving(reply) as address:
        shard = downloaded(address, 200)
    assert shard.reasons.tolist() == ["robots_unreachable"] * 200
    assert set(shard.emitted["fetches"]["attempts"]) == {3}
    assert list(asked) == ["/robots.txt"]
    assert asked["/robots.txt"] < 60


def test_download__a_dead_host_says_why():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shard = downloaded(f"http://127.0.0.1:{port}", 40)
    assert shard.reasons.tolist() == ["connection"] * 40
    assert set(shard.emitted["fetches"]["attempts"]) == {3}


def test_download__a_name_that_does_not_exist_says_so():
    def nobody(host: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, host)

    client = Client(Download(**QUICK).policy, Resolver(allow_private=True, lookup=nobody))
    with contextlib.closing(client), pytest.raises(FetchError, match=r"^dns$"):
        client.fetch("http://gone.test/1.jpg", Trail())


PACKED = {
    "gzip": answer(gzip.compress(NO_ONE), b"Content-Encoding: gzip"),
    "deflate": answer(zlib.compress(NO_ONE), b"Content-Encoding: deflate"),
    "brotli": answer(bytes(pa.Codec("brotli").compress(NO_ONE)), b"Content-Encoding: br"),
    "unknown token": answer(NO_ONE, b"Content-Encoding: UTF-8"),
    "gzip without a word": answer(gzip.compress(NO_ONE)),
    "behind hints": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3 + answer(NO_ONE),
    "utf-16": answer(NO_ONE.decode().encode("utf-16")),
    "byte order mark": answer(b"\xef\xbb\xbf" + NO_ONE),
    "latin-1": answer(b"# caf\xe9\n" + NO_ONE),
    "over 500 KiB": answer(NO_ONE + b"#" * 600_000),
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
    % (len(NO_ONE), NO_ONE),
}


@pytest.mark.parametrize("kind", PACKED)
def test_download__robots_txt_is_obeyed_however_it_is_sent(kind):
    assert reasons_behind(PACKED[kind]) == {"opted_out:robots"}


UNREADABLE = {
    "cut gzip": answer(gzip.compress(NO_ONE)[:-9], b"Content-Encoding: gzip"),
    "no gzip": answer(NO_ONE, b"Content-Encoding: gzip"),
    "damaged brotli": answer(b"whatever", b"Content-Encoding: br"),
    "short": answer(NO_ONE)[:-5],
    "no last chunk": PACKED["chunked"][:-5],
    "binary": answer(b"\x89PNG\0\0"),
    "101": b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + answer(b""),
    "999": answer(b"", status=b"999 No"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_download__robots_txt_that_cannot_be_read_allows_nothing(kind):
    assert reasons_behind(UNREADABLE[kind]) == {"robots_unreachable"}


def reasons_behind(robots: bytes) -> set[str | None]:
    def reply(connection: socket.socket, path: str) -> bool:
        connection.sendall(robots if path == "/robots.txt" else answer(IMAGE))
        return path != "/robots.txt"

    with serving(reply) as address:
        return set(downloaded(address, 3, retries=0).reasons)
