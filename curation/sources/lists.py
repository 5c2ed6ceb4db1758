"""Lists of URLs: which files are lists, and their rows as tables.

Parquet is read by row groups. Text lists are first written again as Parquet (`text_lists`).
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from curation import storage
from curation.errors import ConfigError, LedgerError, SchemaError
from curation.schema import schema_of
from curation.sources.columns import TEXTS, as_text, check_columns, repaired
from curation.sources.folders import told, walk
from curation.sources.names import shown
from curation.sources.pieces import Piece
from curation.sources.text_lists import ODDITIES, TEXT_SUFFIXES, ListTally
from curation.unpacking import plain_name

logger = logging.getLogger(__name__)

_PARQUET = ".parquet"
_SUFFIXES = (_PARQUET, *TEXT_SUFFIXES)
_FIELDS = (".csv", ".tsv")
_MOST_NAMED = 3

URLS = pa.schema([*TEXTS, *schema_of(["crawled_at"])])


@dataclass(frozen=True)
class ListFiles:
    """What lies where lists of URLs are looked for."""

    tables: list[str]
    """Parquet files."""
    texts: list[str]
    """Text lists."""
    left_out: list[str]
    """Files that are no lists by their names, hidden (`.name` and `_name`) or no regular files."""

    @property
    def all(self) -> list[str]:
        """All lists."""
        return [*self.tables, *self.texts]


@dataclass(frozen=True)
class UrlList:
    """Lists of URLs: Parquet, CSV, TSV, JSON lines or plain text, also compressed."""

    path: str
    """A list or a folder of lists; empty: only what lies in `rewritten`."""
    columns: dict[str, str]
    """Our column -> the list's: url, alt, page, license."""
    header: tuple[str, ...] = ()
    """Names of the columns of CSV and TSV lists that have no header."""
    rewritten: str = ""
    """Folder of lists that were written again as Parquet with our columns."""

    def files(self) -> ListFiles:
        """What lies at the path.

        Raises:
            ConfigError: nothing there that is a list of URLs.
        """
        if not self.path:
            return ListFiles([], [], [])
        if not storage.exists(self.path):
            raise ConfigError(f"{self.path}: no such list of URLs")
        if storage.is_local(self.path) and not _is_file_or_folder(self.path):
            raise ConfigError(f"{self.path}: is a pipe or a device; lists are files")
        found = _sorted_out(self.path) if _is_folder(self.path) else _told_apart([self.path])
        if not found.all:
            raise ConfigError(
                f"{self.path}: no lists of URLs there; allowed: {', '.join(_SUFFIXES)}, "
                "the texts plain or compressed"
            )
        nameless = [file for file in found.all if not plain_name(file).endswith(_FIELDS)]
        if self.header and nameless:
            raise ConfigError(
                f"{nameless[0]}: 'columns' is for CSV and TSV lists without a header; leave it out"
            )
        return found

    def pieces(self) -> list[Piece]:
        """The row groups of all Parquet files.

        Raises:
            SchemaError: one has no column of URLs.
        """
        files = [(file, self.columns) for file in self.files().tables]
        names = storage.list_files(self.rewritten, _PARQUET) if self.rewritten else []
        ours = {name: name for name in URLS.names}
        files += [(storage.join(self.rewritten, name), ours) for name in names]
        return [piece for file, columns in files for piece in _row_groups(file, columns)]

    def read(self, piece: Piece) -> pa.Table:
        """URLs of a piece, with what the list knows of them.

        Raises:
            LedgerError: the rows are not as many as the file says.
        """
        is_ours = self.rewritten and piece.file.startswith(self.rewritten)
        columns = {name: name for name in URLS.names} if is_ours else self.columns
        with storage.open_parquet(piece.file) as opened, storage.parquet_errors(piece.file):
            present = sorted(set(columns.values()) & set(opened.schema_arrow.names))
            table = opened.read_row_group(piece.row_group, columns=present)
        if table.num_rows != piece.num_rows:
            raise LedgerError(
                f"{piece.file}: row group {piece.row_group} has {table.num_rows} rows, its footer "
                f"says {piece.num_rows}; write the file again"
            )
        return pa.table(
            [
                _column(table[columns[field.name]], field)
                if columns.get(field.name) in present
                else pa.nulls(table.num_rows, field.type)
                for field in URLS
            ],
            schema=URLS,
        )


def report_lists(found: ListFiles, tallies: list[ListTally]) -> dict[str, int]:
    """Give the figures of all lists; log what is odd in them. tallies: of the texts."""
    pairs = list(zip(found.texts, tallies, strict=True))
    broken = [
        f"{tally.unreadable_rows} in {file}, the first in {tally.first_unreadable}"
        for file, tally in pairs
        if tally.unreadable_rows
    ]
    empty = [file for file, tally in pairs if not tally.rows]
    _warn("left out, as they are no lists by their names, or no regular files", found.left_out)
    _warn("empty lists", empty)
    _warn("rows that cannot be read are dropped as bad_source", broken)
    odd = {"left_out_files": len(found.left_out), "empty_lists": len(empty)}
    for name in ODDITIES:
        odd[name] = sum(getattr(tally, name) for tally in tallies)
    met = {name: count for name, count in odd.items() if count}
    return {"input_files": len(found.all), **met}


def _warn(what: str, cases: list[str]) -> None:
    if cases:
        more = f"; and {len(cases) - _MOST_NAMED} more" if len(cases) > _MOST_NAMED else ""
        logger.warning("%s: %s%s", what, "; ".join(map(shown, cases[:_MOST_NAMED])), more)


def _is_file_or_folder(path: str) -> bool:
    return storage.is_file(path) or storage.local_path(path).is_dir()


def _is_folder(path: str) -> bool:
    """A web server's folders are read from its pages; what is called a list there is no folder."""
    if path.startswith(("http://", "https://")):
        return not plain_name(path).endswith(_SUFFIXES)
    return not storage.is_file(path)


def _sorted_out(folder: str) -> ListFiles:
    """The lists below a folder, linked folders included."""
    troubles = Counter[str]()
    infos = walk(folder, troubles)
    odd = {name for name, info in infos.items() if _hidden(name) or info.size < 0}
    found = _told_apart([storage.join(folder, name) for name in sorted(infos.keys() - odd)])
    found.left_out.extend(storage.join(folder, name) for name in sorted(odd))
    found.left_out.extend(told(Counter({one: count})) for one, count in troubles.items())
    return found


def _told_apart(files: list[str]) -> ListFiles:
    """Tell tables from texts and other files by their names.

    Raises:
        ConfigError: a packed Parquet file.
    """
    found = ListFiles([], [], [])
    for file in files:
        name = plain_name(file)
        if name.endswith(_PARQUET) and not file.lower().endswith(_PARQUET):
            raise ConfigError(f"{file}: Parquet is compressed inside; unpack the file")
        if name.endswith(_PARQUET):
            found.tables.append(file)
        else:
            (found.texts if name.endswith(TEXT_SUFFIXES) else found.left_out).append(file)
    return found


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _row_groups(file: str, columns: dict[str, str]) -> Iterator[Piece]:
    if not storage.size_of(file):
        logger.warning("%s: empty", file)
        return
    with storage.open_parquet(file) as opened:
        check_columns(file, opened.schema_arrow.names, columns)
        kind = opened.schema_arrow.field(columns["url"]).type
        if not _holds_text(kind):
            raise SchemaError(f"{file}: column '{columns['url']}' is {kind}; text is expected")
        for group in range(opened.num_row_groups):
            yield Piece(file, group, num_rows=opened.metadata.row_group(group).num_rows)


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (
        *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null),
    )
    return any(test(kind) for test in tests)


def _column(values: pa.ChunkedArray, field: pa.Field) -> pa.Array | pa.ChunkedArray:
    """A column in our type: what is no text becomes its JSON, what is no UTF-8 is repaired."""
    if field.type != pa.string():
        return values.cast(field.type)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not _holds_text(values.type):
        return pa.array([as_text(value) for value in values.to_pylist()], pa.string())
    raw = values.cast(pa.large_binary())
    try:
        return raw.cast(pa.string())  # which looks at every byte, as text in Parquet need not be
    except pa.ArrowInvalid:
        texts = [as_text(value) for value in raw.to_pylist()]
        return pa.array([text and repaired(text, field.name) for text in texts], pa.string())
