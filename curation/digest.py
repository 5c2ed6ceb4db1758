"""Digests of content: the same rows give the same digest, in whatever order and shards they lie.

A row's hash is blake2b-256 over its cells; a table's content is the sum of its rows' hashes
modulo 2^256. Sums commute, so shards are hashed where they are written and merged in any order:
no sort of 1.2 billion rows is needed to compare two builds.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_MODULUS = 1 << 256


@dataclass(frozen=True)
class Content:
    """The order-free digest of some rows."""

    total: int
    """Sum of the row hashes, modulo 2^256."""
    num_rows: int

    @classmethod
    def of(cls, table: pa.Table) -> "Content":
        """Hash the rows of a table."""
        cells = _row_bytes(table)  # (N, W) uint8
        blake = hashlib.blake2b
        total = sum(int.from_bytes(blake(row, digest_size=32).digest(), "little") for row in cells)
        return cls(total % _MODULUS, table.num_rows)

    @classmethod
    def merge(cls, parts: Iterable["Content"]) -> "Content":
        """Content of the union (with repetition) of the parts."""
        parts = list(parts)
        total = sum(part.total for part in parts) % _MODULUS
        return cls(total, sum(part.num_rows for part in parts))

    @classmethod
    def from_hex(cls, text: str) -> "Content":
        """Read what `hex` wrote."""
        return cls(int(text[:64], 16), int(text[64:] or "0", 16))

    def hex(self) -> str:
        """64 hex characters of the sum, then the row count in hex."""
        return f"{self.total:064x}{self.num_rows:x}"

    def digest(self, columns: dict[str, str]) -> str:
        """Digest of the rows together with the names and types of their columns."""
        head = "\n".join(f"{name} {kind}" for name, kind in sorted(columns.items()))
        return hashlib.blake2b(
            f"{head}\n{self.num_rows}\n{self.total:064x}".encode(), digest_size=32
        ).hexdigest()


def digest_of(*parts: Any) -> str:
    """32 hex characters over the text of some plain values: keys of stages and spaces."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _row_bytes(table: pa.Table) -> list[bytes]:
    """Cells of each row as one string of bytes, columns in the order of their names."""
    if table.num_rows == 0:
        return []
    blocks = [_column_bytes(table[name]) for name in sorted(table.column_names)]
    matrix = np.concatenate(blocks, axis=1) if blocks else np.empty((table.num_rows, 0), np.uint8)
    width = matrix.shape[1]
    flat = np.ascontiguousarray(matrix).tobytes()
    return [flat[i : i + width] for i in range(0, len(flat), width)]


def _column_bytes(column: pa.ChunkedArray) -> np.ndarray:
    """(N, W) uint8: a validity byte, then the value or a 16-byte hash of it."""
    valid = np.asarray(pc.is_valid(column)).astype(np.uint8)[:, None]  # (N, 1)
    # Chunk by chunk: joining them would copy a shard's images.
    values = [_value_bytes(chunk) for chunk in column.chunks if len(chunk)]
    return np.concatenate([valid, np.concatenate(values) * valid], axis=1)


def _value_bytes(array: pa.Array) -> np.ndarray:
    kind = array.type
    if pa.types.is_boolean(kind):
        return np.asarray(array.fill_null(False)).astype(np.uint8)[:, None]
    if pa.types.is_fixed_size_list(kind) and array.null_count == 0:
        return _fixed_bytes(array.flatten(), len(array))
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _fixed_bytes(array.fill_null(0), len(array))
    if pa.types.is_temporal(kind):
        return _fixed_bytes(array.cast(pa.int64()).fill_null(0), len(array))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        array = array.cast(pa.large_string()).cast(pa.large_binary())
    if pa.types.is_large_binary(array.type) or pa.types.is_binary(array.type):
        return _hash_values(value or b"" for value in _binary_views(array))
    return _hash_values(repr(value).encode() for value in array.to_pylist())


def _fixed_bytes(values: pa.Array, num_rows: int) -> np.ndarray:
    flat = values.to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat).view(np.uint8).reshape(num_rows, -1)


def _binary_views(array: pa.Array) -> Iterable[memoryview | None]:
    """Bytes of each value without copying images."""
    for scalar in array:
        buffer = scalar.as_buffer()
        yield None if buffer is None else memoryview(buffer)


def _hash_values(values: Iterable[Any]) -> np.ndarray:
    hashes = b"".join(hashlib.blake2b(value, digest_size=16).digest() for value in values)
    return np.frombuffer(hashes, np.uint8).reshape(-1, 16)
