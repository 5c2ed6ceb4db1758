"""Reads URL lists, web archives or images, gives every row its id, and drops repeated sources.

Rows are exchanged by ranges of their ids: shard i holds the i-th range, sorted by id. Ids are
uniform, so the URLs of one host spread over all shards, which is kind to hosts; a row is found by
its id alone, and the shards do not depend on how the input was cut.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from curation import storage
from curation.archives import archive_files, extract_images
from curation.digest import digest_of
from curation.errors import ConfigError, LedgerError, StageError
from curation.exchange import Exchange, Mapper, Reducer, bucket_of_ids
from curation.identity import NORMALIZATION_VERSION, file_source, normalize_url
from curation.ledger import commit_shard
from curation.pool import Pool
from curation.schema import (
    ID,
    SOURCE_COLUMNS,
    ids_from_bytes,
    ids_to_bytes,
    make_id,
    schema_of,
)
from curation.sources.columns import TEXTS
from curation.sources.images import ImageFiles, write_members
from curation.sources.lists import UrlList, report_lists
from curation.sources.names import shown
from curation.sources.pieces import Piece
from curation.sources.references import MAX_BYTES, read_references
from curation.sources.references import REASONS as READ_REASONS
from curation.sources.text_lists import ListTally, rewrite
from curation.stage import (
    DatasetStage,
    Engine,
    Figures,
    Resources,
    Shard,
    StageFolder,
    StageInputs,
    Task,
    reject,
)
from curation.url_lists import UrlLists

progress = logging.getLogger("curation.progress")

_URL_COLUMNS = ("source", "alt", "page", "license", "crawled_at")


class Ingest(DatasetStage):
    """Where rows come from: give `urls`, `archives` or `images`."""

    version = 3

    urls: str | None = None
    """A list of URLs or a folder of lists: Parquet, CSV, TSV, JSON lines or text."""
    archives: str | None = None
    """A WARC or WAT file or a folder of them: the images that their pages show."""
    images: str | None = None
    """A folder of image files, tars and Parquet with image bytes; packed shards; a work folder."""
    image_column: str | None = None
    """Column of the images in Parquet files; null finds it."""
    max_bytes: int = Field(MAX_BYTES, ge=1)
    """Image files of more bytes are not read."""
    source_set: str = "web"
    """Name of the set; part of the id of images."""
    url_column: str = "url"
    """Column of the URL in the list."""
    alt_column: str = "alt"
    """Column of the alternative text, if the list has it."""
    page_column: str = "page"
    """Column of the page that showed the image, if the list has it."""
    license_column: str = "license"
    """Column of the license, if the list has it."""
    columns: tuple[str, ...] = ()
    """Names of the columns of CSV and TSV lists without a header, in order."""
    rows_per_shard: int = 10_000
    """About how many rows lie in one shard; it does not change the content."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read only a uniform sample of about so many rows, the same every time; null: all."""
    lists: UrlLists = UrlLists()
    """Schemes, domains and URLs that pass; not asked about images."""
    forgotten: tuple[str, ...] = ()
    """Files of ids, one a line, that `curate forget` took out of earlier builds."""

    reasons = (
        *("bad_source", "scheme", "url_list:NAME", "not_allowed"),
        *("duplicate_source", "in_base", "forgotten", *READ_REASONS),
    )
    compares_with_previous = True

    @model_validator(mode="after")
    def _one_source(self) -> "Ingest":
        given = [one for one in (self.urls, self.archives, self.images) if one is not None]
        if len(given) != 1:
            raise ValueError("give either 'urls', 'archives' or 'images'")
        if self.rows_per_shard < 1:
            raise ValueError("'rows_per_shard' must be at least 1")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError("'columns' names a column twice")
        return self

    def outputs(self) -> dict[str, pa.Schema]:
        """URLs with what the list knows of them, or images with their bytes."""
        rows = (ID, *SOURCE_COLUMNS)
        if self.images is not None:
            return {"rows": schema_of(rows), "raw": schema_of((*rows, "raw"))}
        known = _URL_COLUMNS[1:] if self.archives is not None else _URL_COLUMNS[1:-1]
        return {"rows": schema_of((*rows, *known))}

    def fingerprint(self) -> str:
        """Names and sizes of the input files, and for local ones the time of their last change."""
        parts = (NORMALIZATION_VERSION, self._stamps(), self.lists.fingerprint())
        return digest_of(*parts, self.forgotten_ids()) if self.forgotten else digest_of(*parts)

    def _stamps(self) -> list[tuple[str, str]]:
        """Each input file, and what changes when it does."""
        if self.images is not None:
            found = self._image_files().find()
            return [(shown(found.path(name)), stamp) for name, stamp in found.stamps.items()]
        if self.archives is not None:
            files = set(archive_files(self.archives))
        else:
            files = set(self._url_list("").files().all)
        return [(shown(file), storage.stamp_of(file)) for file in sorted(files)]

    def forgotten_ids(self) -> list[str]:
        """The ids that stay out, in the order of their files."""
        texts = (storage.read_bytes(file).decode("ascii") for file in self.forgotten)
        return [line for text in texts for line in text.split()]

    def _image_files(self) -> ImageFiles:
        """What images are read from."""
        return ImageFiles(str(self.images), self.image_column)

    def _url_list(self, links: str) -> UrlList:
        """What URLs are read from. links: folder of what archives and text lists hold."""
        names = (self.url_column, self.alt_column, self.page_column, self.license_column)
        columns = dict(zip(TEXTS.names, names, strict=True))
        return UrlList(self.urls or "", columns, self.columns, links)

    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> Figures:
        """Exchange the rows by id, then write a shard a range.

        Raises:
            StageError: there are no rows.
            LedgerError: not all that are listed arrived.
        """
        opened = self._open_list if self.images is None else self._open_images
        source, pieces, figures = opened(storage.join(folder.scratch, "links"), engine)
        known = sum(piece.num_rows for piece in pieces)
        where = self.urls or self.archives or self.images
        if not known:
            raise StageError(f"{where}: no rows there, only empty files")
        share = 1.0 if self.max_rows is None else min(1.0, self.max_rows / known)
        num_shards = max(1, -(-int(known * share) // self.rows_per_shard))
        exchange = Exchange(
            storage.join(folder.scratch, "ingest"), num_shards, Resources(time_limit_s=24 * 3600)
        )
        mapper = _ByIdRange(self, source, num_shards, share)
        writer = _WriteShard(self, folder, num_shards, inputs.base)
        arrived = sum(exchange.run(engine, mapper, pieces, writer))
        if share == 1 and arrived != known:
            raise LedgerError(f"{where}: {known} rows, {arrived} arrived")
        return {"listed_rows": known, "share_read": share, **figures}

    def _open_list(self, links: str, engine: Engine) -> tuple[UrlList, list[Piece], dict[str, Any]]:
        """The list, its pieces, and figures about it."""
        figures = self._read_links(links, engine)
        source = self._url_list(links)
        pieces = source.pieces()
        return source, pieces, {"input_files": len({piece.file for piece in pieces}), **figures}

    def _open_images(
        self, links: str, engine: Engine
    ) -> tuple[ImageFiles, list[Piece], dict[str, Any]]:
        """The same of images; the headers of tars are read first, since their members are rows."""
        source = self._image_files()
        found = source.find()
        read = partial(write_members, found.root)
        tallies = _to_parquet(read, found.tars, links, engine, "ingest (tars)")
        errors = [tally["error"] for tally in tallies if tally["error"]]
        if errors:
            raise ConfigError(errors[0])
        found.left_out += sum((Counter(tally["left_out"]) for tally in tallies), Counter())
        members = [storage.join(links, f"{number:06d}.parquet") for number in range(len(tallies))]
        pieces = source.pieces(found, members)
        progress.info(found.summary())
        return source, pieces, {"input_files": len(found.stamps), "left_out": dict(found.left_out)}

    def _read_links(self, links: str, engine: Engine) -> dict[str, int]:
        """Write what archives and text lists hold as Parquet; give what was met there."""
        if self.archives is not None:
            return self._extract(archive_files(self.archives), links, engine)
        source = self._url_list(links)
        found = source.files()
        read = partial(rewrite, columns=source.columns, header=source.header)
        tallies = _to_parquet(read, found.texts, links, engine, "ingest (lists)")
        return report_lists(found, [ListTally(**tally) for tally in tallies])

    def _extract(self, archives: list[str], links: str, engine: Engine) -> dict[str, int]:
        """Write the links of each archive to a file; give what was found, added up.

        Raises:
            StageError: nothing in any of them can be read.
        """
        tallies = _to_parquet(extract_images, archives, links, engine, "ingest (archives)")
        total = {name: sum(tally[name] for tally in tallies) for name in tallies[0]}
        if total["damaged"] and not total["pages"]:
            raise StageError(f"{self.archives}: no record there can be read; are these WARC files?")
        return total


_Convert = Callable[[str, str], dict[str, Any]]
"""Reads a file, writes its rows to another as Parquet, and gives a tally of what was met."""


def _to_parquet(
    convert: _Convert, files: list[str], folder: str, engine: Engine, label: str
) -> list[dict[str, Any]]:
    """Write each file's rows as Parquet, unless that is done; give the tallies."""
    items = list(enumerate(files))
    done = set(storage.list_files(folder, ".json"))
    waiting = [item for item in items if f"{item[0]:06d}.json" not in done]
    for _ in engine.map(_ToParquet(convert, folder), waiting, label):
        pass
    return [storage.read_json(storage.join(folder, f"{index:06d}.json")) for index, _ in items]


@dataclass(frozen=True)
class _ToParquet(Task[tuple[int, str], None, None]):
    """Writes a file's rows as Parquet; the tally, written last, says that it is whole."""

    convert: _Convert
    folder: str

    def __call__(self, item: tuple[int, str], opened: None) -> None:
        index, file = item
        tally = self.convert(file, storage.join(self.folder, f"{index:06d}.parquet"))
        storage.write_json(storage.join(self.folder, f"{index:06d}.json"), tally)


@dataclass(frozen=True)
class _ByIdRange(Mapper[Piece]):
    """Gives each row of a piece its id."""

    stage: Ingest
    source: UrlList | ImageFiles
    num_shards: int
    share: float
    """Share of the rows to read."""

    def __call__(self, item: Piece) -> tuple[pa.Table, np.ndarray]:
        table = self.source.read(item)
        is_list = isinstance(self.source, UrlList)
        rows = self._from_urls(table) if is_list else self._from_images(table)
        if self.share < 1:
            rows = rows.filter(pa.array(_drawn(rows[ID], self.share)))
        return rows, bucket_of_ids(rows[ID], self.num_shards)

    def _from_urls(self, table: pa.Table) -> pa.Table:
        """Rows with a normalized source, or the raw text and the reason why it is no good."""
        sources, bad = [], []
        for url in table["url"].to_pylist():
            try:
                sources.append(normalize_url(url or ""))
                bad.append("")
            except ValueError:
                sources.append(url or "")
                bad.append("bad_source")
        judged = self.stage.lists.judge(sources, table["page"].to_pylist())
        bad = [reason or listed for reason, listed in zip(bad, judged, strict=True)]
        columns = {name: table[name] for name in _URL_COLUMNS[1:]}
        return pa.table(
            {ID: _ids_of(sources), "source": pa.array(sources, pa.string()), **columns}
        ).append_column("bad", pa.array(bad, pa.string()))

    def _from_images(self, table: pa.Table) -> pa.Table:
        """Rows known by the URL that they came from, where that is known, else by their path."""
        paths = table["path"].to_pylist()
        urls = [_url_or_none(url) for url in table["url"].to_pylist()]
        pairs = list(zip(urls, paths, strict=True))
        ids = _ids_of([url or file_source(self.stage.source_set, path) for url, path in pairs])
        sources = pa.array([url or path for url, path in pairs], pa.string())
        columns = {name: table[name] for name in table.column_names if name not in ("path", "url")}
        bad = pa.array([""] * len(paths), pa.string())
        return pa.table({ID: ids, "source": sources, "bad": bad, **columns})


@dataclass(frozen=True)
class _WriteShard(Reducer[int]):
    """Sorts a range of ids, drops repeated and known sources, and commits the shard."""

    stage: Ingest
    folder: StageFolder
    num_shards: int
    base: tuple[Pool, ...]
    """What earlier deliveries ingested."""

    def __call__(self, bucket: int, rows: pa.Table) -> int:
        # Good rows come before bad ones with the same id, so that no repeat outlives its first.
        order = [name for name in (ID, "bad", *_URL_COLUMNS) if name in rows.column_names]
        rows = rows.sort_by([(name, "ascending") for name in order])
        sets = pa.array([self.stage.source_set] * rows.num_rows, pa.string())
        shard = Shard(rows.append_column("source_set", sets), bucket)
        bad = rows["bad"].to_numpy()
        for reason in sorted(set(bad) - {""}):
            reject(shard, bad == reason, reason)
        reject(shard, _repeats(rows[ID]), "duplicate_source")
        for pool in self.base:
            reject(shard, self._known_to(pool, rows[ID], bucket), "in_base")
        if self.stage.forgotten:
            gone = pa.array(self.stage.forgotten_ids(), pa.string())
            reject(shard, np.asarray(pc.is_in(rows[ID], value_set=gone)), "forgotten")
        if self.stage.images is not None:
            self._read_bytes(shard)
        commit_shard(self.stage, self.folder, shard)
        return int(rows.num_rows)

    def _known_to(self, pool: Pool, ids: pa.ChunkedArray, bucket: int) -> np.ndarray:
        """(N,) bool: rows that a pool has, found in its ranges of ids that overlap this one."""
        first = bucket * pool.num_shards // self.num_shards
        end = -(-(bucket + 1) * pool.num_shards // self.num_shards)
        known = np.zeros(len(ids), bool)
        for index in range(first, end):
            live = pool.live_ids(index).combine_chunks()
            known |= np.asarray(pc.is_in(ids, value_set=live).combine_chunks())
        return known

    def _read_bytes(self, shard: Shard) -> None:
        """Read the images that are alive; those that cannot be read are dropped."""
        alive = shard.alive
        data, failures = read_references(shard.table.filter(alive), self.stage.max_bytes)
        reasons = np.full(shard.num_rows, "", dtype=object)
        reasons[alive] = failures
        for reason in sorted(set(failures) - {""}):
            reject(shard, reasons == reason, reason)
        if not alive.all():
            data = data.take(pa.array(np.cumsum(alive) - 1, mask=~alive))
        shard.emit("raw", {"raw": data})


def _url_or_none(url: str | None) -> str | None:
    try:
        return normalize_url(url) if url else None
    except ValueError:
        return None


def _drawn(ids: pa.ChunkedArray, share: float) -> np.ndarray:
    """(N,) bool: rows of a uniform sample, by the last bytes of their ids.

    The first bytes choose the shard: these must not.
    """
    if len(ids) == 0:
        return np.zeros(0, bool)
    last = np.ascontiguousarray(ids_to_bytes(ids)[:, -4:]).view(">u4")[:, 0]
    return np.asarray(last < share * 2**32)


def _ids_of(sources: list[str]) -> pa.Array:
    if not sources:
        return pa.array([], pa.string())
    raw = bytes.fromhex("".join(make_id(source) for source in sources))
    return ids_from_bytes(np.frombuffer(raw, np.uint8).reshape(-1, 16))


def _repeats(ids: pa.ChunkedArray) -> np.ndarray:
    """(N,) bool: rows whose id equals that of the row before (ids are sorted)."""
    if len(ids) == 0:
        return np.zeros(0, bool)
    same = pc.equal(ids[1:].combine_chunks(), ids[:-1].combine_chunks())
    return np.concatenate([[False], np.asarray(same)])
