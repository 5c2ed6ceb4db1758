import bz2
import gzip
import logging
import lzma

import pyarrow as pa
import pytest

from curation.errors import DatasetError
from curation.unpacking import plain_name, text_lines, unpacked_blocks

PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
DATA = b"line\n" * 500_000 + bytes(range(256)) * 40


def unpacked(path, data: bytes) -> bytes:
    path.write_bytes(data)
    return b"".join(unpacked_blocks(str(path)))


@pytest.mark.parametrize("kind", PACK)
def test_unpacked_blocks__of_members_one_after_another(tmp_path, kind):
    pack = PACK[kind]
    for name in (f"a.{kind}", f"A.{kind.upper()}"):
        assert unpacked(tmp_path / name, pack(DATA)) == DATA
        assert unpacked(tmp_path / name, pack(DATA) + pack(b"more")) == DATA + b"more"
        assert unpacked(tmp_path / name, b"") == b""


@pytest.mark.parametrize("kind", PACK)
def test_unpacked_blocks__of_a_file_that_ends_early(tmp_path, kind):
    packed = PACK[kind](DATA)
    for size in (10, len(packed) // 2, len(packed) - 5):
        with pytest.raises(DatasetError, match=rf"^\S*a.{kind}: ends early; copy or fetch"):
            unpacked(tmp_path / f"a.{kind}", packed[:size])


@pytest.mark.parametrize("kind", PACK)
def test_unpacked_blocks__of_damaged_bytes(tmp_path, kind):
    with pytest.raises(DatasetError, match=rf"a.{kind}: is damaged, or no .{kind} file at all"):
        unpacked(tmp_path / f"a.{kind}", b"url\nhttp://h.example/\n")
    if kind != "zst":  # Arrow's has no checksum
        packed = bytearray(PACK[kind](DATA))
        packed[len(packed) // 2] ^= 255
        with pytest.raises(DatasetError, match=r"is damaged|ends early"):
            unpacked(tmp_path / f"a.{kind}", bytes(packed))


def test_unpacked_blocks__leave_out_what_follows_gzip_data(tmp_path, caplog):
    packed = gzip.compress(b"text")
    with caplog.at_level(logging.WARNING):
        assert unpacked(tmp_path / "a.gz", packed + b"\0" * 512) == b"text"
        assert not caplog.records
        for junk in (b"\x1f", b"junk", b"\0\0junk"):
            assert unpacked(tmp_path / "a.gz", packed + junk) == b"text"
    assert ["a.gz: what follows its gzip data" in one.getMessage() for one in caplog.records] == [
        *(True, True, True)
    ]
    with pytest.raises(DatasetError, match="ends early"):
        unpacked(tmp_path / "a.gz", packed + packed[:-3])


def test_text_lines__without_mark_and_ends(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\ufeffa\r\nb\n\nc".encode()))
    lines = list(text_lines(str(tmp_path / "a.txt.gz")))
    assert lines == [(1, "a"), (2, "b"), (3, ""), (4, "c")]
    (tmp_path / "a.txt").write_bytes("a".encode("utf-16"))
    with pytest.raises(DatasetError, match=r"a\.txt: is UTF-16"):
        list(text_lines(str(tmp_path / "a.txt")))


def test_plain_name__is_lower_case_without_packing():
    assert plain_name("S3://b/URLS.CSV.GZ") == "s3://b/urls.csv"
    assert plain_name("a.parquet") == "a.parquet"
