"""A server on loopback whose answers are bytes, with nothing between them and the socket."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

Reply = Callable[[socket.socket, str], bool]
"""Answers the request for a path; tells whether the connection stays open."""


def answer(body: bytes, *fields: bytes, status: bytes = b"200 OK") -> bytes:
    lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *fields, b"", body]
    return b"\r\n".join(lines)


def reset(connection: socket.socket) -> bool:
    """End a connection as a crashed server does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


@contextlib.contextmanager
def serving(reply: Reply) -> Iterator[str]:
    """Answer every request by `reply`; gives the address."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        threading.Thread(target=_accept, args=(server, reply), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)


def _accept(server: socket.socket, reply: Reply) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_talk, args=(connection, reply), daemon=True).start()


def _talk(connection: socket.socket, reply: Reply) -> None:
    received = b""
    with connection, contextlib.suppress(OSError):
        while True:
            while b"\r\n\r\n" not in received:
                chunk = connection.recv(1 << 16)
                if not chunk:
                    return
                received += chunk
            head, _, received = received.partition(b"\r\n\r\n")
            if not reply(connection, head.split(b" ")[1].decode()):
                return
