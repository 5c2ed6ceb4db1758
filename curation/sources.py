"""What ingest can read: lists of URLs, folders of images, tars, and Parquet with image bytes.

A source is cut into pieces that one task reads; a piece of images lists references (file, offset,
size), so that bytes are read once, where they are needed, and do not travel with the ids.
"""

import contextlib
import logging
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from curation import storage
from curation.errors import ConfigError, SchemaError
from curation.schema import schema_of

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".jp2", ".ppm"),
)
_LIST_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".txt")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_BYTE_COLUMNS = ("image", "jpg", "png", "webp", "raw", "bytes", "image_bytes")
_FILES_PER_PIECE = 10_000

URLS = pa.schema([("url", pa.string()), *schema_of(["alt", "page", "license", "crawled_at"])])
REFERENCES = pa.schema(
    [
        *(("path", pa.string()), ("url", pa.string()), ("file", pa.string())),
        *(("offset", pa.int64()), ("size", pa.int64())),
    ]
)
INLINE = pa.schema([("path", pa.string()), ("url", pa.string()), ("raw", pa.large_binary())])


@dataclass(frozen=True)
class Piece:
    """A part of a source that one task reads."""

    file: str
    """Path of the file, or of the folder that `names` lie in."""
    row_group: int | None = None
    """For Parquet: which row group."""
    names: tuple[str, ...] = ()
    """For folders of images: relative paths."""
    num_rows: int = 0
    """Rows in the piece, as far as is known before it is read."""


@dataclass(frozen=True)
class UrlList:
    """Lists of URLs: Parquet, CSV, TSV, JSON lines or plain text, also compressed."""

    path: str
    columns: dict[str, str]
    """Our column -> the list's: url, and optionally alt, page, license, crawled_at."""

    def pieces(self) -> list[Piece]:
        """Cut into row groups or files, with their row counts.

        Raises:
            ConfigError: nothing there that is a list of URLs.
        """
        return [piece for file in self._files() for piece in self._pieces_of(file)]

    def read(self, piece: Piece) -> pa.Table:
        """URLs of a piece, with what the list knows of them."""
        table = self._read_table(piece)
        wanted = {ours: theirs for ours, theirs in self.columns.items() if theirs}
        if self.columns["url"] not in table.column_names:
            raise SchemaError(
                f"{piece.file}: no column '{self.columns['url']}'; found: "
                f"{', '.join(table.column_names)}; name it with url_column"
            )
        return pa.table(
            [
                table[wanted[field.name]].cast(field.type)
                if wanted.get(field.name) in table.column_names
                else pa.nulls(table.num_rows, field.type)
                for field in URLS
            ],
            schema=URLS,
        )

    def _files(self) -> list[str]:
        if plain_name(self.path).endswith(_LIST_SUFFIXES):
            if not storage.exists(self.path):
                raise ConfigError(f"{self.path}: no such list of URLs")
            return [self.path]
        names = [
            name
            for name in storage.walk_files(self.path)
            if plain_name(name).endswith(_LIST_SUFFIXES) and not name.startswith("_")
        ]
        if not names:
            raise ConfigError(
                f"{self.path}: no lists of URLs there; allowed: {', '.join(_LIST_SUFFIXES)}, "
                "plain or compressed"
            )
        return [storage.join(self.path, name) for name in names]

    def _pieces_of(self, file: str) -> Iterator[Piece]:
        if not file.endswith(".parquet"):
            yield Piece(file, num_rows=_count_lines(file))
            return
        with storage.open_parquet(file) as opened:
            for group in range(opened.num_row_groups):
                yield Piece(file, group, num_rows=opened.metadata.row_group(group).num_rows)

    def _read_table(self, piece: Piece) -> pa.Table:
        name = plain_name(piece.file)
        if name.endswith(".parquet"):
            with storage.open_parquet(piece.file) as opened, storage.parquet_errors(piece.file):
                present = set(self.columns.values()) & set(opened.schema_arrow.names)
                columns = sorted(present) or None
                return opened.read_row_group(piece.row_group, columns=columns)
        with _open_text(piece.file) as file:
            return self._parse(name, file, piece.file)

    def _parse(self, name: str, file: object, path: str) -> pa.Table:
        try:
            if name.endswith(".jsonl"):
                return pa.json.read_json(file)
            if name.endswith(".txt"):
                lines = file.read().decode("utf-8", "replace").splitlines()  # type: ignore[attr-defined]
                return pa.table({self.columns["url"]: [line for line in lines if line.strip()]})
            tabs = pa.csv.ParseOptions(delimiter="\t" if name.endswith(".tsv") else ",")
            return pa.csv.read_csv(file, parse_options=tabs)
        except pa.ArrowInvalid as error:
            detail = " ".join(str(error).split())
            raise SchemaError(f"{path}: not a readable list: {detail}") from error


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


def plain_name(path: str) -> str:
    """The name without a compression suffix, in lower case."""
    lower = path.lower()
    for suffix in _COMPRESSED:
        lower = lower.removesuffix(suffix)
    return lower


@contextlib.contextmanager
def _open_text(path: str) -> Iterator[Any]:
    """Open a list, unpacked; zstd by Arrow, for which fsspec needs a further package."""
    if path.lower().endswith(".zst"):
        with storage.open_read(path) as file, pa.CompressedInputStream(file, "zstd") as unpacked:
            yield unpacked
        return
    with fsspec.open(path, "rb", compression="infer") as file:
        yield file


def _count_lines(path: str) -> int:
    count, last = 0, b"\n"
    with storage.storage_errors(path), _open_text(path) as file:
        while block := file.read(1 << 22):
            count += block.count(b"\n")
            last = block
    return count + (not last.endswith(b"\n"))
