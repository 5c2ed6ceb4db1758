"""What a filter measured for those behind it: a file a shard, which each of them reads later.

Only scores are kept, no verdict: each filter judges in its own turn, from the rows that are alive
then, so that its decisions are those that it would have made alone.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation import storage
from curation.digest import digest_of
from curation.image_filter import ImageFilter, Scores
from curation.schema import ID, score_type

_UNREADABLE = "unreadable"


@dataclass(frozen=True)
class ScoreFiles:
    """Scores of one filter, in a folder of their own."""

    stage: ImageFilter
    folder: str
    """That of all filters which follow each other."""

    def path(self, index: int) -> str:
        """File of one shard."""
        key = digest_of(self.stage.model_dump_json())[:8]
        return storage.join(self.folder, f"{self.stage.name()}-{key}", f"{index:05d}.parquet")

    def write(self, index: int, ids: pa.ChunkedArray, scores: Scores) -> None:
        """Keep the scores of the rows that reach the filter; the file appears whole."""
        columns = {
            name: pa.array(values.tolist(), _kept_type(name))
            for name, values in scores.columns.items()
        }
        table = pa.table({ID: ids, **columns, _UNREADABLE: pa.array(scores.unreadable)})
        storage.write_parquet(self.path(index), table.filter(pa.array(scores.reached)))

    def read(self, index: int, ids: pa.ChunkedArray) -> Scores | None:
        """The scores of a shard's live rows; None where they were not measured before."""
        if not storage.exists(self.path(index)):
            return None
        table = storage.read_parquet(self.path(index))
        if not table[ID].equals(ids):  # an accepted failure dropped what was measured
            return None
        columns = {}
        for name in self.stage.scores:
            kept = table[name].to_pylist()
            is_number = pa.types.is_floating(_kept_type(name))
            columns[name] = np.array(kept) if is_number else _objects(kept)
        reached = np.ones(table.num_rows, bool)
        return Scores(columns, reached, np.asarray(table[_UNREADABLE]))


def _kept_type(name: str) -> pa.DataType:
    """Numbers are kept as they were measured, in double precision."""
    kind = score_type(name)
    return pa.float64() if pa.types.is_floating(kind) else kind


def _objects(values: list[list[list[int]] | None]) -> np.ndarray:
    """(N,) object: a value a row, which NumPy would take for further axes."""
    found = np.full(len(values), None, object)
    for row, value in enumerate(values):
        found[row] = value
    return found
