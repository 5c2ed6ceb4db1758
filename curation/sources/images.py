"""One reader of images: folders of files, tars, Parquet, packed shards, work folders, manifests.

Everything that takes images finds them here, by the same rules: ingest and what follows it,
pretraining, evaluation, `show`. What is found is listed first; then a *reference* of each image
(its file, or its bytes' place in one) is read, piece by piece; its bytes last, where needed.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation import storage
from curation.dataset import Dataset
from curation.errors import ConfigError, SchemaError, StorageError
from curation.sources.columns import repaired
from curation.sources.folders import Listing, list_files
from curation.sources.names import as_bytes, shown
from curation.sources.pieces import Piece
from curation.sources.places import image_place
from curation.sources.references import REFERENCES, WHOLE
from curation.sources.tables import image_column, no_image_column, read_images, texts
from curation.sources.tars import TarMembers, packing_of, read_members

logger = logging.getLogger(__name__)

_FILES_PER_PIECE = 10_000
_REFERENCES, _PACKED = "references", "packed"
"""Kinds of pieces beside lists of files and row groups of images."""


@dataclass(frozen=True)
class ImageFiles:
    """Images below a path."""

    path: str
    column: str | None = None
    """Of Parquet: the column with the images; null finds it."""

    def find(self) -> Listing:
        """List the files that hold the images.

        Raises:
            DatasetError: there is nothing, or a run or manifest without packed images.
            ConfigError: no images there, or tars that cannot be read by range.
        """
        place = image_place(self.path)
        if Dataset.is_finished(place):
            return _own_files(Dataset.open(place))
        found = list_files(place)
        if found.packed_tars:
            raise _packed_error(found.path(found.packed_tars[0]), len(found.packed_tars))
        return found

    def pieces(self, found: Listing, members: Sequence[str]) -> list[Piece]:
        """Cut into lists of files, row groups, and parts of what the headers of tars say.

        members: files of references that `write_members` made, one a tar.

        Raises:
            ConfigError: no images there.
            SchemaError: there are Parquet files only, and none holds images.
        """
        pieces = [
            Piece(found.root, names=names, num_rows=len(names)) for names in _chunks(found.images)
        ]
        told = storage.gather(_references_of, members, next(iter(members), found.root))
        pieces += [piece for groups in told for piece in groups]
        pieces += self.table_pieces(found, alone=not pieces)
        if not pieces:
            raise ConfigError(found.emptiness())
        return pieces

    def read(self, piece: Piece) -> pa.Table:
        """References (`REFERENCES`) of the images of a piece."""
        if piece.names:
            return self._files(piece)
        with storage.open_parquet(piece.file) as opened, storage.parquet_errors(piece.file):
            if piece.kind == _REFERENCES:
                return opened.read_row_group(piece.row_group)
            if piece.kind == _PACKED:
                return _packed_rows(opened.read_row_group(piece.row_group), piece.file)
            column = image_column(opened.schema_arrow, self.column, piece.file)
            assert column is not None, "only files with one become pieces"
            root = piece.file.removesuffix(piece.name)
            return read_images(opened, piece.row_group or 0, column, root, piece.name)

    def table_pieces(self, found: Listing, *, alone: bool) -> list[Piece]:
        """Row groups of Parquet files with images; others are tables about images.

        Raises:
            SchemaError: they are all there is, and none holds images.
        """
        looked = storage.gather(lambda name: self._groups(found, name), found.tables, found.root)
        held = [groups for groups in looked if not isinstance(groups, SchemaError)]
        errors = [error for error in looked if isinstance(error, SchemaError)]
        if errors and alone and not held:
            raise errors[0]
        found.left_out += Counter(no_images=len(errors))
        return [piece for groups in held for piece in groups]

    def _groups(self, found: Listing, name: str) -> list[Piece] | SchemaError:
        file = found.path(name)
        try:
            with storage.open_parquet(file) as opened:
                return self._groups_of(opened, file, name, is_packed=found.is_packed)
        except StorageError as error:
            if found.is_own or not _is_damage(error):
                raise
            logger.warning("%s; left out", error)
            found.left_out["not_a_table"] += 1
            return []

    def _groups_of(
        self, opened: pq.ParquetFile, file: str, name: str, *, is_packed: bool
    ) -> list[Piece] | SchemaError:
        if is_packed:
            return _row_groups(opened, file, kind=_PACKED)
        if image_column(opened.schema_arrow, self.column, file) is None:
            return no_image_column(opened.schema_arrow, self.column, file)
        return _row_groups(opened, file, name=name)

    def _files(self, piece: Piece) -> pa.Table:
        urls: dict[str, dict[str | None, str | None]] = {}
        rows = []
        for name in piece.names:
            folder, _, file = name.rpartition("/")
            if folder not in urls:
                urls[folder] = _urls_beside(storage.join(piece.file, folder)) if folder else {}
            rows.append((name, urls[folder].get(_stem(file)), storage.join(piece.file, name)))
        names, known, files = zip(*rows, strict=True)
        return _references(names, known, files, [0] * len(rows), [WHOLE] * len(rows))


def write_members(root: str, name: str, out: str) -> dict[str, Any]:
    """Write references to the images of a tar; give what is left out, and what is wrong with it.

    The error is no exception: another try would find the same.
    """
    try:
        table, left_out = tar_references(root, name)
    except ConfigError as error:
        return {"error": str(error), "left_out": {}}
    storage.write_parquet(out, table)
    return {"error": "", "left_out": left_out}


def tar_references(root: str, name: str) -> tuple[pa.Table, dict[str, int]]:
    """References to the images of a tar, and what is left out, by reason.

    Raises:
        ConfigError: the tar is compressed.
    """
    file = storage.join(root, name)
    try:
        found = _scan(file)
    except storage.UnreadableFileError as error:
        logger.warning("%s; left out", error)
        return REFERENCES.empty_table(), {"unreadable": 1}
    if found.damages and not found.num_headers:
        logger.warning("%s: no header of a tar in it; left out", shown(file))
        return REFERENCES.empty_table(), {"not_a_tar": 1}
    if found.damages:
        # Killed writers leave such files; the rest of them is whole.
        logger.warning(
            "%s: damaged or cut at byte %d%s; read what is whole",
            *(shown(file), found.damages[0]),
            f" and {len(found.damages) - 1} more places" if len(found.damages) > 1 else "",
        )
    urls = _urls_beside(file[: -len(".tar")])
    names = [f"{name}/{member.name}" for member in found.images]
    known = [urls.get(_stem(member.name)) for member in found.images]
    offsets = [member.offset for member in found.images]
    sizes = [member.size for member in found.images]
    return _references(names, known, [file] * len(names), offsets, sizes), dict(found.left_out)


def _scan(file: str) -> TarMembers:
    with storage.open_regular(file, by_range=False) as handle:
        packing = packing_of(handle)
        if packing is not None:
            raise _packed_error(f"{file} ({packing})", 1)
        return read_members(handle, handle.seek(0, 2))


def _own_files(dataset: Dataset) -> Listing:
    shards = [shard.name for shard in dataset.manifest.shards]
    stamps = {name: storage.stamp_of(storage.join(dataset.path, name)) for name in shards}
    is_packed = "offset" in dataset.columns
    return Listing(dataset.path, tables=shards, stamps=stamps, is_own=True, is_packed=is_packed)


def _packed_error(file: str, count: int) -> ConfigError:
    more = f" and {count - 1} more" if count > 1 else ""
    return ConfigError(
        f"{shown(file)}{more}: a compressed tar, whose images cannot be read by byte range; unpack "
        "it to a .tar, or move it away"
    )


def _packed_rows(index: pa.Table, file: str) -> pa.Table:
    """References from the index of a packed shard; its tar lies beside it."""
    tar = f"{_stem(file)}.tar"
    columns = (index[name].to_pylist() for name in ("id", "offset", "num_bytes"))
    ids, offsets, sizes = columns
    return _references(ids, [None] * len(ids), [tar] * len(ids), offsets, sizes)


def _references(
    names: Sequence[str],
    urls: Sequence[str | None],
    files: Sequence[str],
    offsets: Sequence[int],
    sizes: Sequence[int],
) -> pa.Table:
    return pa.table(
        [
            pa.array([shown(name) for name in names], pa.string()),
            pa.array(urls, pa.string()),
            pa.array([as_bytes(file) for file in files], pa.binary()),
            pa.array(offsets, pa.int64()),
            # A size that no file can have is as good as any other that is too large.
            pa.array([min(size, 1 << 62) for size in sizes], pa.int64()),
            pa.nulls(len(names), pa.large_binary()),
        ],
        schema=REFERENCES,
    )


def _urls_beside(shard: str) -> dict[str | None, str | None]:
    """URL of each key, from the table that img2dataset lays beside a tar or a folder."""
    table = f"{shard}.parquet"
    if not storage.is_file(table):
        return {}
    try:
        with storage.open_parquet(table) as opened:
            if any(opened.schema_arrow.names.count(name) != 1 for name in ("key", "url")):
                return {}
            known = opened.read(columns=["key", "url"])
    except StorageError as error:
        if not _is_damage(error):
            raise
        logger.warning("%s; its URLs are not known", error)
        return {}
    urls = [None if url is None else repaired(url, "url") for url in texts(known["url"])]
    return dict(zip(texts(known["key"]), urls, strict=True))


def _references_of(file: str) -> list[Piece]:
    with storage.open_parquet(file) as opened:
        return [piece for piece in _row_groups(opened, file, kind=_REFERENCES) if piece.num_rows]


def _is_damage(error: StorageError) -> bool:
    """Whether a Parquet file's bytes are at fault, and not the way to them."""
    return isinstance(error.__cause__, pa.ArrowInvalid)


def _row_groups(
    opened: pq.ParquetFile, file: str, *, name: str = "", kind: str = ""
) -> list[Piece]:
    sizes = (opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups))
    return [Piece(file, i, num_rows=size, name=name, kind=kind) for i, size in enumerate(sizes)]


def _chunks(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for start in range(0, len(names), _FILES_PER_PIECE):
        yield tuple(names[start : start + _FILES_PER_PIECE])


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
