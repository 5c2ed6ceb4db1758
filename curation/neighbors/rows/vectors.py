"""Embeddings as arrays: read from side-cars, checked for their space, scored exactly.

N rows, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.dataset import Dataset
from curation.errors import ConfigError, SchemaError, SpaceError
from curation.neighbors.kernels.id_hashes import hash_ids, share_bound
from curation.pool import Pool
from curation.schema import ID, ids_to_bytes
from embedder.rows import largest_of, leveled, unit_rows

_SIZES = ("original_width", "original_height", "num_bytes")
_PAIRS_AT_ONCE = 1 << 8
"""Few enough to stay in the cache."""


@dataclass(frozen=True)
class VectorSource:
    """Where the vectors of one pool or set lie."""

    pool: Pool
    layer: str
    column: str = "embedding"

    @property
    def dataset(self) -> Dataset:
        """The side-car of the embeddings.

        Raises:
            SchemaError: the pool has no such side-car, or the side-car no such column.
        """
        dataset = self.pool.layer(self.layer)
        if self.column not in dataset.columns:
            raise SchemaError(
                f"{dataset.path}: column '{self.column}' is missing; "
                f"found: {', '.join(dataset.columns)}"
            )
        return dataset

    @property
    def row_bytes(self) -> float:
        """Bytes of a row on average, as the side-car stores it."""
        shards = self.dataset.manifest.shards
        return sum(shard.num_bytes for shard in shards) / max(1, self.dataset.num_rows)

    def where(self, index: int) -> str:
        """Path of one shard's vectors."""
        part, local = self.pool.locate(index)
        return part.layer(self.layer).shard_path(local)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and vectors of the live rows of one shard: (N, 16) uint8, (N, D) float16 or 32."""
        table = self.pool.only(self.layer).read(index, [self.column])
        vectors = vectors_of(table[self.column], self.where(index))
        return ids_to_bytes(table[ID], self.where(index)), vectors

    def sizes(self, index: int) -> dict[str, np.ndarray]:
        """Pixels of the original and bytes of the file of the live rows, 0 where unknown."""
        having = [name for name in _SIZES if name in self.pool.columns]
        table = self.pool.read(index, having)
        known = {name: np.asarray(table[name].fill_null(0)).astype(np.int64) for name in having}
        width, height, num_bytes = (known.get(name, np.zeros(len(table), int)) for name in _SIZES)
        return {"pixels": width * height, "num_bytes": num_bytes}

    def live_ids(self, index: int) -> pa.ChunkedArray:
        """Ids of the live rows of one shard.

        Raises:
            SchemaError: one of them is none of ours; names the file.
        """
        ids = self.pool.live_ids(index)
        ids_to_bytes(ids, self.where(index))
        return ids

    def describe(self, row_id: str) -> str:
        """A row as its owner knows it: by the id or the source that it had, and by ours."""
        if "source" in self.dataset.columns:
            for index in range(self.pool.num_shards):
                rows = self.pool.only(self.layer).read(index, ["source"])
                found = rows.filter(pc.equal(rows[ID], row_id))["source"].to_pylist()
                if found:
                    return f"{found[0]!r} ({row_id})"
        return row_id


def vectors_of(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """Turn a list column into (N, D) float16 or float32; a null or empty row becomes NaN.

    Rows of extreme lengths are scaled by powers of two: their cosines are as they were, and all
    that follows may square them.

    Raises:
        SchemaError: not a column of lists of numbers.
        SpaceError: rows of different widths.
    """
    if not _holds_lists(column.type):
        raise SchemaError(f"{where}: embeddings are {column.type}; allowed: lists of floats")
    valid = np.asarray(pc.fill_null(pc.greater(pc.list_value_length(column), 0), False))  # (N,)
    width = _width_of(column, where)
    values = pc.list_flatten(column).combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks)
    flat: np.ndarray = values.to_numpy(zero_copy_only=False)
    rows = _as_floats(flat.reshape(int(valid.sum()), width))  # (V, D)
    if valid.all():
        return rows
    vectors = np.full((len(valid), width), np.nan, rows.dtype)
    vectors[valid] = rows
    return vectors


def _as_floats(rows: np.ndarray) -> np.ndarray:
    """float16 as it is, other numbers as float32, none of which is too large or too small."""
    if rows.dtype == np.float16 or not rows.size:
        return rows.astype(np.float16 if rows.dtype == np.float16 else np.float32)
    wide = rows if rows.dtype == np.float32 else rows.astype(np.float64, copy=False)
    with np.errstate(over="ignore"):  # beside NaN or Inf, of which the row is bad anyway
        return leveled(wide).astype(np.float32, copy=False)


def bad_rows(vectors: np.ndarray) -> np.ndarray:
    """(N,) bool: rows that are all zero, or hold NaN or Inf; they have no direction."""
    if vectors.shape[1] == 0:
        return np.ones(len(vectors), bool)
    top = largest_of(vectors)  # (N,)  NaN and Inf survive a maximum
    return np.asarray(~(np.isfinite(top) & (top > 0)))


def draw_rows(
    ids: np.ndarray, vectors: np.ndarray, share: float, *salts: int | str
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (S,) and places (S,) of the share of the rows with the smallest hash of (salts, id).

    Rows without a direction are left out.
    """
    hashes = hash_ids(ids, *salts)
    drawn = np.flatnonzero(hashes <= share_bound(share))
    drawn = drawn[~bad_rows(vectors[drawn])] if len(drawn) else drawn
    return hashes[drawn], drawn


def exact_similarities(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(N,) float32: cosines of row pairs, summed in float64 and rounded once (guarantee 3).

    left, right: (N, D) float16 or float32, not necessarily unit rows.
    """
    found = np.empty(len(left), np.float32)
    for start in range(0, len(left), _PAIRS_AT_ONCE):
        some = slice(start, start + _PAIRS_AT_ONCE)
        found[some] = np.einsum("nd,nd->n", unit_rows(left[some]), unit_rows(right[some]))
    return found


def exact_matrix(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(N, M) float32: cosines of all rows of two small blocks, summed in float64."""
    return np.asarray(unit_rows(left) @ unit_rows(right).T, np.float32)


def storage_dtype(sources: Sequence[VectorSource]) -> str:
    """float16 where all sources hold float16, else float32."""
    kinds = [source.dataset.manifest.columns[source.column] for source in sources]
    return "float16" if all("halffloat" in kind for kind in kinds) else "float32"


def check_spaces(sources: Sequence[VectorSource], *, assume_same_space: bool) -> None:
    """Refuse to compare embeddings of different spaces.

    Raises:
        SpaceError: two sources name different spaces, or one names none.
    """
    if assume_same_space or len(sources) < 2:
        return
    first = sources[0].dataset
    for source in sources[1:]:
        mine, other = first.attributes.get("space"), source.dataset.attributes.get("space")
        if mine != other or mine is None:
            raise SpaceError(
                f"{source.dataset.path}: embedding space {other or 'unknown'}, but {first.path} "
                f"has {mine or 'unknown'}; embed both alike (curate embed --like), or pass "
                "--assume-same-space if you know that they are"
            )


def check_widths(found: Sequence[tuple[str, int]]) -> int:
    """Give the one width of all vectors; 0 where there are none. found: (path, width) pairs.

    Raises:
        SpaceError: two widths; names both.
    """
    widths = [(where, width) for where, width in found if width]
    for where, width in widths[1:]:
        if width != widths[0][1]:
            raise SpaceError(
                f"{where}: vectors of width {width}, but {widths[0][0]} has width {widths[0][1]}; "
                "all embeddings must come from one encoder"
            )
    return widths[0][1] if widths else 0


def default_threshold(source: VectorSource, given: float | None, purpose: str) -> float:
    """The threshold given, or the encoder's own for a purpose ("dedup" or "leak").

    Raises:
        ConfigError: none given, and the embeddings record none.
    """
    own = source.dataset.attributes.get("thresholds") or {}
    threshold = own.get(purpose) if given is None else given
    if threshold is None:
        raise ConfigError(
            f"{source.dataset.path}: records no '{purpose}' threshold of its encoder; set one "
            "(the paper's are 0.6 for duplicates and 0.45 for leaks, on SSCD)"
        )
    return float(threshold)


def _holds_lists(kind: pa.DataType) -> bool:
    nested = (
        pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    )
    return bool(
        nested and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
    )


def _width_of(column: pa.ChunkedArray, where: str) -> int:
    if pa.types.is_fixed_size_list(column.type):
        return int(column.type.list_size)
    lengths = pc.list_value_length(column)
    bounds = pc.min_max(lengths.filter(pc.greater(lengths, 0))).as_py()
    if bounds["min"] != bounds["max"]:
        raise SpaceError(
            f"{where}: vectors of width {bounds['min']} and of width {bounds['max']}; "
            "all rows must have one width"
        )
    return int(bounds["max"] or 0)
