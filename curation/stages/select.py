"""The final union: retrieved images and the sets taken as they are, each image once.

Its output is the manifest: one row for every image of the finished set.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from curation import storage
from curation.dataset import Dataset
from curation.exchange import Reducer
from curation.key_dedup import KeyDuplicates
from curation.ledger import (
    commit_shard,
    finish_stage,
    finished_shards,
    open_outputs,
    read_stage,
)
from curation.pool import Pool, UnionPool
from curation.same_ids import SameIds
from curation.schema import ID, column_type, schema_of
from curation.stage import (
    DECISIONS,
    DatasetStage,
    Engine,
    Figures,
    Shard,
    StageFolder,
    StageInputs,
    reject,
)
from curation.stages.near_dedup import NearDedup

MANIFEST_COLUMNS = (
    *(ID, "source", "source_set", "alt", "page", "license", "crawled_at"),
    *("width", "height", "original_width", "original_height", "format"),
    *("num_bytes", "sha256", "pixel_hash", "phash"),
    *("seed_set", "rule", "seed_id", "rank", "similarity", "cluster"),
)


class Select(DatasetStage):
    """Joins the sets taken as they are with the pool's survivors, in this order of precedence.

    Duplicates across them fall; a set taken as it is keeps what it holds twice itself. So does a
    URL that an earlier set has, whatever it showed there; files under one id that differ end the
    run. What the manifest of an earlier delivery holds is not taken again, whichever flow it comes
    from.
    """

    version = 3

    as_is: tuple[str, ...] = ()
    """Sets of which every image that is no leak is taken."""
    embeddings: str | None = None
    """Side-car by which near-duplicates across sets are found; null: only equal images are."""
    threshold: float | None = Field(default=None, ge=-1, le=1)
    """Cosine above which two images are duplicates; the encoder's own where left out."""

    reasons = ("duplicate_in_union", "in_base")
    on_union = True
    compares_with_previous = True

    def required_columns(self) -> tuple[str, ...]:
        """What images must have."""
        return ("source", "source_set", "pixel_hash")

    def optional_columns(self) -> tuple[str, ...]:
        """What the manifest says of images where it is known."""
        return tuple(
            name for name in MANIFEST_COLUMNS if name not in (ID, *self.required_columns())
        )

    def set_names(self) -> tuple[str, ...]:
        """The sets taken as they are."""
        return self.as_is

    def outputs(self) -> dict[str, pa.Schema]:
        """The manifest."""
        return {"manifest": schema_of(MANIFEST_COLUMNS)}

    def decision_columns(self) -> pa.Schema:
        """The image of the union that a dropped one repeats."""
        return schema_of(["twin"])

    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> Figures:
        """Drop images that an earlier flow has already; write the manifest.

        The union's shards lie flow by flow, each sorted by ranges of id, so that the first by
        (shard, id) is the first by (flow, id), however many shards a flow has.
        """
        compared, key, base_key = inputs.pool, "pixel_hash", "pixel_hash"
        if isinstance(compared, UnionPool) and len(compared.parts) > 1:
            once = storage.join(folder.scratch, "once")
            compared = SameIds(compared, "pixel_hash").without_repeats(engine, once)
        writer = _WriteManifest(self, inputs.pool, compared, folder)
        if self.embeddings is not None:
            inputs = replace(inputs, pool=compared)
            components = self._near_duplicates(self.embeddings, inputs, folder, engine)
            compared = compared.with_layer("near_dedup", components)
            key, base_key = "component", ID  # a component with rows of a base has the id of one
        order = (("shard", "ascending"),)
        finder = KeyDuplicates(compared, key, (), order, inputs.base, base_key)
        finder.run(engine, folder.scratch, writer)
        return {"compared_by": key}

    def _near_duplicates(
        self, embeddings: str, inputs: StageInputs, folder: StageFolder, engine: Engine
    ) -> Dataset:
        """Components of near-duplicates of the whole union, shard by shard beside it."""
        stage = NearDedup(embeddings=embeddings, threshold=self.threshold)
        nested = StageFolder(storage.join(folder.scratch, "near_dedup"), "near_dedup")
        if read_stage(nested) is None:
            stage.run(inputs, nested, engine)
            receipts = finished_shards(nested).values()
            finish_stage(stage, nested, "", receipts, expected_rows=inputs.pool.num_rows)
        return open_outputs(stage, nested)[DECISIONS]


@dataclass(frozen=True)
class _WriteManifest(Reducer[int]):
    stage: Select
    pool: Pool
    once: Pool
    """The same, each id once."""
    folder: StageFolder

    def __call__(self, bucket: int, rows: pa.Table) -> int:
        present = [name for name in MANIFEST_COLUMNS if name in self.pool.columns]
        shard = Shard(self.pool.read(bucket, present), bucket)
        for name in set(MANIFEST_COLUMNS) - set(present):
            shard.emit("manifest", {name: pa.nulls(shard.num_rows, column_type(name))})
        rows = rows.filter(pa.array(self._from_another_flow(bucket, rows)))
        place = pc.index_in(shard.ids, value_set=rows[ID].combine_chunks())
        in_base = pc.less(rows["twin_shard"], 0).take(place)
        reject(shard, np.asarray(pc.fill_null(in_base, False)), "in_base")
        again = pc.invert(pc.is_in(shard.ids, self.once.live_ids(bucket).combine_chunks()))
        reject(shard, np.asarray(pc.or_(pc.is_valid(place), again)), "duplicate_in_union")
        twins = rows["twin"].take(place)
        shard.note("twin", pc.if_else(again, shard.ids, twins))
        commit_shard(self.stage, self.folder, shard)
        return shard.num_rows

    def _from_another_flow(self, bucket: int, rows: pa.Table) -> np.ndarray:
        """(N,) bool: rows whose twin lies in an earlier flow, or in an earlier delivery."""
        own, _ = self.pool.locate(bucket)
        twins = rows["twin_shard"].to_pylist()
        others = [shard < 0 or self.pool.locate(shard)[0] is not own for shard in twins]
        return np.array(others, bool)
