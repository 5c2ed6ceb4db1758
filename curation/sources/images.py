"""Images: folders of files, WebDataset tars, and Parquet with a binary column."""

import logging
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from curation import storage
from curation.errors import ConfigError, SchemaError
from curation.sources.pieces import Piece

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".jp2", ".ppm"),
)
_BYTE_COLUMNS = ("image", "jpg", "png", "webp", "raw", "bytes", "image_bytes")
_FILES_PER_PIECE = 10_000

REFERENCES = pa.schema(
    [
        *(("path", pa.string()), ("url", pa.string()), ("file", pa.string())),
        *(("offset", pa.int64()), ("size", pa.int64())),
    ]
)
INLINE = pa.schema([("path", pa.string()), ("url", pa.string()), ("raw", pa.large_binary())])


@dataclass(frozen=True)
class ImageFiles:
    """Images: a folder of files, of WebDataset tars, or of Parquet with a binary column."""

    path: str

    def pieces(self) -> list[Piece]:
        """Cut into tars, row groups, or lists of files.

        Raises:
            ConfigError: no images there.
        """
        names = [name for name in storage.walk_files(self.path) if not _hidden(name)]
        tars = [name for name in names if name.endswith(".tar")]
        tables = [name for name in names if name.endswith(".parquet")] if not tars else []
        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        if images:  # img2dataset lays tables of what it knows beside the files
            tables = [name for name in tables if self._holds_images(name)]
        pieces = [Piece(storage.join(self.path, name)) for name in tars]
        pieces += [piece for name in tables for piece in self._groups_of(name)]
        pieces += [
            Piece(self.path, names=tuple(chunk), num_rows=len(chunk)) for chunk in _chunks(images)
        ]
        if not pieces:
            raise ConfigError(
                f"{self.path}: no images, tars or Parquet files there; images end in "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        return pieces

    def read(self, piece: Piece) -> pa.Table:
        """Path and, where known, URL of each image; where its bytes are, or those of Parquet."""
        if piece.row_group is not None:
            return self._read_inline(piece)
        rows = self._files(piece) if piece.names else self._tar_members(piece.file)
        return pa.Table.from_pylist(list(rows), schema=REFERENCES)

    def _files(self, piece: Piece) -> Iterator[dict[str, Any]]:
        urls: dict[str, dict[str, str]] = {}
        for name in piece.names:
            folder, _, file = name.rpartition("/")
            if folder not in urls:
                urls[folder] = self._urls_beside(storage.join(self.path, folder)) if folder else {}
            path = storage.join(piece.file, name)
            url = urls[folder].get(_stem(file))
            yield {"path": name, "url": url, "file": path, "offset": 0, "size": -1}

    def _urls_beside(self, shard: str) -> dict[str, str]:
        """URL of each key, from the table that img2dataset lays beside a tar or a folder."""
        table = f"{shard}.parquet"
        if not storage.exists(table):
            return {}
        with storage.open_parquet(table) as opened:
            if not {"key", "url"} <= set(opened.schema_arrow.names):
                return {}
            known = opened.read(columns=["key", "url"])
        return dict(zip(known["key"].to_pylist(), known["url"].to_pylist(), strict=True))

    def _holds_images(self, name: str) -> bool:
        with storage.open_parquet(storage.join(self.path, name)) as opened:
            return bool(set(_BYTE_COLUMNS) & set(opened.schema_arrow.names))

    def _groups_of(self, name: str) -> Iterator[Piece]:
        file = storage.join(self.path, name)
        with storage.open_parquet(file) as opened:
            for group in range(opened.num_row_groups):
                yield Piece(file, group, num_rows=opened.metadata.row_group(group).num_rows)

    def _read_inline(self, piece: Piece) -> pa.Table:
        with storage.open_parquet(piece.file) as opened, storage.parquet_errors(piece.file):
            schema = opened.schema_arrow
            column = next((name for name in _BYTE_COLUMNS if name in schema.names), None)
            if column is None:
                raise SchemaError(
                    f"{piece.file}: no column of image bytes; one of {', '.join(_BYTE_COLUMNS)} "
                    f"is expected, found: {', '.join(schema.names)}"
                )
            key = next((name for name in ("id", "url", "key") if name in schema.names), None)
            read = [column] if key is None else [key, column]
            table = opened.read_row_group(piece.row_group, columns=read)
        relative = piece.file.removeprefix(self.path).lstrip("/")
        keys = [None] * table.num_rows if key is None else table[key].to_pylist()
        names = [
            f"{relative}#{piece.row_group}.{row}" if value is None else str(value)
            for row, value in enumerate(keys)
        ]
        urls = table["url"].cast(pa.string()) if key == "url" else pa.nulls(len(names), pa.string())
        return pa.table([names, urls, table[column].cast(pa.large_binary())], schema=INLINE)

    def _tar_members(self, file: str) -> Iterator[dict[str, Any]]:
        urls = self._urls_beside(file.removesuffix(".tar"))
        relative = file.removeprefix(self.path).lstrip("/")
        try:
            with storage.open_read(file) as handle, tarfile.open(fileobj=handle) as tar:
                for member in tar:
                    if member.isfile() and member.name.lower().endswith(IMAGE_SUFFIXES):
                        path = f"{relative}/{member.name}"
                        where = {"file": file, "offset": member.offset_data}
                        url = urls.get(_stem(member.name))
                        yield {"path": path, "url": url, **where, "size": member.size}
        except tarfile.TarError as error:
            # Killed writers leave such files. Their last image may end early: canonicalize says so.
            logger.warning("%s: ends early or is damaged (%s); read up to there", file, error)


def read_references(references: pa.Table) -> list[bytes]:
    """Bytes of each image, in order; neighbouring ranges of one tar share one open file."""
    out: list[bytes] = []
    columns = (references[name].to_pylist() for name in ("file", "offset", "size"))
    for file, offset, size in zip(*columns, strict=True):
        if size < 0:
            out.append(storage.read_bytes(file))
            continue
        with storage.open_read(file) as handle:
            handle.seek(offset)
            out.append(handle.read(size))
    return out


def _chunks(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), _FILES_PER_PIECE):
        yield names[start : start + _FILES_PER_PIECE]


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))
