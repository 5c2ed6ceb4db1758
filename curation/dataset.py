"""A data set: a folder of Parquet shards and a manifest, written last.

The manifest is the commit: a folder without `_manifest.json` is not a data set, whatever lies
in it. Its `content_digest` depends on the rows alone, its `files_digest` on the bytes as written:
it is the root of a Merkle tree over the shards, so that one can be checked without the rest.
"""

import contextlib
import gc
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, ValidationError

from curation import merkle, storage
from curation.config import Settings, parse_settings
from curation.digest import Content
from curation.errors import DatasetError, StorageError
from curation.schema import ID, require_columns
from curation.sources.folders import walk
from curation.sources.names import hidden_part, inside, own_folders

logger = logging.getLogger(__name__)

MANIFEST = "_manifest.json"
FORMAT_VERSION = 1


def _inside(name: str) -> str:
    if {"", ".", ".."} & set(name.split("/")) or "\0" in name:
        raise ValueError("a file's name is wanted: shards lie below the folder of their manifest")
    return name


FileName = Annotated[str, AfterValidator(_inside)]


class ShardInfo(Settings):
    """What the manifest says of one shard."""

    name: FileName
    """File name inside the folder."""
    num_rows: int
    """Rows in the shard."""
    num_bytes: int
    """Bytes of the file."""
    sha256: str
    """SHA-256 of the file."""
    content: str
    """Order-free digest of the rows (`curation.digest.Content`), as hex."""
    footer: str | None = None
    """SHA-256 of the file's footer: what says where its pages are, each with a checksum."""
    num_kept: int | None = None
    """For shards of decisions: rows with keep = true."""
    companion: dict[FileName, str] = {}
    """SHA-256 of files that belong to the shard, such as the tar of packed images."""


class Manifest(Settings):
    """The commit of a data set."""

    format_version: int = FORMAT_VERSION
    """Version of this layout."""
    columns: dict[str, str]
    """Name -> Arrow type, in order."""
    num_rows: int
    """Rows in all shards."""
    content_digest: str
    """Depends on the rows alone: not on shards, their order, workers or engine."""
    files_digest: str
    """Depends on every byte as written: the root of the Merkle tree whose leaves are the shards."""
    attributes: dict[str, Any] = {}
    """What is true of the whole: stage, settings, embedding space."""
    shards: tuple[ShardInfo, ...]
    """The shards, in order."""


@dataclass(frozen=True)
class Dataset:
    """A finished data set, opened through its manifest."""

    path: str
    manifest: Manifest

    @classmethod
    def open(cls, path: str) -> "Dataset":
        """Open a finished data set.

        Raises:
            DatasetError: there is no manifest, or it is of another version.
        """
        file = storage.join(path, MANIFEST)
        if not storage.exists(file):
            state = "is unfinished or no data set" if storage.exists(path) else "does not exist"
            raise DatasetError(
                f"{path}: {state} (no {MANIFEST}); run the command that writes it again"
            )
        manifest = _read_manifest(file)
        if manifest.format_version != FORMAT_VERSION:
            raise DatasetError(
                f"{path}: has layout version {manifest.format_version}, this program reads "
                f"{FORMAT_VERSION}; write it again or use the program that wrote it"
            )
        return cls(path, manifest)

    @classmethod
    def is_finished(cls, path: str) -> bool:
        """Whether a folder holds a committed data set."""
        return storage.exists(storage.join(path, MANIFEST))

    @property
    def num_rows(self) -> int:
        """Rows in all shards."""
        return self.manifest.num_rows

    @property
    def num_shards(self) -> int:
        """Number of shards, empty ones included."""
        return len(self.manifest.shards)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self.manifest.columns)

    @property
    def attributes(self) -> dict[str, Any]:
        """What is true of the whole data set."""
        return self.manifest.attributes

    def shard_path(self, index: int) -> str:
        """Path of one shard's file."""
        return storage.join(self.path, self.manifest.shards[index].name)

    @contextlib.contextmanager
    def open_shard(self, index: int) -> Iterator[pq.ParquetFile]:
        """Open one shard's file; a damaged byte is an error where it is read.

        Raises:
            StorageError: the file is missing or damaged.
        """
        path, footer = self.shard_path(index), self.manifest.shards[index].footer
        with storage.open_parquet(path, footer) as file, storage.parquet_errors(path):
            yield file

    def read_shard(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one shard, only the columns asked for.

        Raises:
            SchemaError: a column is missing.
            StorageError: the file is missing or damaged.
        """
        path = self.shard_path(index)
        with self.open_shard(index) as file:
            require_columns(file.schema_arrow, columns or (), path)
            table = file.read(columns=None if columns is None else list(columns))
        expected = self.manifest.shards[index].num_rows
        if table.num_rows != expected:
            raise StorageError(
                f"{path}: holds {table.num_rows} rows where the manifest says {expected}; "
                f"remove {self.path} and run the stage again"
            )
        return table.select(list(columns)) if columns is not None else table

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read all shards into memory: for tests, reports and small sets only."""
        return pa.concat_tables(self.read_shard(i, columns) for i in range(self.num_shards))


def _read_manifest(file: str) -> Manifest:
    """Read a manifest in one go: of thousands of shards, that is a third of the time."""
    try:
        with _no_garbage():
            return Manifest.model_validate_json(storage.read_bytes(file))
    except ValidationError:  # read it again for an error of one line
        return parse_settings(Manifest, storage.read_json(file), file)


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Do not look for garbage among objects that all stay: it takes four times their making."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.parquet"


def write_shard(
    folder: str, index: int, table: pa.Table, *, companion: dict[str, str] | None = None
) -> ShardInfo:
    """Write one shard, whole or not at all; it belongs to a data set once that is committed."""
    name = shard_name(index)
    written = storage.write_parquet(storage.join(folder, name), table)
    num_kept = None
    if "keep" in table.column_names:
        num_kept = sum(chunk.true_count for chunk in table["keep"].chunks)
    return ShardInfo(
        name=name,
        num_rows=table.num_rows,
        num_bytes=written.num_bytes,
        sha256=written.sha256,
        content=Content.of(table).hex(),
        footer=written.footer,
        num_kept=num_kept,
        companion=companion or {},
    )


def commit(
    folder: str,
    schema: pa.Schema,
    shards: Iterable[ShardInfo],
    attributes: dict[str, Any] | None = None,
) -> Dataset:
    """Make written shards a data set: compute the digests and write the manifest."""
    shards = tuple(shards)
    columns = {field.name: str(field.type) for field in schema}
    manifest = Manifest(
        columns=columns,
        num_rows=sum(shard.num_rows for shard in shards),
        content_digest=_content_digest(columns, shards),
        files_digest=files_digest(shards),
        attributes=attributes or {},
        shards=shards,
    )
    storage.write_json(storage.join(folder, MANIFEST), manifest.model_dump(mode="json"))
    return Dataset(folder, manifest)


def write_dataset(
    folder: str,
    tables: Iterable[pa.Table],
    schema: pa.Schema,
    attributes: dict[str, Any] | None = None,
) -> Dataset:
    """Write tables as the shards of a new data set and commit it."""
    infos = [write_shard(folder, i, table.cast(schema)) for i, table in enumerate(tables)]
    return commit(folder, schema, infos, attributes)


def open_foreign(path: str, *, id_column: str = ID) -> Dataset:
    """Open a finished data set, or any Parquet file or folder, at any depth, as if it were one.

    Foreign shards carry no digests until they are read: their sizes stand in for content.

    Raises:
        DatasetError: no Parquet files there, or the id column is missing.
    """
    if Dataset.is_finished(path):
        return Dataset.open(path)
    folder, names = _foreign_files(path)

    def look(name: str) -> tuple[ShardInfo, dict[str, str]]:
        return _foreign_shard(folder, name, id_column)

    looks = storage.gather(look, names, folder)
    shards = tuple(info for info, _ in looks)
    columns = looks[0][1]
    return Dataset(
        folder,
        Manifest(
            columns=columns,
            num_rows=sum(shard.num_rows for shard in shards),
            content_digest=_content_digest(columns, shards),
            files_digest=files_digest(shards),
            attributes={"foreign": True},
            shards=shards,
        ),
    )


def _foreign_shard(folder: str, name: str, id_column: str) -> tuple[ShardInfo, dict[str, str]]:
    """What the footer says of a foreign file, and its columns."""
    path = storage.join(folder, name)
    with storage.open_parquet(path) as file:
        schema, num_rows = file.schema_arrow, file.metadata.num_rows
    require_columns(schema, [id_column], path)
    size = storage.size_of(path)
    stamp = hashlib.blake2b(f"{name} {size} {num_rows}".encode(), digest_size=32).hexdigest()
    info = ShardInfo(name=name, num_rows=num_rows, num_bytes=size, sha256=stamp, content=stamp)
    return info, {field.name: str(field.type) for field in schema}


def _foreign_files(path: str) -> tuple[str, list[str]]:
    if path.endswith(".parquet") and storage.exists(path):
        folder, _, name = path.rpartition("/")
        return folder or ".", [name]
    files, left_out = _walk_foreign(path)
    names = [name for name in files if name.lower().endswith(".parquet")]
    arrays = next((name for name in files if name.endswith((".npy", ".npz"))), None)
    if arrays is not None:
        raise DatasetError(
            f"{path}: holds NumPy arrays ({arrays}), which are not read; write their rows into "
            "Parquet, with a column of ids and one of lists"
        )
    if left_out:
        logger.warning("%s: left out: %s", path, left_out)
    if not names:
        state = "no Parquet files in this folder" if storage.exists(path) else "does not exist"
        raise DatasetError(f"{path}: {state}; name a data set or a folder of Parquet files")
    return path, names


def _walk_foreign(path: str) -> tuple[list[str], str]:
    """Names of files below a folder, and what is left out, as ingest has it."""
    if not storage.exists(path):
        return [], ""
    left_out = Counter[str]()
    found = walk(path, left_out)
    own = own_folders(found)
    hidden = {name for name in found if inside(name, own) or hidden_part(name)}
    odd = {name for name, info in found.items() if info.size < 0} - hidden
    left_out += Counter({"hidden or our own output": len(hidden), "no regular files": len(odd)})
    told = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))
    return sorted(set(found) - hidden - odd), told


def _content_digest(columns: dict[str, str], shards: tuple[ShardInfo, ...]) -> str:
    total = Content.merge(Content.from_hex(shard.content) for shard in shards)
    return total.digest(columns)


def files_digest(shards: Sequence[ShardInfo]) -> str:
    """The root of the Merkle tree over the files of all shards."""
    return merkle.root([leaf_of(shard) for shard in shards])


def leaf_of(shard: ShardInfo) -> str:
    """What the tree says of one shard: a line a file, with its name and SHA-256."""
    lines = [f"{shard.name} {shard.sha256}", *map(" ".join, sorted(shard.companion.items()))]
    return "\n".join(lines)
