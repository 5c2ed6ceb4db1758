import numpy as np
import pyarrow as pa

from curation.schema import make_id
from curation.stage import Shard
from curation.stages.nsfw import Nsfw
from embedder.images import canonicalize, encode_jpeg


def shard_of(*images: bytes) -> Shard:
    ids = [make_id(str(i)) for i in range(len(images))]
    return Shard(pa.table({"id": ids, "image": pa.array(images, pa.large_binary())}), 0)


def pictures(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encode_jpeg(rng.integers(0, 256, (90, 70 + i, 3), np.uint8)) for i in range(count)]


def scores_of(stage: Nsfw, *images: bytes) -> list[float]:
    shard = shard_of(*images)
    stage.process(shard, stage.open())
    return shard.notes["nsfw_score"].tolist()


def test_nsfw__a_score_depends_on_its_image_alone():
    images = pictures(5)
    together = scores_of(Nsfw(threads=3), *images)
    assert together == [scores_of(Nsfw(threads=1), image)[0] for image in images]
    assert all(0 <= score <= 1 for score in together)


def test_nsfw__score_and_verdict_are_apart():
    images = pictures(3)
    scores = scores_of(Nsfw(), *images)
    shard = shard_of(*images, b"no image")
    stage = Nsfw(threshold=float(np.float32(sorted(scores)[1])))
    stage.process(shard, stage.open())
    expected = ["nsfw" if score >= stage.threshold else None for score in scores]
    assert shard.reasons.tolist() == [*expected, "unreadable"]
    assert np.isnan(shard.notes["nsfw_score"][3])


def test_nsfw__weights_are_part_of_the_key():
    assert len(Nsfw().fingerprint()) == 64


def test_nsfw__harmless_photos_pass(shared_data):
    photos = sorted((shared_data / "photos").glob("*.jpg"))[::3]
    shard = shard_of(*(canonicalize(path.read_bytes()).data for path in photos))
    stage = Nsfw()
    stage.process(shard, stage.open())
    assert 1 - shard.alive.mean() <= 0.01
