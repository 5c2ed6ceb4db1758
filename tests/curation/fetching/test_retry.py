import pyarrow as pa

from curation.dataset import write_dataset
from curation.fetching.retry import retryable_rows
from curation.pool import Pool
from curation.schema import make_id, schema_of


def test_retryable_rows__only_what_may_pass_is_asked_again(tmp_path):
    reasons = [
        None,
        "http_404",
        "timeout",
        "opted_out:robots",
        "http_503",
        "dns",
        "dns_unavailable",
    ]
    ids = [make_id(str(i)) for i in range(7)]
    rows_schema, schema = schema_of(["id", "source"]), schema_of(["id", "keep", "reason"])
    rows = pa.table([ids, list("abcdefg")], schema=rows_schema)
    verdicts = pa.table([ids, [one is None for one in reasons], reasons], schema=schema)
    parts = [slice(0, 4), slice(4, 3)]
    cut = [(rows.slice(p.start, p.stop), verdicts.slice(p.start, p.stop)) for p in parts]
    pool = Pool.of(write_dataset(str(tmp_path / "rows"), [a for a, _ in cut], rows_schema))
    earlier = write_dataset(str(tmp_path / "earlier"), [b for _, b in cut], schema)
    again = pool.with_stage({}, retryable_rows(earlier, str(tmp_path / "retry")))
    assert again.num_rows == 3
    assert again.read(0, ["source"])["source"].to_pylist() == ["c"]
    assert again.read(1, ["source"])["source"].to_pylist() == ["e", "g"]
