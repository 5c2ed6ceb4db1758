"""Parquet files whose rows are images: which column holds them, and what each row is called."""

import re
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation import storage
from curation.errors import SchemaError
from curation.sources.columns import as_text, repaired
from curation.sources.names import as_bytes, shown
from curation.sources.references import REFERENCES, WHOLE

_NAMES = ("image", "jpg", "png", "webp", "raw", "bytes", "image_bytes", "content")
_OWN_ID = re.compile("[0-9a-f]{32}")


def image_column(schema: pa.Schema, wanted: str | None, file: str) -> str | None:
    """The column of images: the one asked for, one of a usual name, or the only one of bytes.

    None where there is none.

    Raises:
        SchemaError: any of several may be meant.
    """
    able = [field.name for field in schema if _holds_bytes(field.type)]
    twice = next((name for name in able if schema.names.count(name) > 1), None)
    if twice is not None:
        raise SchemaError(f"{shown(file)}: column '{twice}' is there more than once; want one")
    if wanted is not None:
        return wanted if wanted in able else None
    usual = next((name for name in _NAMES if name in able), None)
    if usual is None and len(able) > 1:
        raise SchemaError(
            f"{shown(file)}: columns {', '.join(able)} hold bytes; name the images' with "
            "image_column"
        )
    return usual or next(iter(able), None)


def no_image_column(schema: pa.Schema, wanted: str | None, file: str) -> SchemaError:
    """The error about a file without images."""
    named = f"'{wanted}' " if wanted else ""
    hint = "" if wanted else "; image_column names it"
    return SchemaError(
        f"{shown(file)}: no column {named}of image bytes, binary or struct<bytes, path>; found: "
        f"{', '.join(schema.names)}{hint}"
    )


def read_images(
    opened: pq.ParquetFile, row_group: int, column: str, root: str, name: str
) -> pa.Table:
    """References of a row group, with the bytes in them: a table of REFERENCES.

    A row is called by its file and its number in it, except where its id is one of ours: those
    stay the same wherever they lie. An image that is a struct with a path alone is that file,
    beside the Parquet file.
    """
    names_there = opened.schema_arrow.names
    known = [one for one in ("id", "url") if one != column and names_there.count(one) == 1]
    table = opened.read_row_group(row_group, columns=[*known, column])
    data, paths = _bytes_and_paths(table[column])
    first = sum(opened.metadata.row_group(group).num_rows for group in range(row_group))
    ids = texts(table["id"]) if "id" in known else [None] * table.num_rows
    names = [
        value if value and _OWN_ID.fullmatch(value) else f"{name}#{first + row}"
        for row, value in enumerate(ids)
    ]
    urls = texts(table["url"]) if "url" in known else [None] * table.num_rows
    folder = str(PurePosixPath(name).parent)
    files = [_beside(folder, path, root) for path in paths] if paths else None
    return pa.table(
        [
            pa.array([shown(one) for one in names], pa.string()),
            pa.array([None if url is None else repaired(url, "url") for url in urls], pa.string()),
            pa.nulls(len(names), pa.binary()) if files is None else pa.array(files, pa.binary()),
            pa.array([0] * len(names), pa.int64()),
            pa.array([WHOLE] * len(names), pa.int64()),
            data,
        ],
        schema=REFERENCES,
    )


def texts(column: pa.ChunkedArray) -> list[str | None]:
    """Values of a column of text, with lone surrogates for bytes that are no UTF-8; else nulls."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return [None] * len(column)
    return [as_text(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _bytes_and_paths(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, list[str | None]]:
    """Bytes of each image, and the path where it has no bytes; no paths where none is needed."""
    if not pa.types.is_struct(column.type):
        return column.cast(pa.large_binary()), []
    chunks = [pa.array([], column.type)] if not column.num_chunks else column.chunks
    data = pa.chunked_array([_field(chunk, "bytes") for chunk in chunks])
    data = data.cast(pa.large_binary())
    if "path" not in [field.name for field in column.type] or not data.null_count:
        return data, []
    paths = texts(pa.chunked_array([_field(chunk, "path") for chunk in chunks]))
    pairs = zip(paths, data.is_null().to_pylist(), strict=True)
    return data, [path if empty else None for path, empty in pairs]


def _field(chunk: Any, name: str) -> pa.Array:
    """A field of structs, null where the struct is."""
    return pc.struct_field(chunk, name)


def _beside(folder: str, path: str | None, root: str) -> bytes | None:
    """The file that a relative path names below the root; a path never leads out of it."""
    if not path or path.startswith("/") or "://" in path or "\0" in path:
        return None
    if ".." in PurePosixPath(path).parts:
        return None
    return as_bytes(storage.join(root, *(() if folder == "." else (folder,)), path))


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )
