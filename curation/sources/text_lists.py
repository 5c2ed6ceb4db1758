"""Lists of URLs as text: CSV, TSV, JSON lines and plain text.

They are read a line at a time and written again as Parquet, which is read by row groups: memory
does not grow with a list, and a packed one is unpacked once.

A line ends with LF, CRLF or CR. A line with nothing but white space is no row. A row that cannot be
read (the wrong number of fields, no JSON object) stays a row: its source says `unreadable: ` and
what stood there.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation import storage
from curation.errors import LedgerError, SchemaError
from curation.sources.columns import (
    TEXTS,
    as_text,
    check_columns,
    is_url,
    missing_column,
    repaired,
    required,
)
from curation.unpacking import plain_name, text_of, unpacked_blocks, without_mark

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt")
UNREADABLE = "unreadable: "
"""What the source of a row that cannot be read begins with; no URL does."""

_MAX_LINE_BYTES = 64 << 20
_ROWS_PER_GROUP = 1 << 18
_BYTES_PER_GROUP = 128 << 20
_MOST_SHOWN = 1000
_SWALLOWED_ROWS = 3
"""A quoted field with so many lines that would be rows of the list has lost its closing quote."""
_FIELD = re.compile(r'"[^"]*(?:""[^"]*)*"(?=[,\r\n]|\Z)|(?!")[^,\r\n]*')

ODDITIES = ("unreadable_rows", "blank_lines", "lines_in_fields", "repaired_values")
"""Counts of a `ListTally` that are worth a figure."""

Row = tuple[str | None, ...]


@dataclass
class ListTally:
    """What a text list holds."""

    rows: int = 0
    """Rows, those that cannot be read among them."""
    unreadable_rows: int = 0
    """Rows that cannot be read."""
    blank_lines: int = 0
    """Lines with nothing but white space."""
    lines_in_fields: int = 0
    """Lines of CSV that go on with a quoted field of the line before."""
    repaired_values: int = 0
    """Texts that were no UTF-8."""
    header_lines: int = 0
    """Lines of the header."""
    first_unreadable: str = ""
    """Where the first row stands that cannot be read, and why."""


def rewrite(
    file: str, out: str, columns: Mapping[str, str], header: Sequence[str]
) -> dict[str, Any]:
    """Write a text list as Parquet with the columns `TEXTS`; give the fields of `ListTally`.

    columns: ours -> the list's. header: names of the columns of a list that has none.

    Raises:
        SchemaError: a column is missing; a quote is never closed; no row can be read.
        LedgerError: the lines that were read are not those that the file has.
    """
    reader = TextList(file, columns, header)
    with storage.open_whole(out) as sink, pq.ParquetWriter(sink, TEXTS) as writer:
        for table in reader.tables(unpacked_blocks(file)):
            writer.write_table(table)
    return asdict(reader.tally)


class TextList:
    """Reads one text list, once."""

    def __init__(self, file: str, columns: Mapping[str, str], header: Sequence[str] = ()) -> None:
        self._file = file
        self._columns = columns
        self._header = list(header)
        self._width = len(header)
        self._url_place = 0
        self._lines = _CountedLines(file)
        self._line = 0
        self.tally = ListTally()

    def tables(self, blocks: Iterable[bytes]) -> Iterator[pa.Table]:
        """The rows, some at a time. blocks: the file's bytes, unpacked, however they are cut."""
        text = text_of(self._lines.count(without_mark(blocks, self._file)))
        batch: list[Row] = []
        flushed = 0
        for row in self._rows(text):
            batch.append(row)
            if len(batch) >= _ROWS_PER_GROUP or self._lines.num_bytes > flushed + _BYTES_PER_GROUP:
                yield self._table(batch)
                batch, flushed = [], self._lines.num_bytes
        if batch:
            yield self._table(batch)
        self._check()

    def _rows(self, text: Iterable[str]) -> Iterator[Row]:
        name = plain_name(self._file)
        if name.endswith(".csv"):
            return self._fields(self._csv_records(text))
        if name.endswith(".tsv"):
            return self._fields(self._tsv_records(text))
        return self._json_rows(text) if name.endswith(("jsonl", "ndjson")) else self._urls(text)

    def _urls(self, text: Iterable[str]) -> Iterator[Row]:
        for line in self._not_blank(text):
            yield line.strip(), None, None, None

    def _not_blank(self, text: Iterable[str]) -> Iterator[str]:
        for line in text:
            self._line += 1
            if line.isspace():
                self.tally.blank_lines += 1
            else:
                yield line

    # --- fields ---------------------------------------------------------------------------------

    def _fields(self, records: Iterator[tuple[list[str], str]]) -> Iterator[Row]:
        """The columns that we know, of records of fields and their text."""
        header = self._header
        if not header:
            first = next(records, None)
            if first is None:
                return
            header = [repaired(name, "") for name in first[0]]
            self.tally.header_lines = self._line - self.tally.blank_lines
        check_columns(self._file, header, self._columns, is_header=not self._header)
        self._width = len(header)
        places = {name: place for place, name in enumerate(header)}
        self._url_place = places[self._columns["url"]]
        pick = itemgetter(*(places.get(self._columns[ours], -1) for ours in TEXTS.names))
        for fields, text in records:
            if len(fields) == self._width:
                fields.append(None)  # type: ignore[arg-type]  # what columns that are absent pick
                yield pick(fields)
            else:
                yield self._unreadable(text, f"has {len(fields)} fields, not {self._width}")

    def _tsv_records(self, text: Iterable[str]) -> Iterator[tuple[list[str], str]]:
        for line in self._not_blank(text):
            yield line.rstrip("\r\n").split("\t"), line

    def _csv_records(self, text: Iterable[str]) -> Iterator[tuple[list[str], str]]:
        tape: list[str] = []
        reader = csv.reader(_recorded(text, tape), strict=True)
        with _field_limit(_MAX_LINE_BYTES):
            while True:
                tape.clear()
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error:
                    fields = self._read_leniently(tape)
                self._line += len(tape)
                if len(tape) == 1 and tape[0].isspace():
                    self.tally.blank_lines += 1
                    continue
                if len(tape) > 1 and self._width:
                    self._check_swallowed(fields, tape)
                yield fields, tape[0]

    def _read_leniently(self, tape: list[str]) -> list[str]:
        """The fields of a line in which text follows a closing quote.

        Raises:
            SchemaError: a field goes over more than this line.
        """
        lenient = csv.reader([*tape, ""])
        if len(tape) == 1:
            fields = next(lenient)
            if lenient.line_num == 1:
                return fields
        raise self._open_quote(tape)

    def _check_swallowed(self, fields: list[str], tape: list[str]) -> None:
        """Count the lines that a record goes on for.

        Raises:
            SchemaError: they are rows of the list, taken for text by a quote that stands alone.
        """
        self.tally.lines_in_fields += len(tape) - 1
        rows = sum(_is_row(line, self._width, self._url_place) for line in tape[1:-1])
        if len(fields) != self._width or rows >= _SWALLOWED_ROWS:
            self._line -= len(tape)
            raise self._open_quote(tape)

    def _open_quote(self, tape: list[str]) -> SchemaError:
        """The error of a quote that swallows lines. tape: the record's lines, as far as read."""
        line = self._line + 1 + _lines_before_open_quote("".join(tape))
        return SchemaError(
            f"{self._file}: line {line}: a quoted field begins here that does not end as one up "
            f"to line {self._line + len(tape)}; double the quotes inside quoted fields"
        )

    # --- JSON lines -----------------------------------------------------------------------------

    def _json_rows(self, text: Iterable[str]) -> Iterator[Row]:
        wanted = [self._columns[ours] for ours in TEXTS.names]
        missing, names = required(self._columns), set[str]()
        for line in self._not_blank(text):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                names = names or set(value)
                if missing:
                    missing -= {ours for ours in missing if self._columns[ours] in value}
                yield tuple([as_text(value.get(name)) for name in wanted])
            else:
                yield self._unreadable(line, "is no JSON object")
        for ours in sorted(missing) if names else ():
            raise missing_column(self._file, sorted(names), ours, self._columns[ours])

    # --- accounts -------------------------------------------------------------------------------

    def _unreadable(self, text: str, why: str) -> Row:
        self.tally.unreadable_rows += 1
        self.tally.first_unreadable = self.tally.first_unreadable or f"line {self._line} {why}"
        return UNREADABLE + text.strip()[:_MOST_SHOWN], None, None, None

    def _table(self, batch: list[Row]) -> pa.Table:
        self.tally.rows += len(batch)
        columns = zip(TEXTS.names, zip(*batch, strict=True), strict=True)
        return pa.table([self._column(name, values) for name, values in columns], schema=TEXTS)

    def _column(self, name: str, values: Sequence[str | None]) -> pa.Array:
        try:
            return pa.array(values, pa.string())
        except UnicodeEncodeError:
            mended = [value and repaired(value, name) for value in values]
            pairs = zip(values, mended, strict=True)
            self.tally.repaired_values += sum(old != new for old, new in pairs)
            return pa.array(mended, pa.string())

    def _check(self) -> None:
        """Compare what was read with a count of the file's lines that knows nothing of rows.

        Raises:
            LedgerError: they differ.
            SchemaError: no row can be read.
        """
        tally = self.tally
        read = tally.rows + tally.blank_lines + tally.lines_in_fields + tally.header_lines
        if read != self._lines.num_lines:
            raise LedgerError(
                f"{self._file}: has {self._lines.num_lines} lines, {read} were read; please report"
            )
        if tally.rows and tally.rows == tally.unreadable_rows:
            raise SchemaError(f"{self._file}: no row can be read: {tally.first_unreadable}")


class _CountedLines:
    """Counts the lines of a file in its bytes."""

    def __init__(self, file: str) -> None:
        self._file = file
        self.num_bytes = 0
        self.num_lines = 0

    def count(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Pass blocks on, and count their lines.

        Raises:
            SchemaError: a line is too long to be a row.
        """
        last, length = b"", 0
        for block in filter(None, blocks):
            self.num_bytes += len(block)
            self.num_lines += _num_ends(block) - (last == b"\r" and block.startswith(b"\n"))
            end = max(block.rfind(b"\n"), block.rfind(b"\r"))
            length = length + len(block) if end < 0 else len(block) - end - 1
            if length > _MAX_LINE_BYTES:
                raise SchemaError(
                    f"{self._file}: line {self.num_lines + 1} is longer than "
                    f"{_MAX_LINE_BYTES >> 20} MiB; is this a list with a row a line?"
                )
            last = block[-1:]
            yield block
        self.num_lines += last not in (b"", b"\n", b"\r")


def _num_ends(text: bytes) -> int:
    return text.count(b"\n") + text.count(b"\r") - text.count(b"\r\n")


def _recorded(lines: Iterable[str], tape: list[str]) -> Iterator[str]:
    for line in lines:
        tape.append(line)
        yield line


@contextmanager
def _field_limit(limit: int) -> Iterator[None]:
    """The csv module's cap on a field is one for the process."""
    before = csv.field_size_limit(limit)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _is_row(line: str, width: int, url_place: int) -> bool:
    """Whether a line by itself would be a row: as many fields, a URL in its place."""
    fields = line.split(",")
    return len(fields) == width and is_url(fields[url_place])


def _lines_before_open_quote(record: str) -> int:
    """Lines of a record before the one with its first quote that no quote closes.

    Where all are closed: before its first field that goes over more than a line.
    """
    place, long = 0, None
    while field := _FIELD.match(record, place):
        if long is None and set(field[0]) & {"\n", "\r"}:
            long = place
        if field.end() >= len(record):
            place = long or 0
            break
        place = field.end() + 1
    return _num_ends(record[:place].encode("utf-8", "surrogatepass"))
