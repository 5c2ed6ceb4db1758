import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import storage
from curation.dataset import MANIFEST, Dataset, open_foreign, write_dataset
from curation.digest import Content
from curation.errors import DatasetError, SchemaError, StorageError
from curation.schema import ids_from_bytes, ids_to_bytes, make_id

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("score", pa.float32()),
        ("image", pa.large_binary()),
        ("embedding", pa.list_(pa.float16(), 3)),
        ("keep", pa.bool_()),
    ]
)


def rows(start: int, stop: int) -> pa.Table:
    numbers = range(start, stop)
    return pa.table(
        {
            "id": [make_id(str(i)) for i in numbers],
            "score": pa.array([None if i % 3 == 0 else i / 7 for i in numbers], pa.float32()),
            "image": pa.array([bytes([i % 256]) * (i % 5) for i in numbers], pa.large_binary()),
            "embedding": pa.array(
                [np.full(3, i, np.float16) for i in numbers], pa.list_(pa.float16(), 3)
            ),
            "keep": [i % 2 == 0 for i in numbers],
        },
        schema=SCHEMA,
    )


def test_dataset__written_then_opened(tmp_path):
    written = write_dataset(str(tmp_path / "d"), [rows(0, 5), rows(5, 5), rows(5, 9)], SCHEMA)
    opened = Dataset.open(written.path)
    assert opened.manifest == written.manifest
    assert opened.num_rows == 9
    assert opened.read().equals(rows(0, 9))
    assert [shard.num_kept for shard in opened.manifest.shards] == [3, 0, 2]
    assert opened.read_shard(0, ["score", "id"]).column_names == ["score", "id"]


def test_content_digest__is_free_of_shards_and_order(tmp_path):
    whole = write_dataset(str(tmp_path / "a"), [rows(0, 9)], SCHEMA)
    parts = [rows(4, 9).take(pa.array([4, 0, 2, 1, 3])), rows(0, 4)]
    shuffled = write_dataset(str(tmp_path / "b"), parts, SCHEMA)
    assert whole.manifest.content_digest == shuffled.manifest.content_digest
    assert whole.manifest.files_digest != shuffled.manifest.files_digest


@pytest.mark.parametrize("column", SCHEMA.names)
def test_content_digest__sees_every_cell(tmp_path, column):
    table = rows(1, 9)
    position = table.column_names.index(column)
    changed = table.set_column(position, SCHEMA.field(column), rows(2, 10)[column])
    assert Content.of(changed) != Content.of(table)


@given(st.lists(st.tuples(st.text(max_size=3), st.none() | st.binary(max_size=3)), max_size=6))
def test_content__equal_exactly_for_the_same_multiset(pairs):
    def table(values):
        return pa.table(
            {"a": [v[0] for v in values], "b": pa.array([v[1] for v in values], "binary")}
        )

    assert Content.of(table(pairs)) == Content.of(table(pairs[::-1]))
    assert Content.of(table([*pairs, ("x", None)])) != Content.of(table([*pairs, ("x", b"")]))


def test_dataset__without_manifest_is_none(tmp_path):
    written = write_dataset(str(tmp_path / "d"), [rows(0, 5)], SCHEMA)
    (tmp_path / "d" / MANIFEST).unlink()
    with pytest.raises(DatasetError, match="unfinished"):
        Dataset.open(written.path)
    with pytest.raises(DatasetError, match="does not exist"):
        Dataset.open(str(tmp_path / "nowhere"))


def test_dataset__of_another_version_is_refused(tmp_path):
    written = write_dataset(str(tmp_path / "d"), [rows(0, 5)], SCHEMA)
    path = tmp_path / "d" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(DatasetError, match="version 99"):
        Dataset.open(written.path)


def test_read_shard__damaged_or_lost_file_is_named(tmp_path):
    dataset = write_dataset(str(tmp_path / "d"), [rows(0, 5)], SCHEMA)
    shard = tmp_path / "d" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(StorageError, match="shard-00000"):
        dataset.read_shard(0)
    shard.unlink()
    with pytest.raises(StorageError, match="no such file"):
        dataset.read_shard(0)


def test_read_shard__missing_column_is_named(tmp_path):
    dataset = write_dataset(str(tmp_path / "d"), [rows(0, 5)], SCHEMA)
    with pytest.raises(SchemaError, match="'nothing' is missing; found: id, score"):
        dataset.read_shard(0, ["nothing"])


def test_open_foreign__takes_plain_parquet(tmp_path):
    storage.write_parquet(str(tmp_path / "x.parquet"), rows(0, 4))
    assert open_foreign(str(tmp_path)).read().equals(rows(0, 4))
    assert open_foreign(str(tmp_path / "x.parquet")).num_rows == 4
    with pytest.raises(SchemaError, match="'key' is missing"):
        open_foreign(str(tmp_path), id_column="key")


def test_ids__bytes_and_back():
    ids = pa.array([make_id("a"), make_id("b")])
    assert ids_from_bytes(ids_to_bytes(ids)).equals(ids)
    with pytest.raises(SchemaError, match="'xyz' is not 32 hex"):
        ids_to_bytes(pa.array(["xyz"]))


def test_write_whole__leaves_nothing_of_a_failed_write(tmp_path):
    with pytest.raises(RuntimeError), storage.open_whole(str(tmp_path / "file")) as file:
        file.write(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None)
@given(st.integers(min_value=0), st.integers(min_value=0, max_value=7))
def test_read_shard__a_flipped_bit_is_an_error_or_harmless(shard, place, bit):
    dataset, sound = shard
    path = Path(dataset.shard_path(0))
    data = bytearray(sound)
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        read = dataset.read_shard(0)
    except (StorageError, SchemaError) as error:
        assert str(path) in str(error)  # noqa: PT017  (both ways are right)
    else:
        assert Content.of(read).hex() == dataset.manifest.shards[0].content
    finally:
        path.write_bytes(sound)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    dataset = write_dataset(str(tmp_path_factory.mktemp("d")), [rows(0, 40)], SCHEMA)
    return dataset, Path(dataset.shard_path(0)).read_bytes()


def test_read_shard__of_before_footers_had_digests(tmp_path):
    dataset = write_dataset(str(tmp_path / "d"), [rows(0, 5)], SCHEMA)
    file = tmp_path / "d" / MANIFEST
    manifest = json.loads(file.read_text())
    del manifest["shards"][0]["footer"]
    file.write_text(json.dumps(manifest))
    assert Dataset.open(dataset.path).read_shard(0).num_rows == 5


def test_write_parquet__a_footer_longer_than_one_read(tmp_path):
    wide = pa.table({f"{'column' * 20}{number}": [number] for number in range(1500)})
    path = str(tmp_path / "wide.parquet")
    written = storage.write_parquet(path, wide)
    with storage.open_parquet(path, written.footer) as file:
        assert file.read().equals(wide)
