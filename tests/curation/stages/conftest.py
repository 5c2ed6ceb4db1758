"""A misbehaving web server, for the tests of downloading."""

from collections.abc import Iterator

import pytest
from hostile_server import HostileServer, serving


@pytest.fixture(scope="module")
def hostile_server() -> Iterator[HostileServer]:
    with serving(HostileServer()) as server:
        yield server
