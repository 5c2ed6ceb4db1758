"""The final union: retrieved images and the sets taken as they are, each image once.

Its output is the manifest: one row for every image of the finished set.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.exchange import Reducer
from curation.ledger import commit_shard
from curation.pool import Pool
from curation.repeats import RepeatFinder
from curation.schema import ID, column_type, schema_of
from curation.stage import DatasetStage, Engine, Shard, StageFolder, StageInputs, reject

MANIFEST_COLUMNS = (
    *(ID, "source", "source_set", "alt", "page", "license"),
    *("width", "height", "original_width", "original_height", "format"),
    *("num_bytes", "sha256", "pixel_hash", "phash"),
    *("seed_set", "rule", "seed_id", "rank", "similarity", "cluster"),
)


class Select(DatasetStage):
    """Joins the sets taken as they are with the pool's survivors, in this order of precedence."""

    as_is: tuple[str, ...] = ()
    """Sets of which every image that is no leak is taken."""

    reasons = ("duplicate_in_union",)
    on_union = True

    def needs(self) -> tuple[str, ...]:
        """What images must have."""
        return ("source", "source_set", "pixel_hash")

    def uses(self) -> tuple[str, ...]:
        """What the manifest says of images where it is known."""
        return tuple(name for name in MANIFEST_COLUMNS if name not in (ID, *self.needs()))

    def set_names(self) -> tuple[str, ...]:
        """The sets taken as they are."""
        return self.as_is

    def outputs(self) -> dict[str, pa.Schema]:
        """The manifest."""
        return {"manifest": schema_of(MANIFEST_COLUMNS)}

    def extras(self) -> pa.Schema:
        """The image of the union that a dropped one equals."""
        return schema_of(["twin"])

    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> dict[str, Any]:
        """Drop images that an earlier flow, or a smaller id, has already; write the manifest.

        The union's shards lie flow by flow, each sorted by ranges of id, so that the first by
        (shard, id) is the first by (flow, id), however many shards a flow has.
        """
        finder = RepeatFinder(inputs.pool, "pixel_hash", (), (("shard", "ascending"),))
        finder.run(engine, folder.scratch, _WriteManifest(self, inputs.pool, folder))
        return {}


@dataclass(frozen=True)
class _WriteManifest(Reducer):
    stage: Select
    pool: Pool
    folder: StageFolder

    def __call__(self, bucket: int, rows: pa.Table) -> int:
        present = [name for name in MANIFEST_COLUMNS if name in self.pool.columns]
        shard = Shard(self.pool.read(bucket, present), bucket)
        for name in set(MANIFEST_COLUMNS) - set(present):
            shard.emit("manifest", {name: pa.nulls(shard.num_rows, column_type(name))})
        place = pc.index_in(shard.ids, value_set=rows[ID].combine_chunks())
        reject(shard, np.asarray(pc.is_valid(place)), "duplicate_in_union")
        shard.emit("manifest", {})
        shard.note("twin", rows["twin"].take(place))
        commit_shard(self.stage, self.folder, shard)
        return shard.num_rows
