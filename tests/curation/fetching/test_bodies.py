import contextlib
import gzip
import socket
import threading
import time

import pytest

from curation.fetching.bodies import BodyReader, ByteBudget
from curation.fetching.connections import Connection, Deadline, Origin
from curation.fetching.outcomes import FetchError

MB = 1 << 20


def read(head: str, body: bytes, *, max_bytes: int = 4 * MB, room: int = 8 * MB) -> bytes:
    ours, theirs = socket.socketpair()
    answer = f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + body

    def serve() -> None:
        with theirs, contextlib.suppress(OSError):
            theirs.recv(1 << 16)
            theirs.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    budget = ByteBudget(room)
    connection = Connection(Origin("http", "a.test", 80), ours, 1.0)
    try:
        found = connection.get("/", b"", Deadline(1.0))
        return BodyReader(max_bytes, budget).read(found, connection.parts(), Deadline(1.0))
    finally:
        connection.close()
        thread.join()
        with budget.reserve(room, Deadline(0.5)):  # all room was given back
            pass


@pytest.mark.parametrize("size", [0, 10, 3 * MB, 4 * MB])
def test_body__arrives_whole(size):
    data = bytes(size)
    packed = gzip.compress(data)
    assert read(f"Content-Length: {size}\r\n", data) == data
    assert read("", data) == data
    head = f"Content-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n"
    assert read(head, packed) == data
    assert read(head, packed, room=MB // 2) == data  # a body larger than all room takes all of it


@pytest.mark.parametrize(
    ("head", "body", "reason"),
    [
        ("Content-Length: 4194305\r\n", b"", "too_large"),
        ("", bytes(4 * MB + 1), "too_large"),
        ("Content-Encoding: gzip\r\n", gzip.compress(bytes(4 * MB + 1), mtime=0), "too_large"),
        ("Content-Length: 10\r\n", b"short", "truncated"),
        ("Content-Encoding: gzip\r\n", gzip.compress(bytes(99), mtime=0)[:-9], "truncated"),
        ("Content-Encoding: gzip\r\n", b"no gzip", "bad_encoding"),
        ("Content-Encoding: br\r\n", b"x", "truncated"),
    ],
)
def test_body__reasons(head, body, reason):
    with pytest.raises(FetchError, match=reason):
        read(head, body)


def test_byte_budget__who_finds_no_room_waits():
    budget = ByteBudget(10)
    order = []

    def later() -> None:
        with budget.reserve(6, Deadline(10)):
            order.append("second")

    with budget.reserve(6, Deadline(1)):
        thread = threading.Thread(target=later)
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_byte_budget__not_beyond_the_deadline():
    budget = ByteBudget(10)
    full, more = budget.reserve(10, Deadline(1)), budget.reserve(1, Deadline(0.05))
    with full, pytest.raises(FetchError, match="timeout"), more:
        pass
