"""Reads URL lists or images, gives every row its id, and drops repeated sources.

Rows are exchanged by ranges of their ids: shard i holds the i-th range, sorted by id. So ids lie
near nothing in particular (one host's URLs spread over all shards, which is kind to hosts), a row
is found by its id alone, and the shards do not depend on how the input was cut.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from curation import storage
from curation.digest import digest_of
from curation.exchange import Exchange, Mapper, Reducer, bucket_of_ids
from curation.identity import NORMALISATION_VERSION, file_source, normalise_url
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
from curation.sources import ImageFiles, Piece, UrlList, read_references
from curation.stage import DatasetStage, Engine, Resources, Shard, StageFolder, StageInputs, reject

_URL_COLUMNS = ("source", "alt", "page", "license")


class Ingest(DatasetStage):
    """Where rows come from: give `urls` or `images`."""

    urls: str | None = None
    """A list of URLs or a folder of lists: Parquet, CSV, TSV, JSON lines or text."""
    images: str | None = None
    """A folder of images, of WebDataset tars, or of Parquet files with image bytes."""
    source_set: str = "web"
    """Name of the set; part of the id of images."""
    url_column: str = "url"
    """Column of the URL in the list."""
    alt_column: str = "alt"
    """Column of the alternative text, if the list has it."""
    page_column: str = "page"
    """Column of the page that showed the image, if the list has it."""
    license_column: str = "license"
    """Column of the licence, if the list has it."""
    rows_per_shard: int = 10_000
    """About how many rows lie in one shard; it does not change the content."""

    max_rows: int | None = Field(default=None, ge=1)
    """Read only a uniform sample of about so many rows, the same every time; null: all."""

    reasons = ("bad_source", "duplicate_source", "in_base")
    meets_base = True

    @model_validator(mode="after")
    def _one_source(self) -> "Ingest":
        if (self.urls is None) == (self.images is None):
            raise ValueError("give either 'urls' or 'images'")
        if self.rows_per_shard < 1:
            raise ValueError("'rows_per_shard' must be at least 1")
        return self

    @property
    def source(self) -> UrlList | ImageFiles:
        """What the rows are read from."""
        if self.urls is None:
            return ImageFiles(str(self.images))
        columns = (self.url_column, self.alt_column, self.page_column, self.license_column)
        return UrlList(self.urls, dict(zip(("url", *_URL_COLUMNS[1:]), columns, strict=True)))

    def outputs(self) -> dict[str, pa.Schema]:
        """URLs with what the list knows of them, or images with their bytes."""
        if self.urls is not None:
            return {"rows": schema_of([ID, *SOURCE_COLUMNS, *_URL_COLUMNS[1:]])}
        rows, raw = (ID, *SOURCE_COLUMNS), (ID, *SOURCE_COLUMNS, "raw")
        return {"rows": schema_of(rows), "raw": schema_of(raw)}

    def fingerprint(self) -> str:
        """Names and sizes of the input files, and for local ones the time of their last change."""
        pieces = self.source.pieces()
        files = {piece.file for piece in pieces if not piece.names}
        files |= {storage.join(piece.file, name) for piece in pieces for name in piece.names}
        return digest_of(NORMALISATION_VERSION, [(f, storage.stamp_of(f)) for f in sorted(files)])

    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> dict[str, Any]:
        """Exchange the rows by id, then write a shard a range."""
        pieces = self.source.pieces()
        known = sum(max(piece.num_rows, 1) for piece in pieces)
        share = 1.0 if self.max_rows is None else min(1.0, self.max_rows / known)
        num_shards = max(1, -(-int(known * share) // self.rows_per_shard))
        exchange = Exchange(storage.join(folder.scratch, "ingest"), num_shards, Resources())
        mapper = _ByIdRange(self, num_shards, share)
        exchange.run(engine, mapper, pieces, _WriteShard(self, folder, num_shards, inputs.base))
        files = len({piece.file for piece in pieces})
        return {"input_files": files, "listed_rows": known, "share_read": share}


@dataclass(frozen=True)
class _ByIdRange(Mapper[Piece]):
    """Gives each row of a piece its id."""

    stage: Ingest
    num_shards: int
    share: float
    """Share of the rows to read."""

    def __call__(self, item: Piece) -> tuple[pa.Table, np.ndarray]:
        table = self.stage.source.read(item)
        rows = self._from_urls(table) if self.stage.urls is not None else self._from_images(table)
        if self.share < 1:
            rows = rows.filter(pa.array(_drawn(rows[ID], self.share)))
        return rows, bucket_of_ids(rows[ID], self.num_shards)

    def _from_urls(self, table: pa.Table) -> pa.Table:
        """Rows with a normalised source, or the raw text and bad = true."""
        sources, bad = [], []
        for url in table["url"].to_pylist():
            try:
                sources.append(normalise_url(url or ""))
                bad.append(False)
            except ValueError:
                sources.append(url or "")
                bad.append(True)
        columns = {name: table[name] for name in _URL_COLUMNS[1:]}
        return pa.table(
            {ID: _ids_of(sources), "source": pa.array(sources, pa.string()), "bad": bad, **columns}
        )

    def _from_images(self, table: pa.Table) -> pa.Table:
        paths = table["path"].to_pylist()
        ids = _ids_of([file_source(self.stage.source_set, path) for path in paths])
        columns = {name: table[name] for name in table.column_names if name != "path"}
        return pa.table(
            {ID: ids, "source": table["path"], "bad": np.zeros(len(paths), bool), **columns}
        )


@dataclass(frozen=True)
class _WriteShard(Reducer):
    """Sorts a range of ids, drops repeated and known sources, and commits the shard."""

    stage: Ingest
    folder: StageFolder
    num_shards: int
    base: tuple[Pool, ...]
    """What earlier deliveries ingested."""

    def __call__(self, bucket: int, rows: pa.Table) -> int:
        order = [name for name in (ID, *_URL_COLUMNS) if name in rows.column_names]
        rows = rows.sort_by([(name, "ascending") for name in order])
        sets = pa.array([self.stage.source_set] * rows.num_rows, pa.string())
        shard = Shard(rows.append_column("source_set", sets), bucket)
        reject(shard, rows["bad"].to_numpy(), "bad_source")
        reject(shard, _repeats(rows[ID]), "duplicate_source")
        for pool in self.base:
            reject(shard, self._known_to(pool, rows[ID], bucket), "in_base")
        if self.stage.images is not None:
            shard.emit("raw", {"raw": self._read_bytes(rows)})
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

    def _read_bytes(self, rows: pa.Table) -> pa.Array | pa.ChunkedArray:
        if "raw" in rows.column_names:
            return rows["raw"]
        return pa.array(read_references(rows), pa.large_binary())


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
