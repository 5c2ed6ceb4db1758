"""Lists of URLs: Parquet, CSV, TSV, JSON lines and plain text, also compressed."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from curation import storage
from curation.errors import ConfigError, SchemaError
from curation.schema import schema_of
from curation.sources.pieces import Piece

_LIST_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".txt")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

URLS = pa.schema([("url", pa.string()), *schema_of(["alt", "page", "license", "crawled_at"])])


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
