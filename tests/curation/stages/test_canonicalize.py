import hashlib
import io

import numpy as np
import pyarrow as pa
from PIL import Image

from curation.dataset import write_dataset
from curation.pool import Pool
from curation.schema import make_id, schema_of
from curation.stage import StageFolder, StageInputs
from curation.stages.canonicalize import Canonicalize, pixel_hash
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def canonicalized(tmp_path, stage: Canonicalize, *raw: bytes | None):
    schema = schema_of(["id", "raw"])
    ids = [make_id(str(i)) for i in range(len(raw))]
    pool = Pool.of(
        write_dataset(str(tmp_path / "raw"), [pa.table([ids, list(raw)], schema=schema)], schema)
    )
    record, outputs = run_stage(
        stage,
        StageInputs(pool),
        StageFolder(str(tmp_path / "out"), "canonicalize"),
        LocalEngine(),
        Silent(),
    )
    return record, outputs["images"].read().to_pylist(), outputs["decisions"].read()


def test_canonicalize__good_rows_arrive_beside_bad_ones(tmp_path):
    png = encoded(picture(800, 400), "PNG")
    jpeg = encoded(picture(64, 48), "JPEG")
    record, images, decisions = canonicalized(
        tmp_path, Canonicalize(), png, b"<html>", jpeg, b"", jpeg[: len(jpeg) // 2], None
    )
    assert (record.rows_in, record.rows_out) == (6, 2)
    assert decisions["reason"].to_pylist() == [
        *(None, "not_an_image", None, "empty", "truncated", "empty"),
    ]
    first, second = images
    assert (first["width"], first["height"]) == (512, 256)
    assert (first["original_width"], first["original_height"], first["format"]) == (800, 400, "PNG")
    assert first["num_bytes"] == len(png)
    assert first["sha256"] == hashlib.sha256(png).hexdigest()
    assert second["format"] == "JPEG"
    assert Image.open(io.BytesIO(first["image"])).size == (512, 256)


def test_canonicalize__limits_hold_before_decoding(tmp_path):
    stage = Canonicalize(max_pixels=1000, max_bytes=2000)
    big = encoded(picture(40, 30), "PNG", compress_level=9)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8))
    _, images, decisions = canonicalized(tmp_path, stage, big[:200], encoded(noise, "PNG"))
    assert decisions["reason"].to_pylist() == ["too_many_pixels", "too_large"]
    assert images == []


def test_canonicalize__threads_do_not_change_the_content(tmp_path):
    raw = [encoded(picture(50 + i, 40, i), "PNG") for i in range(9)]
    one, *_ = canonicalized(tmp_path / "1", Canonicalize(threads=1), *raw)
    four, *_ = canonicalized(tmp_path / "4", Canonicalize(threads=4), *raw)
    assert one.outputs == four.outputs


def test_pixel_hash__tells_shapes_apart():
    pixels = np.zeros((4, 6, 3), np.uint8)
    assert pixel_hash(pixels) == pixel_hash(pixels.copy())
    assert pixel_hash(pixels) != pixel_hash(pixels.reshape(6, 4, 3))
