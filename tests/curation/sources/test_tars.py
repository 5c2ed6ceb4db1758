"""Headers of tars: as Python's tarfile reads sound ones, and to the end of all others."""

import io
import tarfile

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from curation.sources.names import hidden_part, kind_of
from curation.sources.tars import NOWHERE, Member, packing_of, read_members

JPEG = b"\xff\xd8\xff\xe0" + bytes(range(200)) * 4
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def tar_of(*members: tuple[str, bytes | str], format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of files, and of hard links where the content is the name of another."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.LNKTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def images_of(data: bytes) -> dict[str, bytes | None]:
    """Name and bytes of each image; None of those whose bytes are not there."""
    return {
        name: None if offset == NOWHERE else data[offset : offset + size]
        for name, offset, size in read_members(io.BytesIO(data), len(data)).images
    }


letters = st.characters(codec="utf-8", exclude_characters="/\0\\", exclude_categories=["Cs"])
parts = st.text(letters, min_size=1, max_size=60).filter(lambda part: not part.startswith("."))
names = st.builds(
    lambda folders, part, suffix: "/".join([*folders, part + suffix]),
    *(st.lists(parts, max_size=3), parts, st.sampled_from([".jpg", ".PNG", ".txt", ".webp"])),
)
contents = st.lists(
    st.tuples(names, st.binary(max_size=1500)), max_size=8, unique_by=lambda one: one[0]
)


@given(contents, st.sampled_from(FORMATS), contents)
@example([("__MACOSX/0.jpg", b"")], tarfile.GNU_FORMAT, [("0.jpg?.txt", JPEG)])
def test_read_members__sound_tars_as_tarfile(members, format, more):
    try:
        data = tar_of(*members, format=format)
    except ValueError:  # a name too long for ustar
        return
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        wanted = [
            Member(one.name, one.offset_data, one.size)
            for one in tar
            if kind_of(one.name) == "image" and not hidden_part(one.name)
        ]
    found = read_members(io.BytesIO(data), len(data))
    assert found.images == wanted
    assert not found.damages
    assert sum(found.left_out.values()) == len(members) - len(wanted)
    two = data + tar_of(*((f"b/{name}", content) for name, content in more))
    expected = [
        content
        for name, content in [*members, *more]
        if kind_of(name) == "image" and not hidden_part(name)
    ]
    assert list(images_of(two).values()) == expected


SOUND = tar_of(
    *((f"{i}.jpg", JPEG) for i in range(3)),
    ("n" * 150 + ".jpg", JPEG),
    ("link.jpg", "0.jpg"),
    ("in.tar", tar_of(("x.jpg", JPEG))),
) + tar_of(("é" * 80 + ".jpg", JPEG), format=tarfile.PAX_FORMAT)
changes = st.lists(
    st.tuples(st.integers(0, len(SOUND) - 1), st.binary(min_size=1, max_size=12)), max_size=12
)


@given(changes, st.integers(0, len(SOUND)), st.sampled_from([b"", b"\0" * 700, SOUND[:1000]]))
@example([], len(SOUND), b"")
def test_read_members__any_bytes_end_well(changed, cut, tail):
    data = bytearray(SOUND)
    for place, piece in changed:
        data[place : place + len(piece)] = piece
    data = bytes(data[:cut]) + tail
    found = read_members(io.BytesIO(data), len(data))
    assert len({member.name for member in found.images}) == len(found.images)
    assert all(member.offset < len(data) and member.size >= 0 for member in found.images)


@given(st.binary(max_size=5000))
def test_read_members__bytes_that_are_no_tar(data):
    assert read_members(io.BytesIO(data), len(data)).images == []


@pytest.mark.parametrize("broken", range(10))
def test_read_members__a_damaged_header_costs_its_own_image(broken):
    whole = tar_of(*((f"{i}.jpg", JPEG + bytes([i])) for i in range(10)))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        place = tar.getmembers()[broken].offset
    data = whole[: place + 148] + b"\xff" * 8 + whole[place + 156 :]
    found = read_members(io.BytesIO(data), len(data))
    assert [one.name for one in found.images] == [f"{i}.jpg" for i in range(10) if i != broken]
    assert found.damages == [place]


def test_read_members__links_are_the_images_they_name():
    data = tar_of(("a/1.jpg", JPEG), ("2.jpg", "a/1.jpg"), ("3.jpg", "none.jpg"))
    symbolic = tarfile.TarInfo("a/4.jpg")
    symbolic.type, symbolic.linkname = tarfile.SYMTYPE, "5.jpg"
    later = tarfile.TarInfo("a/5.jpg")
    later.size = len(JPEG) + 1
    padded = (JPEG + b"5").ljust(1024, b"\0")
    data += symbolic.tobuf() + later.tobuf() + padded + b"\0" * 1024
    assert images_of(data) == {
        "a/1.jpg": JPEG,
        "2.jpg": JPEG,
        "a/5.jpg": JPEG + b"5",
        "3.jpg": None,
        "a/4.jpg": JPEG + b"5",
    }
    loop = [tarfile.TarInfo("x.jpg"), tarfile.TarInfo("y.jpg")]
    for one, other in (loop, loop[::-1]):
        one.type, one.linkname = tarfile.SYMTYPE, other.name
    assert images_of(b"".join(one.tobuf() for one in loop)) == {"x.jpg": None, "y.jpg": None}


def test_read_members__two_archives_with_the_same_names():
    data = tar_of(("0.jpg", JPEG)) + tar_of(("0.jpg", JPEG + b"2"))
    assert images_of(data) == {"0.jpg": JPEG, "0.jpg#2": JPEG + b"2"}


def test_read_members__tars_inside_and_what_is_left_out():
    inner = tar_of(("a.jpg", JPEG), ("c/b.jpg", JPEG))
    files = [("n01.tar", inner), ("n02.TAR", inner), ("note.txt", b""), ("._x.jpg", b"AppleDouble")]
    data = tar_of(*files, ("__MACOSX/x.jpg", JPEG), ("in.tar.gz", b"x"), ("plain", JPEG))
    found = read_members(io.BytesIO(data), len(data))
    wanted = {"n01.tar/a.jpg", "n01.tar/c/b.jpg", "n02.TAR/a.jpg", "n02.TAR/c/b.jpg", "plain"}
    assert {one.name for one in found.images} == wanted
    assert set(images_of(data).values()) == {JPEG}
    assert found.left_out == {".txt": 1, "hidden": 2, ".gz": 1}


def test_read_members__sizes_that_lie():
    lying = tarfile.TarInfo("lying.jpg")
    lying.size = 8 << 40
    data = lying.tobuf(tarfile.GNU_FORMAT) + tar_of(("0.jpg", JPEG))
    found = read_members(io.BytesIO(data), len(data))
    assert [(one.name, one.size) for one in found.images] == [
        ("lying.jpg", 8 << 40),
        ("0.jpg", 804),
    ]
    assert found.damages == [0]
    lying.type = tarfile.XHDTYPE
    data = lying.tobuf(tarfile.GNU_FORMAT) + tar_of(("0.jpg", JPEG))
    assert images_of(data) == {"0.jpg": JPEG}
    lying.type, lying.size = tarfile.REGTYPE, -512
    data = lying.tobuf(tarfile.GNU_FORMAT) + tar_of(("0.jpg", JPEG))
    assert images_of(data) == {"0.jpg": JPEG}


def test_read_members__sparse_members_are_named_and_not_read():
    old = tarfile.TarInfo("old.jpg")
    old.type, old.size = tarfile.GNUTYPE_SPARSE, 512
    head = bytearray(old.tobuf(tarfile.GNU_FORMAT))
    head[482] = 1  # its map goes on in one more block
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    pax = tarfile.TarInfo("GNUSparseFile.0/new.jpg")
    pax.size, pax.pax_headers = 512, {"GNU.sparse.major": "1", "GNU.sparse.name": "new.jpg"}
    data = bytes(head) + b"\0" * 512 + b"x" * 512
    data += pax.tobuf(tarfile.PAX_FORMAT) + b"x" * 512 + tar_of(("0.jpg", JPEG))
    assert images_of(data) == {"old.jpg": None, "new.jpg": None, "0.jpg": JPEG}


def test_read_members__a_long_pax_header_takes_no_time():
    pax = tarfile.TarInfo("0.jpg")
    pax.size = len(JPEG)
    pax.pax_headers = {f"k{i}": "v" for i in range(100_000)}
    data = pax.tobuf(tarfile.PAX_FORMAT) + JPEG + b"\0" * 2000
    assert images_of(data) == {"0.jpg": JPEG}


def test_packing_of__by_content_not_by_name():
    gzipped = io.BytesIO()
    with tarfile.open(fileobj=gzipped, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert packing_of(gzipped) == "gzip"
    assert packing_of(io.BytesIO(tar_of(("BZhello.jpg", JPEG)))) is None
    assert packing_of(io.BytesIO(b"")) is None
