import pyarrow as pa
import pyarrow.parquet as pq

from curation.dataset import commit, write_shard
from pipelines.audit.lookup import find_rows, groups_with, stream_rows


def made(tmp_path, rows=20_000):
    """One shard of several row groups, sorted by id."""
    table = pa.table({"id": [f"{n:032x}" for n in range(rows)], "n": range(rows)})
    info = write_shard(str(tmp_path), 0, table)
    return commit(str(tmp_path), table.schema, [info])


def test_find_rows__by_ids_without_the_other_row_groups(tmp_path):
    dataset = made(tmp_path)
    wanted = [f"{n:032x}" for n in (3, 19_999)]
    assert find_rows(dataset, 0, wanted)["n"].to_pylist() == [3, 19_999]
    assert find_rows(dataset, 0, wanted[:1], ["n", "no such column"]).column_names == ["id", "n"]
    assert find_rows(dataset, 0, ["f" * 32]).num_rows == 0
    with pq.ParquetFile(dataset.shard_path(0)) as file:
        assert file.metadata.num_row_groups > 2
        assert groups_with(file, wanted[:1]) == [0]
        assert groups_with(file, wanted) == [0, file.metadata.num_row_groups - 1]


def test_stream_rows__all_that_are_asked_for(tmp_path):
    dataset = made(tmp_path)
    wanted = [f"{n:032x}" for n in range(0, 20_000, 997)]
    found = [
        one for batch in stream_rows(dataset, 0, wanted, ["n"]) for one in batch["n"].to_pylist()
    ]
    assert found == list(range(0, 20_000, 997))
    assert list(stream_rows(dataset, 0, ["f" * 32], ["n"])) == []
