"""How each host behaved in a download: for summaries, and for knowing whom to leave alone."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from curation.dataset import Dataset
from curation.pool import Pool
from curation.schema import ID, KEEP

_HOST = r"^https?://(?:[^/?#@]*@)?(?P<host>\[[^\]]*\]|[^/:?#]*)"
_COUNTS = ("rows", "arrived", "opted_out", "failed", "num_bytes", "seconds")
_VERDICTS = {"host": pa.string(), "rows": pa.int64(), "kept": pa.int64(), "dropped": pa.int64()}
_READ = ("status", "final_url", "num_bytes", "seconds")


def summarize_hosts(fetches: Dataset) -> pa.Table:
    """One row a host, most rows first: host, rows, arrived, opted_out, failed, num_bytes, seconds.

    Rows that never led to a host (no URL) have a null host. A redirect counts for where it led.
    Memory: a row a host.
    """
    total = _summarize(fetches.read_shard(0, _READ)) if fetches.num_shards else None
    for index in range(1, fetches.num_shards):
        total = _add_up(pa.concat_tables([total, _summarize(fetches.read_shard(index, _READ))]))
    if total is None:
        return pa.table({name: [] for name in ("host", *_COUNTS)})
    return total.sort_by([("rows", "descending"), ("host", "ascending")])


def summarize_verdicts(pool: Pool, decisions: Dataset) -> pa.Table:
    """One row a host, most rows first: host, rows, kept, dropped.

    pool: the images that were judged, with their `source`; files have a null host. Memory: a row a
    host.
    """
    total = pa.table({name: pa.array([], kind) for name, kind in _VERDICTS.items()})
    for index in range(decisions.num_shards):
        verdicts = decisions.read_shard(index, [ID, KEEP])
        sources = pool.read_columns(index, ["source"], verdicts[ID])["source"]
        kept = verdicts[KEEP].cast(pa.int64())
        found = pa.table(
            {
                "host": pc.struct_field(pc.extract_regex(sources, _HOST), "host"),
                "rows": pa.array([1] * len(kept), pa.int64()),
                "kept": kept,
                "dropped": pc.subtract(1, kept),
            }
        )
        total = _add_up(pa.concat_tables([total, found]), tuple(_VERDICTS)[1:])
    return total.sort_by([("rows", "descending"), ("host", "ascending")])


def _summarize(fetches: pa.Table) -> pa.Table:
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


def _add_up(table: pa.Table, counts: Sequence[str] = _COUNTS) -> pa.Table:
    grouped = table.group_by("host").aggregate([(name, "sum") for name in counts])
    return grouped.select(["host", *(f"{name}_sum" for name in counts)]).rename_columns(
        ["host", *counts]
    )
