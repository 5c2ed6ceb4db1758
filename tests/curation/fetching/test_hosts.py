import pyarrow as pa

from curation.dataset import write_dataset
from curation.fetching.hosts import summarize_hosts, summarize_verdicts
from curation.pool import Pool
from curation.schema import FETCH_COLUMNS, make_id, schema_of


def test_summarize_hosts__adds_up_over_shards(tmp_path):
    rows = [
        ("http://a.test/1", "arrived", 10),
        ("https://b.test:8443/?x", "failed", None),
        ("http://a.test/2", "opted_out", None),
        ("http://[::1]:80/x", "arrived", 5),
        (None, "failed", None),
        ("http://a.test/3", "arrived", 7),
    ]
    table = pa.Table.from_pylist(
        [
            {
                "id": make_id(str(i)),
                "final_url": url,
                "status": status,
                "num_bytes": size,
                "seconds": 0.5,
            }
            for i, (url, status, size) in enumerate(rows)
        ],
        schema_of(FETCH_COLUMNS),
    )
    parts = [table.slice(0, 2), table.slice(2, 0), table.slice(2)]
    found = summarize_hosts(write_dataset(str(tmp_path / "f"), parts, table.schema)).to_pylist()
    assert [row["host"] for row in found] == ["a.test", "[::1]", "b.test", None]
    assert list(found[0].values()) == ["a.test", 3, 2, 1, 0, 17, 1.5]
    assert found[3]["failed"] == 1
    empty = write_dataset(str(tmp_path / "e"), [], table.schema)
    assert summarize_hosts(empty).num_rows == 0


def test_summarize_verdicts__counts_by_host(tmp_path):
    sources = ["http://a.test/1", "http://b.test/1", "d/photo.jpg", "https://a.test/2"]
    ids = [make_id(source) for source in sources]
    images = pa.table({"id": ids, "source": sources})
    verdicts = pa.table({"id": ids[:1] + ids[2:], "keep": [True, False, False]})
    cuts = [slice(0, 2), slice(2, 4)]
    pool = Pool.of(write_dataset(str(tmp_path / "i"), [images[cut] for cut in cuts], images.schema))
    parts = [verdicts[:1], verdicts[1:]]
    decisions = write_dataset(str(tmp_path / "v"), parts, verdicts.schema)
    found = [tuple(row.values()) for row in summarize_verdicts(pool, decisions).to_pylist()]
    assert found == [("a.test", 2, 1, 1), (None, 1, 0, 1)]
