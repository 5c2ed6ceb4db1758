"""Rows of numbers as Arrow's binaries of fixed size, for exchanges, and ids as two numbers."""

import numpy as np
import pyarrow as pa


def pack_rows(rows: np.ndarray) -> pa.Array:
    """(N, W) of any number type as N binaries of equal size, without copying."""
    rows = np.ascontiguousarray(rows)
    size = rows.shape[1] * rows.itemsize
    if size == 0:
        return pa.array([b""] * len(rows), pa.binary(0))
    buffer = pa.py_buffer(rows) if rows.size else pa.py_buffer(b"")
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(rows), [None, buffer])


def unpack_rows(column: pa.ChunkedArray, dtype: str = "uint8") -> np.ndarray:
    """(N, W): what `pack_rows` packed."""
    array = one_chunk(column)
    size = array.type.byte_width
    if size == 0 or len(array) == 0:
        return np.empty((len(array), size // np.dtype(dtype).itemsize), dtype)
    data = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * size :][: len(array) * size]
    return data.view(dtype).reshape(len(array), -1)


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """All values of a column in one array."""
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def id_keys(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers that sort as ids do: (N,) uint64 of the first half, and of the second.

    ids: (N, 16) uint8.
    """
    halves = np.ascontiguousarray(ids).view(">u8").astype(np.uint64)
    return halves[:, 0], halves[:, 1]
