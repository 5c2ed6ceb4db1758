"""A web server on loopback that misbehaves by path, for the tests of downloading."""

import contextlib
import functools
import gzip
import io
import itertools
import ssl
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


def jpeg(seed: int = 0, size: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@functools.cache
def gzip_bomb() -> bytes:
    return gzip.compress(b"\0" * (200 << 20), 1)


@functools.cache
def png_bomb(side: int = 30_000) -> bytes:
    """A valid black PNG of side x side pixels in about a hundred kilobytes."""
    squeeze = zlib.compressobj(9)
    row = b"\0" * (1 + -(-side // 8))
    packed = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)),
        (b"IDAT", packed),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "HostileServer"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        with self.server.lock:
            self.server.hits[path] += 1
            self.server.agents.add(self.headers.get("User-Agent"))
        name = path.strip("/").split("/")[0].replace("-", "_").replace(".", "_")
        try:
            getattr(self, f"on_{name}", self.on_missing)(path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def raw(self, *parts: bytes, pause_s: float = 0) -> None:
        """Write bytes as they are, then close."""
        self.close_connection = True
        for part in parts:
            self.wfile.write(part)
            self.wfile.flush()
            if pause_s and self.server.closing.wait(pause_s):
                return

    def redirect(self, location: str) -> None:
        self.send(b"moved", 302, Location=location)

    # --- well behaved ---------------------------------------------------------------------------

    def on_ok(self, path: str) -> None:
        self.send(jpeg(int(path.rpartition("/")[2].partition(".")[0])), Content_Type="image/jpeg")

    def on_slow(self, path: str) -> None:
        """An image after a while; the server counts how many are on their way at once."""
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        self.server.closing.wait(0.05)
        with self.server.lock:
            self.server.at_once -= 1
        self.send(jpeg(1))

    def on_robots_txt(self, path: str) -> None:
        self.send(
            b"User-agent: *\nDisallow: /disallowed\nAllow: /disallowed/but\n", self.server.robots
        )

    def on_disallowed(self, path: str) -> None:
        self.send(jpeg(1))

    def on_moved(self, path: str) -> None:
        self.redirect("/ok/7.jpg")

    def on_gzipped(self, path: str) -> None:
        self.send(gzip.compress(jpeg(5)), Content_Encoding="gzip")

    def on_chunked(self, path: str) -> None:
        data = jpeg(6)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in (data[:100], data[100:], b""):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))

    # --- failing --------------------------------------------------------------------------------

    def on_missing(self, path: str) -> None:
        self.send(b"no such page", 404)

    def on_gone(self, path: str) -> None:
        self.send(b"", 410)

    def on_odd_status(self, path: str) -> None:
        self.send(b"", 499)

    def on_busy_then_ok(self, path: str) -> None:
        if self.server.hits[path] == 1:
            self.send(b"busy", 503)
        else:
            self.send(jpeg(3))

    def on_slow_down_then_ok(self, path: str) -> None:
        if self.server.hits[path] == 1:
            self.send(b"slow down", 429, Retry_After="1")
        else:
            self.send(jpeg(4))

    def on_always_busy(self, path: str) -> None:
        self.send(b"busy", 503)

    def on_hang_before(self, path: str) -> None:
        self.close_connection = True
        self.server.closing.wait(60)

    def on_hang_in_body(self, path: str) -> None:
        self.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nabc")
        self.server.closing.wait(60)

    def on_drip_body(self, path: str) -> None:
        self.raw(
            b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n",
            *itertools.repeat(b"x", 5000),
            pause_s=0.2,
        )

    def on_drip_head(self, path: str) -> None:
        self.raw(b"HTTP/1.1 200 OK\r\nX-Slow: ", *itertools.repeat(b"x", 5000), pause_s=0.2)

    def on_endless_continue(self, path: str) -> None:
        self.raw(*itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n", 5000), pause_s=0.05)

    def on_large(self, path: str) -> None:
        self.raw(b"HTTP/1.1 200 OK\r\n\r\n", *itertools.repeat(b"\xff" * (1 << 20), 100))

    def on_large_announced(self, path: str) -> None:
        self.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 104857600\r\n\r\n")
        self.server.closing.wait(60)

    def on_false_length(self, path: str) -> None:
        self.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + jpeg(2))

    def on_endless_chunks(self, path: str) -> None:
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        self.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[chunk] * 1600)

    def on_broken_chunks(self, path: str) -> None:
        self.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc")

    def on_redirect_loop(self, path: str) -> None:
        self.redirect(self.path)

    def on_to_private(self, path: str) -> None:
        self.redirect("http://169.254.169.254/latest/meta-data/")

    def on_to_loopback_name(self, path: str) -> None:
        self.redirect(f"http://inside.test:{self.server.server_port}/ok/1.jpg")

    def on_to_file(self, path: str) -> None:
        self.redirect("file:///etc/passwd")

    def on_to_nonsense(self, path: str) -> None:
        self.redirect("http://[oops/")

    def on_gzip_bomb(self, path: str) -> None:
        self.send(self.server.gzip_bomb, Content_Encoding="gzip")

    def on_not_gzip(self, path: str) -> None:
        self.send(b"plain", Content_Encoding="gzip")

    def on_brotli(self, path: str) -> None:
        self.send(b"whatever", Content_Encoding="br")

    def on_bomb_png(self, path: str) -> None:
        self.send(self.server.png_bomb, Content_Type="image/png")

    def on_cut_jpg(self, path: str) -> None:
        data = jpeg(8, 64)
        self.send(data[: len(data) // 2], Content_Type="image/jpeg")

    def on_page_jpg(self, path: str) -> None:
        self.send(b"<!doctype html><html><body>Sorry</body></html>", Content_Type="image/jpeg")

    def on_empty(self, path: str) -> None:
        self.send(b"")

    def on_noai(self, path: str) -> None:
        self.send(jpeg(9), X_Robots_Tag="noai, noimageai")

    def on_noai_for_others(self, path: str) -> None:
        self.send(jpeg(10), X_Robots_Tag="otherbot: noai")

    def on_tdm(self, path: str) -> None:
        self.send(jpeg(11), tdm_reservation="1")

    def on_close(self, path: str) -> None:
        self.close_connection = True

    def on_garbage(self, path: str) -> None:
        self.raw(b"\x00\xff this is no HTTP \r\n\r\n")

    def on_header_flood(self, path: str) -> None:
        self.raw(b"HTTP/1.1 200 OK\r\n" + b"X-Many: x\r\n" * 5000 + b"\r\n")

    def on_long_line(self, path: str) -> None:
        self.raw(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 300_000 + b"\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


class HostileServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.socket = tls.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
        self.hits: Counter[str] = Counter()
        self.agents: set[str | None] = set()
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.at_once = self.most_at_once = 0
        """Slow images on their way."""
        self.robots = 200
        """Status of robots.txt."""
        self.gzip_bomb = gzip_bomb()
        self.png_bomb = png_bomb()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextlib.contextmanager
def serving(server: HostileServer) -> Iterator[HostileServer]:
    """Serve in a thread."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
