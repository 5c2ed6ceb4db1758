import os
from pathlib import Path

import pytest

from curation.errors import DatasetError
from pretrain.data import Batches, Part
from pretrain.evaluation.datasets import DEPTH, labeled_images, open_scenes
from pretrain.sources import LooseImages, PackedShards, describe_source, open_source
from tests.pretrain.small_runs import jpeg, small_config, write_folder, write_shards


def test_packed_shards__reads_any_image_by_its_bytes(tmp_path: Path) -> None:
    images = [(f"{i:032x}", jpeg(i), "a" if i % 2 else None) for i in range(5)]
    source = open_source(str(write_shards(tmp_path / "packed", [images[:3], images[3:]])))
    assert isinstance(source, PackedShards)
    assert source.sizes == [3, 2]
    for i, place in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        assert source.read(*place) == images[i][:2]
    assert source.seed_sets(0).tolist() == ["none", "a", "none"]


def test_packed_shards__short_tar_is_named(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "packed", [[("0" * 32, jpeg(0), None)]])
    (path / "shard-00000.tar").write_bytes(b"x" * 600)
    with pytest.raises(DatasetError, match=r"shard-00000\.tar: ends before byte"):
        PackedShards(str(path)).read(0, 0)


def test_image_folder__takes_images_only(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "images", 3)
    (path / "notes.txt").write_text("no image")
    source = open_source(str(path))
    assert isinstance(source, LooseImages)
    assert source.sizes == [3]
    assert source.read(0, 1) == ("001.jpg", jpeg(1))


def test_open_source__nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        open_source(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no images"):
        open_source(str(tmp_path / "empty"))
    empty = write_shards(tmp_path / "packed", [[]])
    with pytest.raises(DatasetError, match="holds no images"):
        open_source(str(empty))


def test_tar_folder__webdataset_without_an_index(tmp_path: Path) -> None:
    images = [(f"{i:032x}", jpeg(i), None) for i in range(3)]
    path = write_shards(tmp_path / "tars", [images])
    for file in path.iterdir():
        if file.suffix != ".tar":
            file.unlink()
    source = open_source(str(path))
    assert isinstance(source, LooseImages)
    assert source.sizes == [3]
    assert source.read(0, 2) == (f"shard-00000.tar/{2:032x}.jpg", jpeg(2))
    (path / "shard-00000.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DatasetError, match="left out: 1 no readable tars"):
        open_source(str(path))


def odd_folder(path: Path) -> Path:
    """Three good images, and what must neither hang nor end a run."""
    write_folder(path, 3)
    os.mkfifo(path / "pipe.jpg")
    (path / "gone.jpg").symlink_to("nowhere")
    (path / "zero.jpg").symlink_to("/dev/zero")
    (path / "empty.jpg").touch()
    with (path / "big.jpg").open("wb") as file:
        file.truncate(30 << 30)
    (path / "late.jpg").write_bytes(jpeg(9))
    return path


def test_batches__images_that_cannot_be_read_are_replaced_and_listed(tmp_path: Path) -> None:
    source = open_source(str(odd_folder(tmp_path / "images")))
    assert source.sizes == [9]
    (tmp_path / "images" / "late.jpg").unlink()  # while it trains
    batch = Batches(source, small_config()).batch(Part(0, 18, 0, 18))
    assert set(batch.ids) <= {"000.jpg", "001.jpg", "002.jpg"}
    assert dict(batch.bad) == {
        **dict.fromkeys(["gone.jpg", "late.jpg", "pipe.jpg", "zero.jpg"], "unreadable"),
        "big.jpg": "too_large",
        "empty.jpg": "empty",
    }


def test_labeled_images__what_cannot_be_read_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd_folder(tmp_path / "set" / "cat")
    write_folder(tmp_path / "elsewhere", 2)
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")
    write_folder(tmp_path / "set" / ".ipynb_checkpoints", 1)
    (tmp_path / "set" / "loose.jpg").write_bytes(jpeg(1))
    with caplog.at_level("INFO"):
        found = labeled_images(str(tmp_path / "set"))
    assert [item.label for item in found] == ["cat"] * 4 + ["dog"] * 2
    assert {item.image.pixels().shape for item in found} == {(64, 80, 3)}
    assert "left out: 3 unreadable, 1 empty, 1 hidden, 1 too large" in caplog.text
    assert "1 images lie in no class" in caplog.text


def test_labeled_images__classes_inside_tars(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "n01", [[("a", jpeg(0), None)]])
    (root / "shard-00000.tar").rename(tmp_path / "n01.tar")
    for file in root.iterdir():
        file.unlink()
    (item,) = labeled_images(str(tmp_path))
    assert (item.label, item.image.name) == ("n01", "n01.tar/a.jpg")


def test_open_scenes__sees_the_images_that_all_see(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", 2)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a").symlink_to(tmp_path / "elsewhere")
    write_folder(tmp_path / "images" / ".hid", 1)
    write_folder(tmp_path / "depth" / "a", 2)
    for file in (tmp_path / "depth" / "a").iterdir():
        file.rename(file.with_suffix(".png"))
    found, _ = open_scenes(str(tmp_path), "test", DEPTH)
    assert [scene.path.name for scene in found.scenes] == ["000.jpg", "001.jpg"]


def test_open_source__a_work_folder_is_its_packed_set(tmp_path: Path) -> None:
    write_shards(tmp_path / "packed", [[("0" * 32, jpeg(0), None)]])
    write_folder(tmp_path / "site", 5)
    (tmp_path / "run.json").write_text('{"recipe": "demo", "pool": [], "packed": "packed"}')
    source = open_source(str(tmp_path))
    assert (source.sizes, source.read(0, 0)) == ([1], ("0" * 32, jpeg(0)))
    about = describe_source(str(tmp_path), source)
    assert about["path"] == str(tmp_path / "packed")
    (tmp_path / "run.json").write_text('{"recipe": "demo", "pool": []}')
    with pytest.raises(DatasetError, match="packs no images"):
        open_source(str(tmp_path))
