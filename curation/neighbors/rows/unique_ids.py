"""Refuses ids that occur twice in one source: whatever is said of rows is said by their ids."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import DatasetError
from curation.exchange import Exchange, Mapper, Reducer, bucket_of_ids
from curation.neighbors.rows.vectors import VectorSource
from curation.stage import Engine

_IDS_PER_BUCKET = 1 << 20


def check_unique_ids(
    source: VectorSource, runs: Sequence[range], folder: str, engine: Engine
) -> None:
    """Bring equal ids together; names the smallest that occurs twice. runs: of all shards.

    Raises:
        DatasetError: there is one.
    """
    buckets = 1 + source.pool.num_rows // _IDS_PER_BUCKET
    exchange = Exchange(folder, buckets)
    twice = filter(None, exchange.run(engine, _Ids(source, buckets), runs, _FindTwice()))
    for row_id in twice:
        raise DatasetError(
            f"{source.dataset.path}: id {source.describe(row_id)} occurs twice; ids must be "
            "unique: drop one of the rows, or give each its own id"
        )


@dataclass(frozen=True)
class _Ids(Mapper[range]):
    """Ids of some shards, by bucket."""

    source: VectorSource
    num_buckets: int

    def __call__(self, item: range) -> tuple[pa.Table, np.ndarray]:
        parts = [self.source.live_ids(shard) for shard in item]
        ids = pa.chunked_array([one for part in parts for one in part.chunks], parts[0].type)
        return pa.table({"id": ids}), bucket_of_ids(ids, self.num_buckets)


class _FindTwice(Reducer[str | None]):
    """The smallest id that occurs twice in its bucket."""

    def __call__(self, bucket: int, rows: pa.Table) -> str | None:
        counts = rows["id"].value_counts()
        many = counts.filter(pc.greater(counts.field("counts"), 1))
        smallest: str | None = pc.min(many.field("values")).as_py()
        return smallest
