"""The columns of a list of URLs: which it must have, and how their values become text."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from curation.errors import SchemaError
from curation.schema import schema_of

TEXTS = pa.schema([("url", pa.string()), *schema_of(["alt", "page", "license"])])
"""What a list may say of a URL."""
URL_COLUMNS = ("url", "page")
_LIKE_URL = re.compile(r"ur[il]|link|src|href", re.IGNORECASE)
_SCHEMES = ("http://", "https://")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_MOST_NAMED = 20


def required(wanted: Mapping[str, str]) -> set[str]:
    """Those of our columns that a list must have: the URL's, and what was given another name.

    wanted: our column -> the list's.
    """
    return {ours for ours, theirs in wanted.items() if ours == "url" or theirs != ours}


def check_columns(
    file: str, found: Sequence[str], wanted: Mapping[str, str], *, is_header: bool = False
) -> None:
    """Check that a list has its required columns, and none of those we read twice.

    found: names in the list. is_header: whether they are a line of text, which may be a row.

    Raises:
        SchemaError: names the file and the column.
    """
    for ours, theirs in wanted.items():
        count = found.count(theirs)
        if count > 1:
            raise SchemaError(f"{file}: column '{theirs}' is there {count} times; want one")
        if count == 0 and ours in required(wanted):
            if is_header and any(map(is_url, found)):
                raise _no_header(file, found)
            raise missing_column(file, found, ours, theirs)


def _no_header(file: str, row: Sequence[str]) -> SchemaError:
    names = ",".join(_names_for(row))
    return SchemaError(
        f"{file}: has no header, its first line is a row: {_shown(row)}; name its columns in order "
        f"with columns: [{names}], or --columns {names}"
    )


def missing_column(file: str, found: Sequence[str], ours: str, theirs: str) -> SchemaError:
    """The error about a column that a list lacks; names those that it may be."""
    alike = [name for name in found if ours == "url" and _LIKE_URL.search(name)]
    hint = f", such as {_shown(alike)}" if alike else ""
    return SchemaError(
        f"{file}: no column '{theirs}'; found: {_shown(found)}; name it with {ours}_column{hint}"
    )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(name[:80] for name in names[:_MOST_NAMED])


def _names_for(row: Sequence[str]) -> list[str]:
    """Names for a row's columns: url the first that is one, alt the first that is not."""
    url = next(place for place, value in enumerate(row) if is_url(value))
    alt = 1 if url == 0 else 0
    named = {url: "url", alt: "alt"}
    return [named.get(place, f"column{place + 1}") for place in range(len(row))]


def is_url(text: str) -> bool:
    """Whether a text begins as a web address does."""
    return text.startswith(_SCHEMES)


def as_text(value: Any) -> str | None:
    """A value as text: text stays, null stays null, all else becomes its JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return json.dumps(value, ensure_ascii=False, default=str)


def repaired(text: str, column: str) -> str:
    """Text without lone surrogates, which are bytes that were no UTF-8 (`surrogateescape`) or junk.

    Such a byte in a URL is escaped: the server gets it as it was. Other text is then read as
    Windows-1252, as browsers read what names no encoding.
    """
    if column in URL_COLUMNS:
        text = _ESCAPED_BYTE.sub(lambda found: f"%{ord(found[0]) - 0xDC00:02X}", text)
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("cp1252", "replace")
