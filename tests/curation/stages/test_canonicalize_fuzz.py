import io
import resource
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, features

from curation.schema import make_id
from curation.stage import Shard
from curation.stages.canonicalize import Canonicalize
from embedder.images import REASONS

SIDE = 128


def originals() -> list[bytes]:
    """A small file of every format and of its variants."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC)
    frames = [image, image.rotate(180)]
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray((np.arange(120 * 160, dtype=np.uint16) * 3).reshape(120, 160))
    kinds: list[tuple[Image.Image, str, dict]] = [
        (image, "JPEG", {"exif": exif}),
        (image, "JPEG", {"progressive": True}),
        (image.convert("CMYK"), "JPEG", {}),
        (image.convert("L"), "JPEG", {}),
        (image, "PNG", {}),
        (image.convert("RGBA"), "PNG", {}),
        (image.convert("P"), "PNG", {}),
        (deep, "PNG", {}),
        (image, "WEBP", {}),
        (image.convert("RGBA"), "WEBP", {"lossless": True}),
        (image, "WEBP", {"save_all": True, "append_images": frames}),
        (image, "GIF", {"save_all": True, "append_images": frames}),
        (image, "BMP", {}),
        (image, "TIFF", {"compression": "tiff_lzw"}),
        (deep, "TIFF", {}),
    ]
    if features.check("avif"):
        kinds.append((image, "AVIF", {}))
    return [_encoded(*kind) for kind in kinds]


def _encoded(image: Image.Image, kind: str, options: dict) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def mutated(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """Flip bytes (more often near the head), cut, splice another's head on, or repeat a part."""
    out = bytearray(data)
    kind = rng.integers(5)
    if kind == 0:
        reach = min(len(out), int(rng.choice([64, 512, len(out)])))
        for position in rng.integers(0, reach, int(rng.integers(1, 20))):
            out[position] = int(rng.integers(256))
    elif kind == 1:
        out = out[: int(rng.integers(0, len(out)))]
    elif kind == 2:
        head = others[int(rng.integers(len(others)))][: int(rng.integers(1, 200))]
        out[: len(head)] = head
    elif kind == 3:
        start, stop = sorted(rng.integers(0, len(out), 2))
        out[stop:stop] = out[start:stop] * int(rng.integers(1, 4))
    else:
        start = int(rng.integers(0, max(1, min(len(out), 400) - 4)))
        out[start : start + 4] = [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"][int(rng.integers(3))]
    return bytes(out)


def fuzz(count: int) -> Counter[str | None]:
    """Each mutated file becomes a valid JPEG or a reason, within 5 s and bounded memory."""
    rng = np.random.default_rng(1)
    files = originals()
    stage = Canonicalize(max_side=SIDE, max_pixels=4_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends: Counter[str | None] = Counter()
    for _ in range(0, count, 20):
        raw = [mutated(files[int(rng.integers(len(files)))], files, rng) for _ in range(20)]
        ids = [make_id(str(i)) for i in range(len(raw))]
        shard = Shard(pa.table({"id": ids, "raw": pa.array(raw, pa.large_binary())}), 0)
        began = time.monotonic()
        stage.process(shard, None)
        assert time.monotonic() - began < 5
        ends.update(shard.reasons.tolist())
        for data in filter(None, shard.emitted["images"]["image"].to_pylist()):
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                assert (image.format, image.mode) in (("JPEG", "RGB"), ("JPEG", "L"))
                assert max(image.size) <= SIDE
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 500e6
    assert set(ends) <= {None, *REASONS}
    return ends


def test_canonicalize__mutated_files(tmp_path):
    ends = fuzz(2000)
    assert ends[None] > 200
    assert len(ends) >= 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_canonicalize__many_mutated_files():
    assert fuzz(20_000)[None] > 2000


def test_canonicalize__originals_all_decode():
    raw = originals()
    ids = [make_id(str(i)) for i in range(len(raw))]
    shard = Shard(pa.table({"id": ids, "raw": pa.array(raw, pa.large_binary())}), 0)
    Canonicalize().process(shard, None)
    assert shard.reasons.tolist() == [None] * len(raw)
