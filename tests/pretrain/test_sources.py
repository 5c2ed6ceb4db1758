from pathlib import Path

import pytest

from curation.errors import DatasetError
from pretrain.sources import LooseImages, PackedShards, open_source
from tests.pretrain.small_runs import jpeg, write_folder, write_shards


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
