import hashlib

import duckdb
import pyarrow as pa

from curation import storage


def test_write_parquet__bloom_filters_tell_where_a_hash_may_be(tmp_path):
    rows = 3 * (1 << 13)
    hashes = [hashlib.sha256(str(row).encode()).hexdigest() for row in range(rows)]
    table = pa.table({"id": [f"{row:032x}" for row in range(rows)], "sha256": hashes})
    path = str(tmp_path / "a.parquet")
    storage.write_parquet(path, table)
    probe = "select bloom_filter_excludes from parquet_bloom_probe(?, 'sha256', ?)"
    with duckdb.connect() as connection:
        told = connection.execute(probe, [path, hashes[777]]).fetchall()
        found = connection.execute(f"select id from '{path}' where sha256 = ?", [hashes[777]])
        assert found.fetchall() == [(f"{777:032x}",)]
    assert [excluded for (excluded,) in told] == [False, True, True]
