import numpy as np
import pyarrow as pa
import pytest

from curation.dataset import Dataset, commit, open_foreign, write_shard
from curation.errors import ConfigError, DatasetError, StorageError
from pipelines.audit.tables import Tables, host_of, named, opened, plain, quoted, select


@pytest.fixture
def dataset(tmp_path):
    """Three shards of which one is empty."""
    parts = [pa.table({"id": [f"{n:032x}" for n in some], "n": some}) for some in ([1, 2], [3])]
    parts.insert(1, parts[0].slice(0, 0))
    infos = [write_shard(str(tmp_path / "set"), n, part) for n, part in enumerate(parts)]
    return commit(str(tmp_path / "set"), parts[0].schema, infos)


def test_select__rows_of_all_shards_and_none_without_a_data_set(dataset):
    assert select(dataset, "select sum(n) as total, count(*) as n from rows") == [
        {"total": 6, "n": 3}
    ]
    assert select(dataset, "select n from rows where n > ? order by n", [1]) == [{"n": 2}, {"n": 3}]
    assert select(None, "select 1") == []


def test_opened__none_without_files(tmp_path, dataset):
    with opened(dataset) as tables:
        assert tables is not None
        assert list(tables.columns("rows")) == ["id", "n"]
        assert len(tables.files("rows")) == 2
    empty = commit(str(tmp_path / "none"), pa.schema([("id", pa.string())]), [])
    with opened(Dataset.open(empty.path)) as tables:
        assert tables is None


def test_add__chosen_shards_and_labels(dataset):
    with Tables() as tables:
        assert not tables.add("v", dataset, shards=[1])
        assert tables.add("v", dataset, dataset, labels=[{"flow": "it's"}, {"flow": None}])
        rows = tables.rows("select flow, count(*) as n from v group by all order by flow")
    assert rows == [{"flow": "it's", "n": 3}, {"flow": None, "n": 3}]


def test_batches__more_rows_than_one_block(tmp_path):
    (tmp_path / "f").mkdir()
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": [str(n) for n in range(3000)]}), tmp_path / "f" / "a.parquet")
    with opened(open_foreign(str(tmp_path / "f"))) as tables:
        assert tables is not None
        assert len(list(tables.batches("select id from rows"))) == 3000
        found = tables.columns_of("select id::int as n from rows order by n")
    assert np.array_equal(found["n"], np.arange(3000))


def test_run__errors_are_ours(tmp_path, dataset):
    with opened(dataset) as tables:
        assert tables is not None
        with pytest.raises(DatasetError, match="query failed"):
            tables.run("select nothing from rows")
        with pytest.raises(StorageError):
            tables.run(f"select * from read_parquet('{tmp_path}/gone.parquet')")
    with Tables() as tables:
        tables.confine(dataset.path)
        (tmp_path / "x.csv").write_text("a\n1\n")
        with pytest.raises(ConfigError, match="--allow-files lets it read more"):
            tables.run(f"select * from '{tmp_path}/x.csv'")


def test_quoted_and_named__hold_whatever_they_are_given():
    assert quoted("a'b") == "'a''b'"
    assert [quoted(one) for one in (None, 3, True)] == ["null", "3", "True"]
    assert named('a"b') == '"a""b"'


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://user@a.org:80/x", "a.org"),
        ("http://b.org?x", "b.org"),
        ("folder/image.jpg", None),
        (None, None),
    ],
)
def test_host_of__urls_and_paths(url, host):
    with Tables() as tables:
        assert tables.first(f"select {host_of('?')} as host", [url]) == {"host": host}


def test_plain__what_json_cannot_hold():
    value = {"a": float("nan"), 1: [float("inf"), 2.5, b"x"], "t": (True, None)}
    assert plain(value) == {"a": None, "1": [None, 2.5, "b'x'"], "t": [True, None]}
