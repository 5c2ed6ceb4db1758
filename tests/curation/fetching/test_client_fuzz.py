import contextlib
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from curation.fetching.client import Client
from curation.fetching.outcomes import REASONS, FetchError, Trail
from curation.stages.download import Download
from embedder.images import encode_jpeg

BODY = encode_jpeg(np.zeros((16, 16, 3), np.uint8))
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
RESPONSES = [
    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY),
    b"HTTP/1.0 200 OK\r\nContent-Type: image/jpeg\r\n\r\n" + BODY,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/caf\xc3\xa9?x=%20\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nX-Robots-Tag: bot: none, all\r\n\r\n" + BODY,
    b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 3\r\n\r\nabc",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 No\r\nContent-Length: 1\r\n\r\nx",
]
SPLICES = [
    *(b"\0", b"\r\n", b"\r\n\r\n", b": ", b"\xff\xfe", b"-1", b"99999999999999999999", b"[", b"@"),
    *(b"\r\nLocation: //[::1\r\n", b"\r\nLocation: http://a..b/\r\n", b"\r\nLocation: \x80\r\n"),
    *(b"\r\nContent-Length: x\r\n", b"\r\nContent-Length: -5\r\n", b"\r\nRetry-After: \xb2\r\n"),
    *(b"\r\nContent-Encoding: gzip, br\r\n", b"HTTP/9.9 ", b"\r\nTransfer-Encoding: x\r\n"),
    *(
        b"\r\nLocation: http://xn--a/\r\n",
        b"\r\nLocation: http://h:99999/\r\n",
        b"\r\nLocation: \r\n",
    ),
]


def mutated(rng: np.random.Generator) -> bytes:
    out = bytearray(RESPONSES[int(rng.integers(len(RESPONSES)))])
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, min(len(out), 120)))
        if rng.integers(2):
            out[at] = int(rng.integers(256))
        else:
            out[at:at] = SPLICES[int(rng.integers(len(SPLICES)))]
    return bytes(out[: int(rng.integers(1, len(out)))] if rng.integers(4) == 0 else out)


@contextlib.contextmanager
def answering(responses: list[bytes]) -> Iterator[str]:
    """Serve response number N at /N, byte for byte, and close."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            number = line.split(b" ")[1].strip(b"/").split(b"?")[0]
            with contextlib.suppress(OSError):
                self.wfile.write(responses[int(number)] if number.isdigit() else responses[0])

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def fuzz(count: int) -> Counter[str]:
    """Whatever a server says, a fetch ends with bytes or one of our reasons."""
    rng = np.random.default_rng(0)
    responses = [mutated(rng) for _ in range(count)]
    stage = Download(allow_private=True, robots=False, read_timeout_s=2, total_timeout_s=3)
    client = Client(stage.policy)
    ends: Counter[str] = Counter()
    with answering(responses) as url:
        for number in range(count):
            try:
                client.fetch(f"{url}/{number}", Trail())
                ends["arrived"] += 1
            except FetchError as error:
                ends[error.reason] += 1
    client.close()
    assert set(ends) <= {"arrived", *REASONS}
    return ends


def test_fetch__mutated_responses_have_a_reason():
    ends = fuzz(1500)
    assert ends["arrived"] > 100
    assert len(ends) > 8


@pytest.mark.slow
def test_fetch__many_mutated_responses():
    assert fuzz(20_000)["arrived"] > 1000
