import zlib

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from curation.errors import StorageError
from curation.neighbors.rows.column_file import ColumnFile, write_columns

ANY_ARRAY = arrays.arrays(
    st.sampled_from(
        ["bool", "int8", "uint8", "int32", ">i8", "int64", "float16", "<f4", "float64"]
    ),
    arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9),
)
ANY_COLUMNS = st.dictionaries(st.text(max_size=5), ANY_ARRAY, max_size=4)
DATA = {"bounds": np.array([0, 2, 5]), "score": np.arange(5, dtype=np.float32) / 3}


def write(path, columns=DATA):
    write_columns(str(path), columns)
    return str(path)


def equal(found, wanted):
    return found.shape == wanted.shape and found.tobytes() == wanted.astype(found.dtype).tobytes()


@settings(max_examples=60, deadline=None)
@given(columns=ANY_COLUMNS, data=st.data())
@pytest.mark.parametrize("root", ["", "memory:/"])
def test_column_file__gives_back_all_columns_and_any_rows(tmp_path_factory, root, columns, data):
    file = ColumnFile.open(write(f"{root}{tmp_path_factory.mktemp('columns')}/a.bin", columns))
    assert list(file.columns) == list(columns)
    for name, array in columns.items():
        assert equal(file[name], array)
        assert file[name].dtype == array.dtype.newbyteorder("=")
        assert file.columns[name].offset % 64 == 0
        start = data.draw(st.integers(0, len(array)))
        stop = data.draw(st.integers(start, len(array)))
        assert equal(file.read([name], start, stop)[0], array[start:stop])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("root", ["", "memory:/"])
def test_column_file__bytes_that_are_no_such_file_are_a_line(tmp_path_factory, root, data):
    path = write(f"{root}{tmp_path_factory.mktemp('columns')}/a.bin")
    whole = ColumnFile.open(path)
    with fsspec.open(path, "rb") as file:
        raw = bytearray(file.read())
    head_bytes = whole.columns["bounds"].offset
    length = int.from_bytes(raw[8:12], "little")
    place = data.draw(st.integers(0, 15 + length))
    raw[place] ^= data.draw(st.integers(1, 255))
    kept = data.draw(st.integers(16, head_bytes))
    with fsspec.open(path, "wb") as file:
        file.write(bytes(raw[: data.draw(st.sampled_from([kept, len(raw)]))]))
    with pytest.raises(StorageError, match=r"a\.bin") as raised:
        ColumnFile.open(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text", [b"[]", b'{"a": 3}', b'{"a": ["<f4", 3, 0]}', b'{"a": ["?!", [3], 0]}']
)
def test_column_file__a_header_that_lists_no_columns_is_a_line(tmp_path, text):
    head = b"columns1" + len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little")
    (tmp_path / "a.bin").write_bytes(head + text + bytes(256))
    with pytest.raises(StorageError, match="lists no columns"):
        ColumnFile.open(str(tmp_path / "a.bin"))


def test_column_file__a_file_that_lost_its_end_is_named(tmp_path):
    path = write(tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"a\.bin: has \d+ bytes, needs \d+; remove it"):
        ColumnFile.open(path)


def test_column_file__what_is_missing_is_named(tmp_path):
    file = ColumnFile.open(write(tmp_path / "a.bin"))
    with pytest.raises(StorageError, match="has no column 'twin', only bounds, score"):
        file["twin"]
    with pytest.raises(StorageError, match="has no rows 2 to 6 of 'score'"):
        file.read(["score"], 2, 6)
    with pytest.raises(StorageError, match="no such file"):
        ColumnFile.open(str(tmp_path / "b.bin"))


def test_column_file__rows_on_an_object_store_cost_one_batch_of_requests(monkeypatch):
    large = {**DATA, "position": np.arange(1 << 16), "vector": np.ones((1 << 16, 8), np.float16)}
    path = write("memory://columns/a.bin", large)
    store, asked = fsspec.filesystem("memory"), []
    for name in ("cat_file", "cat_ranges"):
        original = getattr(type(store), name)
        monkeypatch.setattr(
            type(store), name, lambda *a, _o=original, _n=name, **k: asked.append(_n) or _o(*a, **k)
        )
    file = ColumnFile.open(path)
    assert asked == ["cat_file"]
    assert file["bounds"].tolist() == [0, 2, 5]
    assert asked == ["cat_file"]  # it came with the header
    positions, vectors = file.read(["position", "vector"], 40_000, 40_003)
    assert [name for name in asked if name == "cat_ranges"] == ["cat_ranges"]
    assert positions.tolist() == [40_000, 40_001, 40_002]
    assert vectors.shape == (3, 8)
