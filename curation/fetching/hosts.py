"""How each host behaved in a download: for summaries, and for knowing whom to leave alone."""

import pyarrow as pa
import pyarrow.compute as pc

from curation.dataset import Dataset

_HOST = r"^https?://(?:[^/?#@]*@)?(?P<host>\[[^\]]*\]|[^/:?#]*)"
_COUNTS = ("rows", "arrived", "opted_out", "failed", "num_bytes", "seconds")
_READ = ("status", "final_url", "num_bytes", "seconds")


def summarise_hosts(fetches: Dataset) -> pa.Table:
    """One row a host, most rows first: host, rows, arrived, opted_out, failed, num_bytes, seconds.

    Rows that never led to a host (no URL) have a null host. A redirect counts for where it led.
    Memory: a row a host.
    """
    total = _summarise(fetches.read_shard(0, _READ)) if fetches.num_shards else None
    for index in range(1, fetches.num_shards):
        total = _add_up(pa.concat_tables([total, _summarise(fetches.read_shard(index, _READ))]))
    if total is None:
        return pa.table({name: [] for name in ("host", *_COUNTS)})
    return total.sort_by([("rows", "descending"), ("host", "ascending")])


def _summarise(fetches: pa.Table) -> pa.Table:
    status = fetches["status"]
    columns = {name: pc.equal(status, name) for name in ("arrived", "opted_out", "failed")}
    found = pc.struct_field(pc.extract_regex(fetches["final_url"], _HOST), "host")
    table = pa.table(
        {
            "host": found,
            "rows": pa.array([1] * fetches.num_rows, pa.int64()),
            **{name: flags.cast(pa.int64()) for name, flags in columns.items()},
            "num_bytes": pc.fill_null(fetches["num_bytes"], 0),
            "seconds": pc.fill_null(fetches["seconds"], 0).cast(pa.float64()),
        }
    )
    return _add_up(table)


def _add_up(table: pa.Table) -> pa.Table:
    grouped = table.group_by("host").aggregate([(name, "sum") for name in _COUNTS])
    return grouped.select(["host", *(f"{name}_sum" for name in _COUNTS)]).rename_columns(
        ["host", *_COUNTS]
    )
