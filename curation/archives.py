"""Web archives (WARC, and Common Crawl's WAT): the images that their pages show.

An archive is foreign bytes: damaged stretches are skipped and counted, records are read up to a
cap, and what was read leaves in batches, so that no archive fills the memory.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation import storage
from curation.errors import ConfigError
from curation.page_images import (
    MAX_PAGE_BYTES,
    PageImage,
    add_image,
    base_url,
    images_of_html,
    missing_extra,
    srcset_urls,
)
from curation.schema import schema_of
from curation.unpacking import plain_name

SUFFIXES = (".warc", ".wat")
_MAX_WAT_BYTES = 16 << 20
_MAX_DAMAGES = 1000
"""A file with more damaged stretches is given up."""
_ROWS_PER_GROUP = 20_000
_BYTES_PER_GROUP = 32 << 20
_MARKS = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"WARC/1.")
"""What records begin with where a file is packed with gzip, with zstd, or not at all."""
_BLOCK = 1 << 20
_HTML = ("text/html", "application/xhtml+xml")

LINKS = pa.schema([("url", pa.string()), *schema_of(["alt", "page", "crawled_at"])])


@dataclass
class Tally:
    """What was found in an archive."""

    pages: int = 0
    """Pages that were parsed."""
    images: int = 0
    """Images on them; the same image counts once a page."""
    cut_records: int = 0
    """Records that end before their announced length; what there is of them is read."""
    long_pages: int = 0
    """Pages of which only the beginning was read."""
    damaged: int = 0
    """Damaged stretches that were skipped."""


def archive_files(path: str) -> list[str]:
    """The WARC and WAT files at a path: a file or a folder.

    Raises:
        ConfigError: none there.
    """
    if plain_name(path).endswith(SUFFIXES) and storage.exists(path):
        return [path]
    names = [name for name in storage.walk_files(path) if plain_name(name).endswith(SUFFIXES)]
    if not names:
        raise ConfigError(
            f"{path}: no web archives there; they end in {' or '.join(SUFFIXES)}, plain or "
            "compressed"
        )
    return [storage.join(path, name) for name in names]


def extract_images(archive: str, out: str) -> dict[str, int]:
    """Write the images of an archive's pages as Parquet, a row an image and page: `LINKS`.

    Gives the fields of `Tally`.

    Raises:
        ConfigError: the packages that read archives are not installed.
    """
    tally = Tally()
    with storage.open_whole(out) as file, pq.ParquetWriter(file, LINKS) as writer:
        batch: list[dict[str, Any]] = []
        size = 0
        for row in _links(archive, tally):
            batch.append(row)
            size += len(row["url"]) + len(row["alt"] or "") + len(row["page"])
            if len(batch) >= _ROWS_PER_GROUP or size >= _BYTES_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(batch, LINKS))
                batch, size = [], 0
        writer.write_table(pa.Table.from_pylist(batch, LINKS))
    return asdict(tally)


def _links(archive: str, tally: Tally) -> Iterator[dict[str, Any]]:
    with storage.open_read(archive) as file:
        for record in _records(file, tally):
            images = record.images()
            tally.pages += 1
            tally.images += len(images)
            for image in images:
                row = {"url": image.url, "alt": image.alt}
                yield {**row, "page": record.url, "crawled_at": record.crawled_at}


# --- records ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """A page's record."""

    url: str
    crawled_at: datetime | None
    body: bytes
    encoding: str | None
    is_wat: bool

    def images(self) -> list[PageImage]:
        """Images that the page shows."""
        if self.is_wat:
            return images_of_wat(self.body, self.url)
        return images_of_html(self.body, self.url, self.encoding)


def _records(file: IO[bytes], tally: Tally) -> Iterator[_Record]:
    """The pages' records; after a damage reading goes on at the next record's beginning."""
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError as error:
        raise missing_extra(error) from error
    kinds = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.metadata
    mark = _mark_of(file)
    start: int | None = 0
    was_damaged = False
    while start is not None and tally.damaged < _MAX_DAMAGES:
        file.seek(start)
        try:
            for record in ArchiveIterator(file, record_types=kinds):
                start = record.stream_pos
                page = _read_record(record, tally)
                was_damaged = False
                if page is not None:
                    yield page
            return
        except OSError:
            tally.damaged += not was_damaged  # the next attempt may begin inside the same damage
            was_damaged = True
            start = _find(file, mark, start + 1)


def _read_record(record: Any, tally: Tally) -> _Record | None:
    """The record of a page; None for all others.

    Raises:
        OSError: the record is damaged.
    """
    from fastwarc.warc import WarcRecordType

    is_wat = record.record_type == WarcRecordType.metadata
    kind = record.headers.get("Content-Type") or ""
    if is_wat:
        wanted = "json" in kind
    else:
        if record.is_http and (record.http_headers.status_code or 0) // 100 != 2:
            return None
        kind = record.http_headers.get("Content-Type") or "" if record.is_http else kind
        wanted = kind.partition(";")[0].strip().lower() in _HTML
    url = record.headers.get("WARC-Target-URI") or ""
    if not wanted or not url:
        return None
    cap = _MAX_WAT_BYTES if is_wat else MAX_PAGE_BYTES
    body = record.reader.read(cap)
    tally.cut_records += len(body) < min(record.content_length, cap)
    tally.long_pages += record.content_length > cap
    if record.is_http and not is_wat:
        body = _decoded(body, record.http_headers)
    return _Record(
        # Some writers put the URL between < and >.
        url.strip("<> "),
        _time(record.headers.get("WARC-Date")),
        body,
        record.http_charset if record.is_http else None,
        is_wat,
    )


def _decoded(body: bytes, headers: Any) -> bytes:
    """Undo transfer and content encodings, of which Common Crawl keeps the header only."""
    from fastwarc.stream_io import BrotliReader, ChunkedReader, GzipReader, ZstdReader

    readers = {"gzip": GzipReader, "br": BrotliReader, "zstd": ZstdReader, "chunked": ChunkedReader}
    for name in ("Transfer-Encoding", "Content-Encoding"):
        reader = readers.get((headers.get(name) or "").strip().lower().removeprefix("x-"))
        if reader is not None:
            try:
                body = reader(io.BytesIO(body)).read(MAX_PAGE_BYTES)
            except OSError:
                continue  # it is not encoded, whatever the header says
    return body


def _time(text: str | None) -> datetime | None:
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


# --- WAT ----------------------------------------------------------------------------------------


def images_of_wat(body: bytes, url: str) -> list[PageImage]:
    """Images that a WAT record lists; of nonsense, none.

    url: of the page.
    """
    try:
        envelope = json.loads(body)
    except (ValueError, RecursionError):
        return []
    page = _dig(envelope, "Envelope", "Payload-Metadata", "HTTP-Response-Metadata", "HTML-Metadata")
    base = _dig(page, "Head", "Base")
    root = base_url(url, base if isinstance(base, str) else None)
    found: dict[str, PageImage] = {}
    links = _dig(page, "Links")
    for link in links if isinstance(links, list) else []:
        path, value, alt = (_dig(link, key) for key in ("path", "url", "alt"))
        if not isinstance(path, str) or not isinstance(value, str):
            continue
        tag, _, attribute = path.partition("@/")
        if tag != "IMG" or attribute == "longdesc":
            continue
        for one in srcset_urls(value) if attribute.endswith("srcset") else [value]:
            add_image(found, root, one, alt if isinstance(alt, str) else None)
    return list(found.values())


def _dig(value: Any, *keys: str) -> Any:
    """What lies under some keys; None where it does not."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


# --- damages ------------------------------------------------------------------------------------


def _mark_of(file: IO[bytes]) -> bytes:
    """What the records of a file begin with."""
    head = file.read(8)
    return next((mark for mark in _MARKS if head.startswith(mark)), _MARKS[-1])


def _find(file: IO[bytes], mark: bytes, start: int) -> int | None:
    """Offset of the next mark at or after `start`."""
    file.seek(start)
    kept = b""
    while block := file.read(_BLOCK):
        found = (kept + block).find(mark)
        if found >= 0:
            return start - len(kept) + found
        start += len(block)
        kept = block[-(len(mark) - 1) :]
    return None
