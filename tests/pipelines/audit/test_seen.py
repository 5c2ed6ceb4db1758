import json
from unittest.mock import patch

import numpy as np
import pytest

from curation.errors import DatasetError, SpaceError
from embedder.errors import ImageError
from embedder.images import encode_jpeg
from pipelines.audit.seen import find_image
from pipelines.cli import audit
from tests.pipelines.audited_run import TinyEncoder, finished_run, picture


@pytest.fixture(autouse=True)
def tiny_encoder():
    with patch("pipelines.audit.seen.load_encoder", lambda name, precision: TinyEncoder()):
        yield


def seen(name):
    return find_image(finished_run() / name, str(finished_run()))


def test_find_image__kept_image_and_its_dropped_copy_are_in_the_set():
    kept = seen("sets/taken/0.jpg")
    assert kept["verdict"].startswith("in the set")
    assert kept["nearest"][0]["flow"] == "taken"
    assert kept["nearest"][0]["similarity"] == pytest.approx(1, abs=1e-3)
    assert [(row["flow"], row["same_bytes"]) for row in kept["equal"]] == [("taken", True)]


def test_find_image__leak_is_told_from_a_copy():
    found = seen("images/leak.jpg")
    assert found["verdict"] == "not in the set; it would be dropped as a leak of 'bench'"
    assert found["nearest_benchmark"][0]["source"] == "0.jpg"


def test_find_image__unknown_picture(tmp_path):
    path = tmp_path / "mine.jpg"
    path.write_bytes(encode_jpeg(picture(np.random.default_rng(99))))
    found = find_image(path, str(finished_run()))
    assert found["verdict"] == "not in the set, and no near copy of it is"
    assert found["equal"] == []
    assert len(found["nearest"]) == 5


def test_find_image__says_which_filter_would_drop_it(tmp_path):
    """The filters of the run are asked in their order, to the first that drops the file."""
    path = tmp_path / "mine.jpg"
    pixels = np.full((64, 64, 3), 200, np.uint8)
    pixels[:16, :16] = 204
    path.write_bytes(encode_jpeg(pixels))
    found = find_image(path, str(finished_run()))
    assert found["verdict"] == "not in the set; it would be dropped by quality: blank"
    assert [(row["stage"], row["keep"]) for row in found["verdicts"]] == [
        ("canonicalize", True),
        ("quality", False),
    ]


def test_find_image__wrong_input(tmp_path):
    with pytest.raises(ImageError, match=r"not_an_image: .*recipe\.yaml: begins with"):
        find_image(finished_run() / "recipe.yaml", str(finished_run()))
    with pytest.raises(DatasetError, match=r"no run\.json"):
        find_image(finished_run() / "images" / "00.jpg", str(tmp_path))


def test_find_image__a_file_that_no_memory_holds(tmp_path):
    with (tmp_path / "big.jpg").open("wb") as file:
        file.truncate(30 << 30)
    with pytest.raises(ImageError, match=r"too_large: .*big\.jpg: 32212254720 bytes"):
        find_image(tmp_path / "big.jpg", str(finished_run()))


def test_find_image__another_encoder_is_refused(monkeypatch):
    monkeypatch.setattr(TinyEncoder, "space", "other")
    with pytest.raises(SpaceError, match="another device or version"):
        seen("images/00.jpg")


def test_print_explanation__of_a_file(capsys):
    file = str(finished_run() / "sets" / "taken" / "0.jpg")
    audit.explain(file, str(finished_run()))
    assert "in the set" in capsys.readouterr().out
    audit.explain(file, str(finished_run()), json=True)
    assert json.loads(capsys.readouterr().out)["threshold"] == pytest.approx(0.93)
