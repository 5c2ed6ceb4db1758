"""A misbehaving web server, for the tests of downloading."""

import threading
from collections.abc import Iterator

import pytest
from hostile_server import HostileServer


@pytest.fixture(scope="module")
def hostile_server() -> Iterator[HostileServer]:
    server = HostileServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()
