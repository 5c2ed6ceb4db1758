"""Rows of several sets with one id: the same image, or different ones, which may not meet.

An id is made from its source. A URL is the same row wherever it is listed, though it may answer
with another picture; a file's id is made from its set's name and its path, so folders whose names
are equal may give equal ids to different images.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation import storage
from curation.dataset import ShardInfo, commit, write_shard
from curation.errors import DatasetError
from curation.exchange import Reducer
from curation.key_dedup import KeyDuplicates
from curation.neighbors.rows.vectors import bad_rows, exact_similarities, vectors_of
from curation.pool import UnionPool
from curation.schema import ID, KEEP, schema_of
from curation.stage import Engine

_URL = "^https?://"
_SAME_COSINE = 0.99
"""Vectors of one image, embedded on two kinds of device, are nearer than this."""


@dataclass(frozen=True)
class SameIds:
    """Looks for ids that several sets hold."""

    pool: UnionPool
    """The sets, in order of precedence."""
    column: str
    """What tells whether two rows show one image: its `pixel_hash`, or its vector."""

    def without_repeats(self, engine: Engine, folder: str) -> UnionPool:
        """The rows of all sets, each id once: that of the first set that holds it.

        Raises:
            DatasetError: two sets hold an id for different images, or one set holds it twice.
        """
        order = (("shard", "ascending"),)
        finder = KeyDuplicates(self.pool, ID, (), order)
        found = finder.run(engine, storage.join(folder, "same-ids"), _Compare(self, folder))
        clashes = [result["clash"] for result in found if result["clash"]]
        if clashes:
            raise DatasetError(self._describe(*clashes[0]))
        infos = [ShardInfo.model_validate_json(result["info"]) for result in found]
        once = commit(folder, schema_of([ID, KEEP]), infos)
        return replace(self.pool, decisions=once)

    def rows(self, shard: int, ids: pa.ChunkedArray) -> pa.Table:
        """Source and image of some rows of a shard, in the order of their ids given."""
        known = [name for name in ("source", self.column) if name in self.pool.columns]
        table = self.pool.read(shard, known)
        return table.take(pc.index_in(ids, value_set=table[ID].combine_chunks()))

    def clash(self, shard: int, twin_shard: int, ids: pa.ChunkedArray) -> str | None:
        """The first of some ids that stand for different images in two shards."""
        mine, other = self.rows(shard, ids), self.rows(twin_shard, ids)
        if self.pool.locate(shard)[0] is self.pool.locate(twin_shard)[0]:
            return str(ids[0])  # in one set an id may stand once, whatever it shows
        differ = ~_same_images(mine[self.column], other[self.column])
        if "source" in mine.column_names:
            is_url = pc.match_substring_regex(mine["source"], _URL)
            differ &= ~np.asarray(pc.fill_null(is_url, False))
        return str(ids[int(differ.argmax())]) if differ.any() else None

    def _describe(self, row_id: str, shard: int, twin_shard: int) -> str:
        ids = pa.chunked_array([[row_id]], pa.string())
        row = self.rows(shard, ids)
        source = f" ({row['source'][0]})" if "source" in row.column_names else ""
        one, other = (self._where(number) for number in (twin_shard, shard))
        if one == other:
            return f"{one}: id {row_id}{source} occurs twice; ids must be unique within a set"
        return (
            f"{one} and {other}: both hold id {row_id}{source}, for different images; the id of a "
            "file is made from its set's name and its path: make one of them again with another "
            "--set-name"
        )

    def _where(self, shard: int) -> str:
        part, _ = self.pool.locate(shard)
        return next(iter(part.layers.values())).path


@dataclass(frozen=True)
class _Compare(Reducer[dict[str, Any]]):
    """Compares the rows of one shard with those of earlier ones under the same ids."""

    sets: SameIds
    folder: str

    def __call__(self, bucket: int, rows: pa.Table) -> dict[str, Any]:
        ids = self.sets.pool.live_ids(bucket)
        keep = pc.invert(pc.is_in(ids, value_set=rows[ID].combine_chunks()))
        info = write_shard(self.folder, bucket, pa.table([ids, keep], schema_of([ID, KEEP])))
        return {"info": info.model_dump_json(), "clash": self._clash(bucket, rows)}

    def _clash(self, shard: int, rows: pa.Table) -> tuple[str, int, int] | None:
        for twin_shard in rows["twin_shard"].unique().to_pylist():
            shared = rows.filter(pc.equal(rows["twin_shard"], twin_shard))[ID]
            row_id = self.sets.clash(shard, twin_shard, shared)
            if row_id is not None:
                return row_id, shard, twin_shard
        return None


def _same_images(mine: pa.ChunkedArray, other: pa.ChunkedArray) -> np.ndarray:
    """(N,) bool: rows that show one image, by a hash or by vectors."""
    if pa.types.is_string(mine.type):
        return np.asarray(pc.fill_null(pc.equal(mine, other), False))
    left, right = vectors_of(mine, "a set"), vectors_of(other, "another set")
    if left.shape != right.shape:  # whoever compares them says so
        return np.ones(len(left), bool)
    comparable = ~(bad_rows(left) | bad_rows(right))  # (N,)
    same: np.ndarray = ~comparable
    same[comparable] = exact_similarities(left[comparable], right[comparable]) > _SAME_COSINE
    return same
