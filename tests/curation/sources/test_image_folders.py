"""What is read below a folder, and what is left out and counted."""

import os
import socket
from pathlib import Path

import pytest

from curation.errors import DatasetError, StorageError
from curation.sources.folders import list_files, told
from curation.sources.names import hidden_part, kind_of, own_folders, shown
from curation.sources.places import image_place
from tests.pretrain.small_runs import jpeg, write_shards


def put(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(len(name)))
    return root


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((f"x{s}", "image") for s in (".jpg", ".JPE", ".jfif", ".avif", ".Png", ".tiff", ".webp")),
        *((f"x{s}", "image") for s in (".jpg_large", ".jpg:orig", ".jpg?w=1.5", ".png!thumb")),
        *((f"a.jpg/x{s}", "other") for s in ("", ".heic", ".jpgx", ".txt", ".jpg.part", ".zip")),
        *((f"x{s}", "packed_tar") for s in (".tar.gz", ".TGZ", ".tar.zst", ".tar.bz2")),
        *(
            ("0.TAR", "tar"),
            ("x.jpg?a.tar", "tar"),
            ("A.PARQUET", "table"),
            (".jpg", "image"),
            ("nl\n.jpg", "image"),
        ),
    ],
)
def test_kind_of__by_suffix_in_any_case(name, kind):
    assert kind_of(name) == kind


def test_hidden_part__the_topmost():
    assert hidden_part("a/.git/b/.c") == "a/.git"
    assert hidden_part("__MACOSX/x.jpg") == "__MACOSX"
    assert hidden_part("a/._x.jpg") == "a/._x.jpg"
    assert all(hidden_part(name) is None for name in ("_DSC1.JPG", "_t/x.jpg", "./x.jpg", "../x"))


def test_list_files__underscores_are_in_hidden_files_are_out(tmp_path):
    names = ("_DSC0001.JPG", "_MG_1.JPG", "_thumb/x.jpg", "IMG_3.jpg")
    hidden = (".ipynb_checkpoints/a.jpg", ".ipynb_checkpoints/b.jpg", "c/._x.jpg", "__MACOSX/y.jpg")
    found = list_files(str(put(tmp_path, *names, *hidden, "notes.txt", "d.heic", "Thumbs.DB")))
    assert found.images == sorted(names)
    assert found.left_out == {"hidden": 3, ".txt": 1, ".heic": 1, ".db": 1}
    assert found.summary() == (f"{tmp_path}: 4 images; left out: 3 hidden, 1 .db, 1 .heic, 1 .txt")


def test_list_files__files_without_a_suffix_are_looked_into(tmp_path):
    put(tmp_path, "photo", "a/0123abc")
    (tmp_path / "README").write_text("no image")
    (tmp_path / "LICENSE").touch()
    found = list_files(str(tmp_path))
    assert (found.images, found.left_out) == (["a/0123abc", "photo"], {"no_suffix": 2})


def test_list_files__odd_suffixes_are_counted_as_one(tmp_path):
    names = ["a.b c", "a.\x1b[31m", "a." + "x" * 40, "a.é", "b.Jpeg2000"]
    found = list_files(str(put(tmp_path, *names)))
    assert found.left_out == {"odd_suffix": 4, ".jpeg2000": 1}


def test_list_files__linked_folders_are_read_once(tmp_path):
    put(tmp_path / "data" / "cats", "1.jpg", "old/2.jpg")
    put(tmp_path / "data" / "dogs", "3.jpg")
    root = put(tmp_path / "set", "4.jpg", "real/5.jpg")
    (root / "cats").symlink_to(tmp_path / "data" / "cats")
    (root / "pets").symlink_to(tmp_path / "data")  # holds cats, too
    (root / "again").symlink_to("real")
    (root / "one.jpg").symlink_to("4.jpg")
    found = list_files(str(root))
    wanted = ["4.jpg", "cats/1.jpg", "cats/old/2.jpg", "one.jpg", "pets/dogs/3.jpg", "real/5.jpg"]
    assert (found.images, found.left_out) == (wanted, {"linked_twice": 2})


def test_list_files__links_that_lead_back_end(tmp_path):
    root = put(tmp_path / "a" / "set", "1.jpg", "in/2.jpg")
    put(tmp_path / "out", "3.jpg")
    (root / "self").symlink_to(".")
    (root / "in" / "up").symlink_to("..")
    (root / "above").symlink_to(tmp_path)
    (root / "out").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "back").symlink_to(root)
    (tmp_path / "out" / "more").symlink_to(tmp_path / "a")
    found = list_files(str(root))
    assert (found.images, found.left_out) == (["1.jpg", "in/2.jpg", "out/3.jpg"], {"loop": 5})


def test_list_files__odd_files_are_rows_or_counted(tmp_path):
    root = put(tmp_path / "d", "ok.jpg")
    os.mkfifo(root / "pipe.jpg")
    os.mkfifo(root / "pipe.tar")
    os.mkfifo(root / "pipe.parquet")
    os.mkfifo(root / "pipe")
    (root / "zero.jpg").symlink_to("/dev/zero")
    (root / "gone.jpg").symlink_to("nowhere")
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "d.jpg").mkdir()
    (root / "empty.jpg").touch()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(root / "s.jpg"))
    with (root / "big.jpg").open("wb") as file:
        file.truncate(30 << 30)
    found = list_files(str(root))
    names = ("big", "empty", "gone", "ok", "pipe", "s", "self", "zero")
    assert found.images == [f"{name}.jpg" for name in names]
    unreadable = ("gone", "pipe", "s", "self", "zero")
    assert found.odd == {
        **{f"{name}.jpg": "unreadable" for name in unreadable},
        "big.jpg": "too_large",
        "empty.jpg": "empty",
    }
    assert found.left_out == {"not_a_file": 2, "no_suffix": 1}
    with pytest.raises(StorageError, match="Not a directory"):
        list_files(str(root / "pipe.jpg"))


def test_list_files__names_that_are_no_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb") as file:  # noqa: PTH123
        file.write(jpeg(1))
    found = list_files(str(tmp_path))
    assert [shown(name) for name in found.images] == ["caf\\xe9.jpg"]


def test_list_files__what_curate_wrote_is_no_input(tmp_path):
    put(tmp_path, "x.jpg", "run/site/y.jpg", "work/z.jpg", "exp/w.jpg")
    write_shards(tmp_path / "packed", [[("0" * 32, jpeg(1), None)]])
    put(tmp_path / "out" / "_ingest-pool", "_receipts/0.jpg", "raw/1.jpg")
    put(tmp_path / "run", "work/pool/00-ingest-1/2.jpg")
    for name in ("run/run.json", "exp/run.json", "out/_key.json"):
        (tmp_path / name).write_text("{}")
    found = list_files(str(tmp_path))
    assert found.images == ["exp/w.jpg", "work/z.jpg", "x.jpg"]
    assert found.left_out == {"own_output": 3, ".json": 1}
    assert list_files(str(tmp_path / "packed")).tars == ["shard-00000.tar"]  # named, so meant


def test_own_folders__the_root_is_none():
    assert own_folders(["_manifest.json", "x.jpg", "a/_stage.json"]) == {"a"}


def test_list_files__one_file_is_itself(tmp_path):
    put(tmp_path, "a/x.data")
    found = list_files(str(tmp_path / "a" / "x.data"))
    assert (found.root, found.images) == (str(tmp_path / "a"), ["x.data"])


def test_told__many_suffixes_are_cut(tmp_path):
    names = [f"{i}.{'s' * (i + 1)}" for i in range(12)]
    assert told(list_files(str(put(tmp_path, *names))).left_out).endswith(", 4 more suffixes")


def test_image_place__a_work_folder_is_its_packed_set(tmp_path):
    work = tmp_path / "work folder"
    put(work, "site/raw.jpg", "work/pool/own/x.jpg")
    assert image_place(str(work)) == str(work)  # a name alone makes no run
    put(work, "work/pool/00-ingest-1f/x.jpg")
    with pytest.raises(DatasetError, match="has not finished"):
        image_place(str(work))
    (work / "run.json").write_text('{"recipe": "demo", "pool": [], "packed": null}')
    with pytest.raises(DatasetError, match="recipe 'demo' packs no images"):
        image_place(str(work))
    (work / "run.json").write_text('{"recipe": "demo", "pool": [], "packed": "set/packed"}')
    assert image_place(f"{work}//") == f"{work}/set/packed"
    (work / "run.json").write_text("[]")  # of some other program
    assert image_place(str(work)) == str(work)


def test_image_place__a_manifest_is_what_was_packed_of_it(tmp_path):
    packed = write_shards(tmp_path / "packed", [[("0" * 32, jpeg(1), None)]])
    assert image_place(str(packed)) == str(packed)
    manifest = tmp_path / "manifest"
    manifest.mkdir()
    text = (packed / "_manifest.json").read_text().replace('"offset": "int64", ', "")
    (manifest / "_manifest.json").write_text(text)
    with pytest.raises(DatasetError, match="its images are not packed"):
        image_place(str(manifest))
    with_packed = text.replace('"num_rows"', '"attributes": {"packed": "packed"}, "num_rows"', 1)
    (manifest / "_manifest.json").write_text(with_packed)
    assert image_place(str(manifest)) == str(packed)
    with pytest.raises(DatasetError, match="no such folder or file"):
        image_place(str(tmp_path / "missing"))
