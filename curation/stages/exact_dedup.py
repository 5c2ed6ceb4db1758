"""Drops images whose bytes or decoded pixels equal those of another.

Equal bytes decode to equal pixels, so one search by pixel hash finds both.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.exchange import Reducer
from curation.key_dedup import KeyDuplicates
from curation.ledger import commit_shard
from curation.pool import Pool
from curation.schema import ID, schema_of
from curation.stage import DatasetStage, Engine, Figures, Shard, StageFolder, StageInputs, reject

_COLUMNS = ("sha256", "original_width", "original_height", "num_bytes")
_ORDER = (
    ("original_width", "descending"),
    ("original_height", "descending"),
    ("num_bytes", "descending"),
)


class ExactDedup(DatasetStage):
    """Keeps of equal images the one with most original pixels, then most bytes, then smallest id.

    What an earlier delivery kept comes before all.
    Equal pixels have equal sides after canonicalization, so ordering by sides orders by area.
    """

    reasons = ("duplicate_bytes", "duplicate_pixels")
    compares_with_previous = True

    def required_columns(self) -> tuple[str, ...]:
        """Hashes that canonicalize made, and what the choice of the kept one rests on."""
        return ("pixel_hash", *_COLUMNS)

    def decision_columns(self) -> pa.Schema:
        """The kept image that a dropped one equals."""
        return schema_of(["twin"])

    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> Figures:
        """Find equal images and write the verdicts."""
        finder = KeyDuplicates(inputs.pool, "pixel_hash", _COLUMNS, _ORDER, inputs.base)
        finder.run(engine, folder.scratch, _WriteVerdicts(self, inputs.pool, folder))
        return {}


@dataclass(frozen=True)
class _WriteVerdicts(Reducer[int]):
    stage: ExactDedup
    pool: Pool
    folder: StageFolder

    def __call__(self, bucket: int, rows: pa.Table) -> int:
        shard = Shard(self.pool.read(bucket, []), bucket)
        place = pc.index_in(shard.ids, value_set=rows[ID].combine_chunks())
        same_bytes = pc.equal(rows["sha256"], rows["twin_sha256"]).take(place)
        reject(shard, _true(same_bytes), "duplicate_bytes")
        reject(shard, _true(pc.is_valid(place)), "duplicate_pixels")
        shard.note("twin", rows["twin"].take(place))
        commit_shard(self.stage, self.folder, shard)
        return shard.num_rows


def _true(flags: Any) -> np.ndarray:
    return np.asarray(pc.fill_null(flags, False))
