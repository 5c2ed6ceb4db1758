"""`curate stats`: counts of a run or a data set, for people and for machines."""

import csv
import io
from collections.abc import Iterator

from curation import storage
from pipelines.audit.dataset_stats import Stats, count_by, dataset_stats, open_any
from pipelines.audit.run_stats import run_stats
from pipelines.audit.tables import Json, Row, opened
from pipelines.audit.work_folder import WorkFolder
from pipelines.run.run_record import open_manifest


def stats_of(path: str) -> Stats:
    """Everything that `curate stats` says of a work folder or a data set.

    Raises:
        DatasetError: neither is there.
    """
    if WorkFolder.is_one(path):
        return run_stats(WorkFolder(path))
    return dataset_stats(open_any(path))


def count_by_column(path: str, by: str) -> list[Row]:
    """Rows of a data set, or of a run's manifest, by a column or by `host`.

    Raises:
        ConfigError: there is no such column.
        DatasetError: the run has no manifest.
    """
    dataset = open_manifest(path) if WorkFolder.is_one(path) else open_any(path)
    with opened(dataset) as tables:
        return count_by(tables, by) if tables else []


def write_csv(found: Stats, out: str) -> str:
    """Write statistics as CSV, one figure a line: its place, then its value; give the path."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("figure", "value"))
    writer.writerows(_flat(found, ""))
    storage.write_bytes(out, buffer.getvalue().encode())
    return out


def _flat(value: Json, place: str) -> Iterator[tuple[str, Json]]:
    """(a.b.0.c, value) of everything inside."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from _flat(inner, f"{place}.{key}" if place else str(key))
    elif value is not None:
        yield place, value
