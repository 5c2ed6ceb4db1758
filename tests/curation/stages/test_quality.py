import numpy as np
import pyarrow as pa
import pytest

from curation.schema import make_id
from curation.stage import Shard, reject
from curation.stages.quality import Quality, entropy_bits, laplacian_variance
from embedder.images import encode_jpeg, resize


def shard_of(*images: np.ndarray | bytes) -> Shard:
    data = [one if isinstance(one, bytes) else encode_jpeg(one) for one in images]
    sizes = [(1, 1) if isinstance(one, bytes) else one.shape[:2] for one in images]
    table = {
        "id": [make_id(str(i)) for i in range(len(data))],
        "image": pa.array(data, pa.large_binary()),
        "original_width": [width for _, width in sizes],
        "original_height": [height for height, _ in sizes],
    }
    return Shard(pa.table(table), 0)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_quality__each_reason():
    flat = np.full((80, 90, 3), 128, np.uint8)
    two_tone = np.zeros((80, 90, 3), np.uint8)
    two_tone[:2] = 255  # a page with a thin rule: contrast, but no content
    shard = shard_of(noise(80, 90), noise(40, 90), noise(70, 290), flat, two_tone)
    Quality().process(shard, None)
    assert shard.reasons.tolist() == [None, "too_small", "aspect", "blank", "blank"]
    assert shard.notes["short_side"].tolist() == [80, 40, 70, 80, 80]
    assert shard.scores[1:3].tolist() == [40, pytest.approx(290 / 70)]
    assert shard.thresholds[:3].tolist() == [4.0, 64.0, 4.0]


def test_quality__pixels_are_looked_at_only_where_sizes_pass():
    shard = shard_of(noise(80, 90), b"never decoded")
    Quality().process(shard, None)
    assert shard.reasons.tolist() == [None, "too_small"]
    assert np.isnan(shard.notes["contrast"]).tolist() == [False, True]


def test_quality__filters_that_are_off_cost_nothing():
    shard = shard_of(b"never decoded")
    Quality(min_side=1, min_contrast=None, min_entropy=None).process(shard, None)
    assert shard.reasons.tolist() == [None]


def test_quality__blur_is_judged_on_request():
    sharp = noise(200, 200)
    soft = resize(noise(8, 8), 200, 200)
    for limit, expected in ((None, [None, None]), (100.0, [None, "blurred"])):
        shard = shard_of(sharp, soft)
        Quality(min_sharpness=limit).process(shard, None)
        assert shard.reasons.tolist() == expected


def test_quality__an_image_that_does_not_decode_is_data():
    shard = shard_of(b"no image", noise(80, 80))
    Quality(min_side=1).process(shard, None)
    assert shard.reasons.tolist() == ["unreadable", None]


def test_quality__rows_dropped_before_are_left_alone():
    shard = shard_of(noise(80, 80), b"dropped before")
    reject(shard, [False, True], "unreadable")
    Quality(min_side=1).process(shard, None)
    assert shard.reasons.tolist() == [None, "unreadable"]


def test_quality__harmless_photos_pass(shared_data):
    from embedder.images import canonicalize

    photos = sorted((shared_data / "photos").glob("*.jpg"))[::8]
    images = [canonicalize(path.read_bytes()).pixels for path in photos]
    shard = shard_of(*images)
    Quality().process(shard, None)
    assert shard.alive.mean() > 0.97


def test_entropy_bits__known_values():
    assert entropy_bits(np.zeros((4, 4))) == 0
    assert entropy_bits(np.arange(256).reshape(16, 16)) == pytest.approx(8)


def test_laplacian_variance__flat_and_tiny_are_zero():
    assert laplacian_variance(np.full((5, 5), 9.0)) == 0
    assert laplacian_variance(np.zeros((2, 9))) == 0
