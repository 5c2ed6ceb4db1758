"""Single rows of sorted shards, without reading the rest: row groups are chosen by their ids."""

from collections.abc import Collection, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.dataset import Dataset
from curation.schema import ID

_ROWS_AT_ONCE = 64
"""Images of so many rows are held at once."""


def find_rows(
    dataset: Dataset, shard: int, ids: Collection[str], columns: list[str] | None = None
) -> pa.Table:
    """Rows of one shard with some ids; columns that the data set lacks are left out."""
    names = None if columns is None else [ID, *(c for c in columns if c in dataset.columns)]
    with dataset.open_shard(shard) as file:
        table = file.read_row_groups(groups_with(file, ids), columns=names)
    return table.filter(pc.is_in(table[ID], pa.array(list(ids), pa.string())))


def stream_rows(
    dataset: Dataset, shard: int, ids: Collection[str], columns: list[str]
) -> Iterator[pa.RecordBatch]:
    """The same a few rows at a time, for columns of large values such as images."""
    wanted, found = pa.array(list(ids), pa.string()), 0
    with dataset.open_shard(shard) as file:
        batches = file.iter_batches(
            _ROWS_AT_ONCE, row_groups=groups_with(file, ids), columns=[ID, *columns]
        )
        for batch in batches:
            some = batch.filter(pc.is_in(batch[ID], wanted))
            found += some.num_rows
            if some.num_rows:
                yield some
            if found >= len(wanted):
                return


def groups_with(file: pq.ParquetFile, ids: Collection[str]) -> list[int]:
    """Numbers of the row groups whose range of ids holds one of some ids."""
    place = file.schema_arrow.names.index(ID)
    chosen = []
    for number in range(file.metadata.num_row_groups):
        limits = file.metadata.row_group(number).column(place).statistics
        unknown = limits is None or not limits.has_min_max
        if unknown or any(limits.min <= one <= limits.max for one in ids):
            chosen.append(number)
    return chosen
