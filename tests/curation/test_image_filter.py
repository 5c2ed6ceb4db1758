import threading

import numpy as np
import pyarrow as pa
import pytest
from pydantic import Field
from small_pictures import image_row

from curation import image_filter
from curation.image_filter import DECODED, ImageFilter, filter_in_turn, measure_in_turn
from curation.schema import IMAGE_COLUMNS, column_type
from curation.score_files import ScoreFiles
from curation.stage import Limit, Shard
from curation.stages.faces import Faces
from curation.stages.nsfw import Nsfw
from curation.stages.quality import Quality
from curation.stages.relevance import Relevance
from embedder.images import DecodedImage, decode, decode_within, encode_jpeg, resize


class Brightness(ImageFilter):
    """Drops dark images."""

    least: float | None = Field(100.0, ge=0)
    """Lowest mean."""

    scores = ("brightness",)
    limits = (Limit("brightness", ">=", "least", "dark"),)
    reasons = ("dark", "unreadable")

    def measure(self, pixels, opened):
        return (float(pixels.mean()),)


def shard_of(*images: bytes, size: int = 300, **columns) -> Shard:
    changes = {"original_width": size, "original_height": size}
    rows = [image_row(n, image=image, **changes) for n, image in enumerate(images)]
    table = pa.Table.from_pylist([{k: row[k] for k in IMAGE_COLUMNS} for row in rows])
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, column_type(name)))
    return Shard(table, 0)


def photo(seed: int, side: int = 400) -> bytes:
    rng = np.random.default_rng(seed)
    blobs = resize(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), side, side)
    noise = rng.integers(-20, 20, blobs.shape)
    return encode_jpeg(np.clip(blobs.astype(int) + noise, 0, 255).astype(np.uint8))


def chain() -> list[ImageFilter]:
    return [Quality(), Nsfw(threshold=0.05), Faces(), Relevance()]


def decided(shard: Shard) -> dict[str, list]:
    return {
        "reasons": shard.reasons.tolist(),
        "scores": shard.scores.tobytes(),
        "thresholds": shard.thresholds.tobytes(),
        "notes": {name: np.asarray(values).tobytes() for name, values in shard.notes.items()},
        "emitted": shard.emitted,
    }


def test_image_filter__limits_are_all_that_a_simple_one_declares():
    dark, light = (encode_jpeg(np.full((20, 20, 3), tone, np.uint8)) for tone in (20, 220))
    shard = shard_of(dark, light, b"no image")
    Brightness().process(shard, None)
    assert shard.reasons.tolist() == ["dark", None, "unreadable"]
    assert shard.notes["brightness"].dtype == np.float32
    assert (shard.scores[:2].round().tolist(), shard.thresholds[0]) == ([20, 220], 100)
    shard = shard_of(dark)
    Brightness(least=None).process(shard, None)
    assert (shard.reasons.tolist(), shard.notes["brightness"].round()) == ([None], [20])
    assert Brightness().decision_columns() == pa.schema([("brightness", pa.float32())])


def test_filter_in_turn__scores_are_those_of_each_alone_and_images_are_decoded_once(monkeypatch):
    images = [photo(n, side) for n, side in enumerate([400, 300, 512, 100, 256])]
    images += [encode_jpeg(np.full((300, 300, 3), 90, np.uint8)), b"no image", images[0][:900]]
    opened = [(stage, stage.open()) for stage in chain()]
    alone, together = shard_of(*images), shard_of(*images)
    for stage, state in opened:
        stage.process(alone, state)
    monkeypatch.setattr(image_filter, "_ROWS_AT_ONCE", 3)
    filter_in_turn(together, opened)
    assert decided(together) == decided(alone)
    assert set(alone.reasons) >= {None, "blank", "unreadable"}
    assert alone.counters[DECODED] > 2 * together.counters[DECODED]
    assert together.counters[DECODED] == 6  # all that are images, the blank one among them


def test_filter_in_turn__counts_what_is_decoded(monkeypatch):
    lock, calls = threading.Lock(), []
    real = DecodedImage._decode_jpeg

    def counting(self, file, size):
        known = len(self._fractions)
        pixels = real(self, file, size)
        with lock:
            calls.append(len(self._fractions) - known)
        return pixels

    monkeypatch.setattr(DecodedImage, "_decode_jpeg", counting)
    shard = shard_of(*(photo(n) for n in range(3)))
    filter_in_turn(shard, [(stage, stage.open()) for stage in chain()])
    assert sum(calls) == shard.counters[DECODED] == 3


def test_filter_in_turn__what_one_drops_the_next_does_not_measure():
    dark, light = (encode_jpeg(np.full((20, 20, 3), tone, np.uint8)) for tone in (20, 220))
    shard = shard_of(dark, light)
    filter_in_turn(shard, [(Brightness(), None), (Relevance(), None)])
    assert np.isnan(shard.notes["text_share"]).tolist() == [True, False]


def test_filter_in_turn__faces_of_one_are_blurred_for_the_next(shared_data):
    path = sorted((shared_data / "faces" / "yes").glob("*.jpg"))[0]
    pixels = decode_within(path.read_bytes(), 512)
    shards = [shard_of(encode_jpeg(pixels)) for _ in range(2)]
    faces, sharpness = Faces(), Quality(min_sharpness=0.0)
    filter_in_turn(shards[0], [(faces, faces.open()), (sharpness, None)])
    boxes = shards[0].emitted["faces"]["boxes"]
    assert len(boxes[0]) == 1
    after = shard_of(encode_jpeg(pixels), boxes=boxes)
    sharpness.process(after, None)
    sharpness.process(shards[1], None)
    assert shards[0].notes["sharpness"] == after.notes["sharpness"] < shards[1].notes["sharpness"]


@pytest.mark.parametrize("side", [256, 1024])
def test_filter__boxes_fit_the_scale_that_it_looks_at(side):
    pixels = np.full((side, side, 3), 90, np.uint8)
    stripes = np.arange(side // 4) // (side // 64) % 2 == 0
    pixels[: side // 4, : side // 4][:, stripes] = 250
    image, box = encode_jpeg(pixels), [0, 0, side // 4, side // 4]
    found = []
    for boxes in ([], [box]):
        shard = shard_of(image, boxes=[boxes])
        Quality(min_contrast=0, min_entropy=0).process(shard, None)
        found.append(float(shard.notes["sharpness"][0]))
    assert found[1] < found[0] / 10


def test_measure_in_turn__drops_nothing():
    shard = shard_of(photo(0), b"no image")
    found = measure_in_turn(shard, [(Quality(), None), (Relevance(), None)])
    assert shard.alive.all()
    assert [scores.reached.tolist() for scores in found] == [[True, True], [True, False]]
    assert found[0].unreadable.tolist() == [False, True]


@pytest.mark.parametrize("max_side", [None, 64, 256, 300, 2000])
def test_decoded_image__is_what_a_fresh_decode_gives(max_side):
    gray = encode_jpeg(np.random.default_rng(0).integers(0, 256, (700, 900, 1), dtype=np.uint8))
    for data in (photo(1, 700), photo(2, 200), gray):
        image = DecodedImage(data)
        for side in (None, 256, max_side, max_side):
            fresh = decode(data) if side is None else decode_within(data, side)
            assert (image.within(side) == fresh).all()
        assert image.num_decoded <= 3


def test_score_files__give_back_what_was_measured(tmp_path):
    shard = shard_of(photo(0), b"no image", photo(1))
    stages = [Quality(), Faces()]
    pairs = [(stage, stage.open()) for stage in stages]
    for stage, scores in zip(stages, measure_in_turn(shard, pairs), strict=True):
        files = ScoreFiles(stage, str(tmp_path))
        assert files.read(0, shard.ids) is None
        files.write(0, shard.ids, scores)
        ids = shard.ids.filter(pa.array(scores.reached))
        found = files.read(0, ids)
        for name, values in scores.columns.items():
            kept = values[scores.reached]
            if values.dtype == object:
                assert found.columns[name].tolist() == kept.tolist()
            else:
                assert found.columns[name].tobytes() == kept.tobytes()
        assert found.unreadable.tolist() == scores.unreadable[scores.reached].tolist()
        assert files.read(0, ids[:1]) is None
    assert len(list(tmp_path.iterdir())) == 2
