import gzip
import zlib

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.fetching.content_codings import codings_in, unpack
from curation.fetching.outcomes import FetchError

DATA = bytes(range(256)) * 20
ROOM = 1 << 16


def raw_deflate(data: bytes) -> bytes:
    squeeze = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return squeeze.compress(data) + squeeze.flush()


def members(data: bytes) -> bytes:
    return gzip.compress(data[:1000]) + gzip.compress(data[1000:])


PACKED = {
    "gzip": ("gzip", gzip.compress(DATA)),
    "two members": ("x-gzip", members(DATA)),
    "padded with zeros": ("gzip", gzip.compress(DATA) + bytes(100)),
    "zlib": ("deflate", zlib.compress(DATA)),
    "raw": ("deflate", raw_deflate(DATA)),
    "gzip called deflate": ("deflate", gzip.compress(DATA)),
    "zlib called gzip": ("gzip", zlib.compress(DATA)),
    "brotli": ("br", bytes(pa.Codec("brotli").compress(DATA))),
    "zstd": ("zstd", bytes(pa.Codec("zstd").compress(DATA))),
}
CHECKED = ("gzip", "two members", "zlib")
"""What carries a checksum."""


@pytest.mark.parametrize("kind", PACKED)
def test_unpack__every_way_to_pack(kind):
    name, packed = PACKED[kind]
    assert unpack(packed, [name], ROOM) == DATA
    assert unpack(packed, [name], len(DATA)) == DATA
    assert unpack(b"", [name], ROOM) == b""
    with pytest.raises(FetchError, match="too_large"):
        unpack(packed, [name], len(DATA) - 1)


@pytest.mark.parametrize("kind", sorted(set(PACKED) - {"padded with zeros"}))
def test_unpack__short_ones_never_arrive_cut(kind):
    name, packed = PACKED[kind]
    whole = len(gzip.compress(DATA[:1000])) if kind == "two members" else None
    for size in range(1, len(packed)):
        if size != whole:  # the first member alone is a whole file
            with pytest.raises(FetchError, match="truncated"):
                unpack(packed[:size], [name], ROOM)


def unpacked(body: bytes, name: str) -> bytes | str:
    try:
        return unpack(body, [name], ROOM)
    except FetchError as error:
        return error.reason


@given(st.sampled_from(CHECKED), st.data())
def test_unpack__a_damaged_bit_never_changes_what_arrives(kind, data):
    name, packed = PACKED[kind]
    bit = data.draw(st.integers(0, 8 * len(packed) - 1))
    damaged = bytearray(packed)
    damaged[bit // 8] ^= 1 << bit % 8
    assert unpacked(bytes(damaged), name) in (DATA, "truncated", "bad_encoding", "too_large")


@given(st.sampled_from(sorted(PACKED)), st.binary(max_size=200))
def test_unpack__any_bytes_have_an_end(kind, body):
    name, packed = PACKED[kind]
    for foreign in (body, packed[:20] + body, packed + b"x" + body):
        found = unpacked(foreign, name)
        if isinstance(found, bytes):
            assert len(found) <= ROOM
        else:
            assert found in ("truncated", "bad_encoding", "too_large")


def test_unpack__a_bomb_is_refused_at_every_layer():
    bomb = gzip.compress(gzip.compress(bytes(ROOM * 100)))
    with pytest.raises(FetchError, match="too_large"):
        unpack(bomb, ["gzip", "gzip"], ROOM)
    with pytest.raises(FetchError, match="too_large"):
        unpack(bytes(pa.Codec("zstd").compress(bytes(ROOM * 100))), ["zstd"], ROOM)


def test_unpack__what_never_was_gzip_is_not_asked_for_again():
    with pytest.raises(FetchError, match="bad_encoding"):
        unpack(b"\x89PNG", ["gzip"], ROOM)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        *(([one], []) for one in ("identity", "UTF-8", "aws-chunked", "none", "binary", "", "a/b")),
        (["GZip , identity"], ["gzip"]),
        (["aws-chunked", "gzip"], ["gzip"]),
        (["deflate, br"], ["deflate", "br"]),
    ],
)
def test_codings_in__unknown_ones_pass(values, expected):
    assert codings_in(values) == expected


def test_codings_in__layers_are_undone_last_first_and_are_few():
    twice = gzip.compress(zlib.compress(DATA))
    assert unpack(twice, codings_in(["deflate, gzip"]), ROOM) == DATA
    with pytest.raises(FetchError, match="bad_encoding"):
        codings_in(["gzip, " * 5])
