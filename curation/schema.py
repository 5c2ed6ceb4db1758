"""Every column name and its Arrow type, and how rows get their identity."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from curation.errors import SchemaError

ID = "id"
"""32 hex characters: blake2b-128 of the normalized source. 16 bytes inside the joins."""

KEEP = "keep"
REASON = "reason"

_TYPES: dict[str, pa.DataType] = {
    ID: pa.string(),
    # where from
    "source": pa.string(),
    "source_set": pa.string(),
    "alt": pa.string(),
    "page": pa.string(),
    "license": pa.string(),
    "crawled_at": pa.timestamp("ms", tz="UTC"),
    # fetched bytes, deleted once canonicalize has committed
    "raw": pa.large_binary(),
    # canonical image
    "image": pa.large_binary(),
    "width": pa.int32(),
    "height": pa.int32(),
    "original_width": pa.int32(),
    "original_height": pa.int32(),
    "format": pa.string(),
    "num_bytes": pa.int64(),
    "sha256": pa.string(),
    "pixel_hash": pa.string(),
    "phash": pa.string(),
    "phash_quality": pa.int32(),
    # decisions
    "stage": pa.string(),
    KEEP: pa.bool_(),
    REASON: pa.string(),
    "score": pa.float32(),
    "threshold": pa.float32(),
    "component": pa.string(),
    "component_size": pa.int32(),
    "twin": pa.string(),
    "twin_set": pa.string(),
    "similarity": pa.float32(),
    "path": pa.string(),
    # filters
    "short_side": pa.int32(),
    "aspect": pa.float32(),
    "contrast": pa.float32(),
    "entropy": pa.float32(),
    "sharpness": pa.float32(),
    "nsfw_score": pa.float32(),
    "num_faces": pa.int32(),
    "text_share": pa.float32(),
    "seed_similarity": pa.float32(),
    "blocklist": pa.string(),
    "blocked_at": pa.timestamp("ms", tz="UTC"),
    # retrieval
    "seed_set": pa.string(),
    "rule": pa.string(),
    "seed_id": pa.string(),
    "rank": pa.int32(),
    "cluster": pa.int32(),
    # clusters of every level, leaves first; how often a balanced sample draws the row
    "clusters": pa.list_(pa.int32()),
    "draws": pa.int32(),
    # the tree of a balanced sample: a line a cluster
    "level": pa.int32(),
    "parent": pa.int32(),
    "rows": pa.int64(),
    "drawn": pa.int64(),
    # faces: (x0, y0, x1, y1) in pixels of the canonical image
    "boxes": pa.list_(pa.list_(pa.int32(), 4)),
    # fetches: what varies from run to run
    "attempts": pa.int32(),
    "status": pa.string(),
    "final_url": pa.string(),
    "content_type": pa.string(),
    "http_status": pa.int32(),
    "fetched_at": pa.timestamp("ms", tz="UTC"),
    "seconds": pa.float32(),
    # packed shards
    "offset": pa.int64(),
}

DECISION_COLUMNS = (ID, "stage", KEEP, REASON, "score", "threshold")
"""What every decision row has; a stage adds its own columns after these."""

FETCH_COLUMNS = (
    *(ID, "status", "attempts", "http_status", "final_url", "content_type"),
    *("num_bytes", "fetched_at", "seconds"),
)
"""The side-car of what varies from run to run; left out of the content digest."""

SOURCE_COLUMNS = ("source", "source_set")
"""Where a row is from; carried along by what may be handed on alone: raw bytes and images."""

IMAGE_COLUMNS = (
    *(ID, *SOURCE_COLUMNS, "image", "width", "height", "original_width", "original_height"),
    *("format", "num_bytes", "sha256", "pixel_hash", "phash", "phash_quality"),
)


def column_type(name: str) -> pa.DataType:
    """Arrow type of a column, by its name."""
    return _TYPES[name]


def score_type(name: str) -> pa.DataType:
    """Arrow type of what a filter measures: float32 where no column of ours has its name."""
    return _TYPES.get(name, pa.float32())


def schema_of(names: Iterable[str]) -> pa.Schema:
    """Arrow schema of some of our columns, in the order given."""
    return pa.schema([(name, _TYPES[name]) for name in names])


_VALUES_PER_CHUNK = 64


def binary_column(values: list[bytes | None]) -> pa.ChunkedArray:
    """A column of bytes, taken out of the list piece by piece: images are in memory once.

    Each is copied once; Arrow's builder would grow, and copy them again.
    """
    chunks = []
    for start in range(0, len(values), _VALUES_PER_CHUNK):
        part = values[start : start + _VALUES_PER_CHUNK]
        values[start : start + _VALUES_PER_CHUNK] = [None] * len(part)
        chunks.append(_binary_array(part))
    return pa.chunked_array(chunks, pa.large_binary())


def _binary_array(values: Sequence[bytes | None]) -> pa.Array:
    sizes = [0 if value is None else len(value) for value in values]
    offsets = np.cumsum([0, *sizes], dtype=np.int64)
    valid = pa.array([value is not None for value in values], pa.bool_()).buffers()[1]
    data = pa.py_buffer(b"".join(value for value in values if value is not None))
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(values), [valid, pa.py_buffer(offsets), data]
    )


def embedding_schema(width: int) -> pa.Schema:
    """Schema of a set of embeddings: unit rows of float16."""
    return pa.schema(
        [(ID, pa.string()), ("source", pa.string()), ("embedding", pa.list_(pa.float16(), width))]
    )


def decision_schema(own: pa.Schema | None = None) -> pa.Schema:
    """Schema of the decisions of a stage: the columns that all share, then its own."""
    fields = list(schema_of(DECISION_COLUMNS))
    return pa.schema(fields + list(own or ()))


def require_columns(found: pa.Schema, needed: Sequence[str], where: str) -> None:
    """Check that columns are there, with our types where we name one.

    Raises:
        SchemaError: a column is missing, or of a type that cannot be cast.
    """
    missing = [name for name in needed if name not in found.names]
    if missing:
        raise SchemaError(
            f"{where}: column '{missing[0]}' is missing; found: {', '.join(found.names) or 'none'}"
        )


def make_id(normalized_source: str) -> str:
    """32 hex characters of blake2b-128 over the normalized source."""
    return hashlib.blake2b(normalized_source.encode(), digest_size=16).hexdigest()


def ids_to_bytes(ids: pa.Array | pa.ChunkedArray, where: str = "") -> np.ndarray:
    """Turn hex ids into (N, 16) uint8, the form inside the joins. where: the file, for errors.

    Raises:
        SchemaError: an id that is null or not 32 hex characters.
    """
    values = ids.to_pylist()
    try:
        raw = bytes.fromhex("".join(values))
    except (TypeError, ValueError):
        raw = b""
    if len(raw) != 16 * len(ids) or any(len(value) != 32 for value in values):
        row, bad = next((n, value) for n, value in enumerate(values) if not _is_id(value))
        place = f"{where}: " if where else ""
        raise SchemaError(f"{place}id {bad!r} is not 32 hex characters (row {row})")
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, 16)  # (N, 16)


def ids_from_bytes(raw: np.ndarray) -> pa.Array:
    """Turn (N, 16) uint8 back into hex ids."""
    text = np.ascontiguousarray(raw, dtype=np.uint8).tobytes().hex()
    return pa.array([text[i : i + 32] for i in range(0, len(text), 32)], pa.string())


def _is_id(value: object) -> bool:
    hexadecimal = set("0123456789abcdef")
    return isinstance(value, str) and len(value) == 32 and set(value.lower()) <= hexadecimal
