"""The demo's web: sample photos of installed packages, with planted troubles, on loopback.

A dozen photos must become a few hundred different images: each is a pair of crops from two photos,
turned and recolored, with shapes drawn on top. Some become the pool's innocents, some benchmarks,
seed sets and sets taken as they are; copies of innocents and benchmarks, and files that are no good
images, are planted among the URLs. `truth.parquet` remembers what each URL is, so that the run can
be marked.
"""

import contextlib
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from curation.config import Settings
from curation.errors import ConfigError
from embedder.edits import EDITS
from embedder.images import Pixels, encode_jpeg, resize

SIDE = 192
"""Width and height of the images, in pixels."""
INNOCENT = "innocent"
_LISTED_TWICE = 100
"""Which innocent's URL is listed a second time, spelled in another way."""
_TRUTH = pa.schema([(name, pa.string()) for name in ("url", "kind", "twin_url", "expected")])
_PHOTOS = (
    *("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png"),
    *("motorcycle_left.png", "retina.jpg", "rocket.jpg", "coins.png", "camera.png"),
    *("images/china.jpg", "images/flower.jpg"),
)
_VARIED = (
    *("astronaut", "chelsea", "coffee", "ihc", "motorcycle_left", "rocket", "camera"),
    *("china", "flower"),
)
"""Photos whose parts look different; the others are one texture all over."""
EASY_EDITS = ("jpeg_q30", "half_size", "flip", "brightness", "text")
_TYPES = {".jpg": "image/jpeg", ".png": "image/png"}


class DemoSite(Settings):
    """Serve sample photos on loopback while the recipe runs."""

    port: int = 18700
    """Port on 127.0.0.1; it is part of the URLs, and so of the ids."""
    innocents: int = 160
    """Distinct images in the pool, besides the whole photos."""


@dataclass
class _Plan:
    """What is being put on the site."""

    root: Path
    base: str
    rng: np.random.Generator
    rows: list[dict[str, str | None]] = field(default_factory=list)

    def plant(self, name: str, data: bytes | None, kind: str, expected: str, twin: str = "") -> str:
        """Put a file on the site (None: the URL leads nowhere) and its URL on the list."""
        if data is not None:
            (self.root / "www" / name).write_bytes(data)
        return self.list_url(f"{self.base}/{name}", kind, expected, twin)

    def list_url(self, url: str, kind: str, expected: str, twin: str = "") -> str:
        """Put a URL on the list."""
        self.rows.append(
            {"url": url, "kind": kind, "twin_url": twin or None, "expected": expected or None}
        )
        return url


def build_site(site: DemoSite, folder: Path) -> None:
    """Write the site's files, its list of URLs and the sets beside it; a no-op if they are there.

    Raises:
        ConfigError: the packages that bring the sample photos are not installed.
    """
    done = folder / f"built-{site.port}-{site.innocents}"
    if done.exists():
        return
    for name in ("www", "benchmark", "seeds_sample", "seeds_cluster", "as_is"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    plan = _Plan(folder, f"http://127.0.0.1:{site.port}", np.random.default_rng(0))
    photos = dict(_photos())
    scenes = _Scenes([photos[name] for name in _VARIED], plan.rng)
    benchmark = _write_set(folder / "benchmark", scenes.draw(20))
    _write_set(folder / "seeds_sample", scenes.draw(16))
    _write_set(folder / "seeds_cluster", scenes.draw(24))
    _write_set(folder / "as_is", scenes.draw(12))
    _write_labeled(folder / "labeled", photos)
    whole = [_whole(photo) for photo in photos.values()]
    innocents = _plant_innocents(plan, [*scenes.draw(site.innocents), *whole])
    _plant_copies(plan, innocents)
    _plant_leaks(plan, benchmark)
    _plant_bad_files(plan)
    _write_lists(plan)
    done.touch()


def _photos() -> Iterator[tuple[str, Pixels]]:
    try:
        import skimage
        import sklearn
    except ImportError as error:
        raise ConfigError(
            f"the demo's photos come with scikit-image and scikit-learn, and {error.name} is "
            "missing: pip install 'lvd-curate[demo]'"
        ) from error
    folders = [Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets"]
    for name in _PHOTOS:
        path = next(folder / name for folder in folders if (folder / name).is_file())
        with Image.open(path) as image:
            yield path.stem, np.asarray(image.convert("RGB"))


@dataclass(frozen=True)
class _Scenes:
    """Draws images that differ from each other: random choices from a generator."""

    photos: list[Pixels]
    rng: np.random.Generator

    def draw(self, count: int) -> list[Pixels]:
        """Different images, each (SIDE, SIDE, 3)."""
        return [self._scene(number % 2 == 0) for number in range(count)]

    def _scene(self, side_by_side: bool) -> Pixels:
        """Crops of two photos beside or above each other, with shapes on top."""
        first, second = self.rng.permutation(len(self.photos))[:2]
        width, height = (SIDE // 2, SIDE) if side_by_side else (SIDE, SIDE // 2)
        halves = [self._crop(self.photos[i], width, height) for i in (first, second)]
        return self._with_shapes(np.concatenate(halves, axis=1 if side_by_side else 0))

    def _crop(self, photo: Pixels, width: int, height: int) -> Pixels:
        """A square of a photo with some detail in it, recolored and turned."""
        while True:
            side = int(self.rng.integers(110, min(*photo.shape[:2], 300) + 1))
            top = int(self.rng.integers(photo.shape[0] - side + 1))
            left = int(self.rng.integers(photo.shape[1] - side + 1))
            crop = photo[top : top + side, left : left + side]
            if crop.std() > 35:
                break
        crop = np.rot90(crop[..., self.rng.permutation(3)], int(self.rng.integers(4)))
        crop = 255 - crop if self.rng.random() < 0.5 else crop
        return resize(np.ascontiguousarray(crop), width, height)

    def _with_shapes(self, pixels: Pixels) -> Pixels:
        image = Image.fromarray(pixels)
        draw = ImageDraw.Draw(image)
        for _ in range(4):
            color = tuple(int(value) for value in self.rng.integers(0, 256, 3))
            points = [tuple(int(v) for v in self.rng.integers(0, SIDE, 2)) for _ in range(4)]
            left, top, width, height = (int(v) for v in self.rng.integers(20, SIDE // 2, 4))
            shape = int(self.rng.integers(4))
            if shape == 0:
                draw.ellipse((left, top, left + width, top + height), fill=color)
            elif shape == 1:
                draw.rectangle((left, top, left + width, top + height), fill=color)
            elif shape == 2:
                draw.polygon(points[:3], fill=color)
            else:
                draw.line(points, fill=color, width=8)
        return np.asarray(image)


def _whole(photo: Pixels) -> Pixels:
    """A whole photo, at most 400 pixels on its longer side."""
    factor = 400 / max(photo.shape[:2])
    return resize(photo, round(photo.shape[1] * factor), round(photo.shape[0] * factor))


def _write_set(folder: Path, images: list[Pixels]) -> list[Pixels]:
    for number, pixels in enumerate(images):
        (folder / f"{number:03d}.jpg").write_bytes(encode_jpeg(pixels))
    return images


def _write_labeled(folder: Path, photos: dict[str, Pixels]) -> None:
    """A class a photo: its tiles, two thirds to train and one third to test."""
    side = 96
    for name, photo in photos.items():
        tops = range(0, photo.shape[0] - side + 1, side)
        lefts = range(0, photo.shape[1] - side + 1, side)
        corners = [(top, left) for top in tops for left in lefts][:24]
        for number, (top, left) in enumerate(corners):
            target = folder / ("test" if number % 3 == 2 else "train") / name
            target.mkdir(parents=True, exist_ok=True)
            tile = np.ascontiguousarray(photo[top : top + side, left : left + side])
            (target / f"{number:03d}.jpg").write_bytes(encode_jpeg(tile))


def _plant_innocents(plan: _Plan, images: list[Pixels]) -> list[tuple[str, Pixels]]:
    planted = []
    for number, pixels in enumerate(images):
        data = encode_jpeg(pixels)
        url = plan.plant(f"photo-{number:03d}.jpg", data, INNOCENT, "")
        planted.append((url, np.asarray(Image.open(io.BytesIO(data)))))
    return planted


def _plant_copies(plan: _Plan, innocents: list[tuple[str, Pixels]]) -> None:
    """Copies of innocents: the same bytes, the same pixels, easy edits, and harder ones."""
    for number, (url, _) in enumerate(innocents[:10]):
        data = (plan.root / "www" / url.rpartition("/")[2]).read_bytes()
        plan.plant(f"mirror-{number}.jpg", data, "exact copy", "duplicate_bytes", url)
    for number, (url, pixels) in enumerate(innocents[10:16]):
        plan.plant(f"saved-{number}.png", _png(pixels), "pixel copy", "duplicate_pixels", url)
    for number, (url, pixels) in enumerate(innocents[16:58]):
        name = list(EDITS)[number % len(EDITS)]
        kind = "edited copy" if name in EASY_EDITS else "edited copy, harder"
        data = encode_jpeg(EDITS[name](pixels, plan.rng), 90)
        plan.plant(f"edited-{number}-{name}.jpg", data, kind, "near_duplicate", url)


def _plant_leaks(plan: _Plan, benchmark: list[Pixels]) -> None:
    """Benchmark images on the web: as they are, and edited."""
    for number, tile in enumerate(benchmark):
        name = "same" if number < 6 else EASY_EDITS[number % len(EASY_EDITS)]
        pixels = tile if name == "same" else EDITS[name](tile, plan.rng)
        plan.plant(f"leak-{number}-{name}.jpg", encode_jpeg(pixels, 90), "leak", "leak:benchmark")


def _plant_bad_files(plan: _Plan) -> None:
    """Files that are no images, or no useful ones, and URLs that lead nowhere."""
    photo = encode_jpeg(plan.rng.integers(0, 255, (200, 200, 3), dtype=np.uint8))
    html = b"<!doctype html><html><body><h1>Not found</h1></body></html>"
    for number in range(4):
        small = plan.rng.integers(0, 255, (20 + number, 24, 3), dtype=np.uint8)
        blank = np.full((120, 160, 3), 60 * number, np.uint8)
        plan.plant(f"tiny-{number}.jpg", encode_jpeg(small), "tiny", "too_small")
        plan.plant(f"blank-{number}.jpg", encode_jpeg(blank), "blank", "blank")
        plan.plant(f"cut-{number}.jpg", photo[: len(photo) // (2 + number)], "cut", "truncated")
        plan.plant(f"page-{number}.jpg", html, "web page", "not_an_image")
        plan.plant(f"gone-{number}.jpg", None, "gone", "http_404")
        plan.list_url(f"ftp://127.0.0.1/{number}.jpg", "bad URL", "bad_source")
    plan.plant("private-noai.jpg", photo, "opted out", "opted_out:noai")
    plan.plant("bomb.png", _bomb(30_000), "bomb", "too_many_pixels")
    last = str(plan.rows[_LISTED_TWICE]["url"])
    plan.list_url(last.replace("http", "HTTP") + "#again", "listed twice", "duplicate_source")


def _write_lists(plan: _Plan) -> None:
    truth = pa.Table.from_pylist(plan.rows, schema=_TRUTH)
    order = plan.rng.permutation(truth.num_rows)
    pq.write_table(truth, plan.root / "truth.parquet")
    pq.write_table(truth.select(["url"]).take(pa.array(order)), plan.root / "urls.parquet")


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _bomb(side: int) -> bytes:
    """A valid black PNG of side x side pixels in little more than a hundred kilobytes."""
    squeeze = zlib.compressobj(9)
    row = b"\0" * (1 + side // 8)
    packed = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@contextlib.contextmanager
def site_of(site: DemoSite | None, work: str) -> Iterator[None]:
    """Serve the site of a recipe, where it has one, from a folder of the work folder."""
    if site is None:
        yield
        return
    folder = Path(work) / "site"
    build_site(site, folder)
    with serve_site(site, folder):
        yield


@contextlib.contextmanager
def serve_site(site: DemoSite, folder: Path) -> Iterator[None]:
    """Serve the built site on loopback.

    Raises:
        ConfigError: the port is taken.
    """
    root = folder / "www"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = root / self.path.lstrip("/")
            if path.parent != root or not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", _TYPES.get(path.suffix, "text/html"))
            self.send_header("Content-Length", str(len(data)))
            if "noai" in path.name:
                self.send_header("X-Robots-Tag", "noai, noimageai")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    try:
        server = Server(("127.0.0.1", site.port), Handler)
    except OSError as error:
        raise ConfigError(
            f"port {site.port} of the demo's site: {error.strerror}; free it, or choose another "
            "with --set demo_site.port=…"
        ) from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
