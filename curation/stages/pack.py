"""Writes the selected images into tars that training reads by byte range.

A packed shard is a WebDataset tar (`ID.jpg`, `ID.json`) and a Parquet file that says where each
image lies in it, in the tar's order. Faces found earlier are burned in here.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa

from curation import storage
from curation.config import parse_settings
from curation.dataset import Dataset, ShardInfo, commit, write_shard
from curation.ledger import commit_shard, finished_shards
from curation.lost_files import lost_of
from curation.pool import Pool
from curation.schema import ID, column_type, schema_of
from curation.stage import (
    DatasetStage,
    Engine,
    Figures,
    Shard,
    StageFolder,
    StageInputs,
    Task,
    reject,
)
from embedder.errors import ImageError
from embedder.images import blur_boxes, decode, encode_jpeg

INDEX_COLUMNS = (ID, "offset", "num_bytes", "width", "height", "source_set", "seed_set")
_READ = ("image", "width", "height", "source_set")
_BLOCK = tarfile.BLOCKSIZE


class Pack(DatasetStage):
    """Packs what is alive, shard after shard, into tars of about `rows_per_tar` images."""

    rows_per_tar: int = 10_000
    """About how many images lie in one tar."""

    reasons = ("unreadable",)
    on_union = True

    def required_columns(self) -> tuple[str, ...]:
        """The canonical image and what the index says of it."""
        return _READ

    def optional_columns(self) -> tuple[str, ...]:
        """Faces to blur, and the seed set for sampling weights."""
        return ("boxes", "seed_set")

    def run(self, inputs: StageInputs, folder: StageFolder, engine: Engine) -> Figures:
        """Write a tar for each group of shards and commit them as one data set."""
        groups = _group_shards(inputs.pool.shard_rows(), self.rows_per_tar)
        task = _PackGroup(self, inputs.pool, folder)
        infos = _kept_tars(folder, groups)
        waiting = [item for item in enumerate(groups) if item[0] not in infos]
        infos |= {number: info for (number, _), info in engine.map(task, waiting, folder.stage)}
        ordered = [infos[number] for number in range(len(groups))]
        packed = commit(
            folder.output("packed"), schema_of(INDEX_COLUMNS), ordered, {"layout": "tar+index"}
        )
        return {"tars": len(ordered), "images": packed.num_rows, "packed": "packed"}


def _kept_tars(folder: StageFolder, groups: Sequence[tuple[int, ...]]) -> dict[int, ShardInfo]:
    """Tars that this stage finished before it lost others, by number."""
    path = folder.output("packed")
    if not Dataset.is_finished(path):
        return {}
    packed, done = Dataset.open(path), finished_shards(folder)
    lost = lost_of(packed).shards
    whole = [n for n, group in enumerate(groups) if n not in lost and done.keys() >= {*group}]
    return {number: packed.manifest.shards[number] for number in whole}


@dataclass(frozen=True)
class _PackGroup(Task[tuple[int, tuple[int, ...]], None, ShardInfo]):
    stage: Pack
    pool: Pool
    folder: StageFolder

    def __call__(self, item: tuple[int, tuple[int, ...]], opened: None) -> ShardInfo:
        receipt = storage.join(self.folder.scratch, f"tar-{item[0]:05d}.json")
        if storage.exists(receipt):  # finished by a run that was killed later
            return parse_settings(ShardInfo, storage.read_json(receipt), receipt)
        info = self._pack(*item)
        storage.write_json(receipt, info.model_dump(mode="json"))
        return info

    def _pack(self, number: int, shards: tuple[int, ...]) -> ShardInfo:
        root = self.folder.output("packed")
        name = f"shard-{number:05d}.tar"
        columns = [*_READ, *(c for c in self.stage.optional_columns() if c in self.pool.columns)]
        packed: list[Shard] = []
        with storage.open_whole(storage.join(root, name)) as file:
            tar = _TarWriter(file)
            tables = [
                _pack_rows(tar, self.pool.read(index, columns), index, packed) for index in shards
            ]
            tar.finish()
        index_table = pa.concat_tables(tables)
        info = write_shard(root, number, index_table, companion={name: tar.sha256})
        for shard in packed:
            commit_shard(self.stage, self.folder, shard)
        return info


def _pack_rows(tar: "_TarWriter", rows: pa.Table, index: int, packed: list[Shard]) -> pa.Table:
    """Append a shard's images to the tar; give their rows of the index."""
    shard = Shard(rows, index)
    packed.append(shard)
    offsets = np.zeros(rows.num_rows, np.int64)
    sizes = np.zeros(rows.num_rows, np.int64)
    unreadable = np.zeros(rows.num_rows, bool)
    for number, row in enumerate(_rows_of(rows)):
        try:
            data = _burn_in(row)
        except ImageError:
            unreadable[number] = True
            continue
        offsets[number] = tar.add(f"{row[ID]}.jpg", data)
        sizes[number] = len(data)
        tar.add(f"{row[ID]}.json", _describe(row))
    reject(shard, unreadable, "unreadable")
    return _index_table(rows, offsets, sizes).filter(pa.array(~unreadable))


def _rows_of(rows: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in rows.to_batches(max_chunksize=64):
        yield from batch.to_pylist()


def _burn_in(row: dict[str, Any]) -> bytes:
    """The image's bytes, encoded again only where faces must be blurred."""
    image: bytes = row["image"]
    if not row.get("boxes"):
        return image
    return encode_jpeg(blur_boxes(decode(image), row["boxes"]))


def _describe(row: dict[str, Any]) -> bytes:
    wanted = {name: row.get(name) for name in (ID, "source_set", "seed_set", "width", "height")}
    return json.dumps(wanted, sort_keys=True).encode()


def _index_table(rows: pa.Table, offsets: np.ndarray, sizes: np.ndarray) -> pa.Table:
    columns: dict[str, Any] = {"offset": offsets, "num_bytes": sizes}
    for name in INDEX_COLUMNS:
        if name not in columns:
            known = name in rows.column_names
            columns[name] = rows[name] if known else pa.nulls(rows.num_rows, column_type(name))
    return pa.table({name: columns[name] for name in INDEX_COLUMNS}, schema_of(INDEX_COLUMNS))


def _group_shards(rows: np.ndarray, rows_per_tar: int) -> list[tuple[int, ...]]:
    """Neighboring shards that together hold about as many rows as a tar should."""
    groups: list[tuple[int, ...]] = []
    current: list[int] = []
    held = 0
    for index, count in enumerate(rows):
        if current and held + count > rows_per_tar:
            groups.append(tuple(current))
            current, held = [], 0
        current.append(index)
        held += int(count)
    return [*groups, tuple(current)] if current else groups


class _TarWriter:
    """Appends members to a tar, always with the same header for the same member."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._position = 0

    @property
    def sha256(self) -> str:
        """Hash of all that was written."""
        return self._digest.hexdigest()

    def add(self, name: str, data: bytes) -> int:
        """Append one member; give the offset of its data."""
        header = tarfile.TarInfo(name)
        header.size = len(data)
        header.mode = 0o644
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._position
        self._write(data)
        self._write(b"\0" * (-len(data) % _BLOCK))
        return offset

    def finish(self) -> None:
        """Write the end of the archive."""
        self._write(b"\0" * 2 * _BLOCK)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)
