"""Paths and URLs: the one place that touches a file system, local or through fsspec."""

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import os
import stat
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypedDict, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from curation.errors import StorageError
from embedder.errors import one_line

_ROWS_PER_GROUP = 1 << 13
_LOOKED_UP = ("sha256", "pixel_hash", "seed_id")
"""Columns by whose values single rows are looked for: Bloom filters tell where they may be."""
_PARTIAL = ".partial"
_REQUESTS_AT_ONCE = 32
_BLOCK = 1 << 22
"""Bytes of a file that are hashed at once."""
_LAST_WRITES = 8
"""Of so many writes at a file's end Parquet's footer is one."""
_TAIL_BYTES = 1 << 16
"""Read at once at the end of a Parquet file; longer footers take another read."""
_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "azure")
"""Libraries that speak to object stores: they have error trees of their own."""

_OF_ONE_FILE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV),
)
"""Errors of a local file that say nothing of the disk and of other files."""

T = TypeVar("T")
R = TypeVar("R")


class UnreadableFileError(StorageError):
    """A file that is gone, forbidden or no regular file, where others can be read."""


class _Entry(TypedDict, total=False):
    """What a file system says of a file or a folder; stores differ in what they know."""

    name: str
    type: Literal["file", "directory", "other"]
    size: int | None
    mtime: float
    ETag: str
    LastModified: datetime


class FileInfo(NamedTuple):
    """What a listing says of a file."""

    size: int
    """In bytes; -1 of what is no regular file."""
    stamp: str
    """Changes when the file does: its size, and its time or tag where there is one."""


def join(path: str, *names: str) -> str:
    """Join names below a path or URL."""
    return "/".join([path.rstrip("/"), *names])


def is_local(path: str) -> bool:
    """Whether the path lies on this machine's file system."""
    return "://" not in path or path.startswith("file://")


def full_path(path: str) -> str:
    """The path as its file system names it, from the root on."""
    fs, inner = _resolve(path)
    return inner if is_local(path) else str(fs.unstrip_protocol(inner))


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    fs, inner = _resolve(path)
    with storage_errors(path):
        return bool(fs.exists(inner))


def is_file(path: str) -> bool:
    """Whether a regular file is there, or a link to one."""
    fs, inner = _resolve(path)
    with storage_errors(path):
        return bool(fs.isfile(inner))


def local_path(path: str) -> Path:
    """The path of a local file or folder."""
    return Path(path.removeprefix("file://"))


def make_folder(path: str) -> None:
    """Create a folder and its parents; a no-op on object stores, where it would make a bucket."""
    if not is_local(path):
        return
    fs, inner = _resolve(path)
    with storage_errors(path):
        fs.makedirs(inner, exist_ok=True)


def list_files(path: str, suffix: str = "") -> list[str]:
    """Names (not paths) of the files directly inside a folder, sorted; none where it is absent."""
    return [name for name in _list(path, "file") if name.endswith(suffix)]


def list_folders(path: str) -> list[str]:
    """Names of the folders directly inside a folder, sorted; none where it is absent."""
    return _list(path, "directory")


def list_sizes(path: str) -> dict[str, int]:
    """Bytes of the files directly inside a folder, by name."""
    return {name: entry["size"] or 0 for name, entry in _named_entries(path, "file")}


def _list(path: str, wanted: str) -> list[str]:
    return sorted(name for name, _ in _named_entries(path, wanted))


def _named_entries(path: str, wanted: str) -> list[tuple[str, _Entry]]:
    fs, inner = _resolve(path)
    with storage_errors(path):
        fs.invalidate_cache(inner)
        entries = _entries(fs, inner)
    found = [entry for entry in entries if entry["type"] == wanted]
    return [(entry["name"].rstrip("/").rsplit("/", 1)[-1], entry) for entry in found]


def total_bytes(path: str) -> int:
    """Bytes of all files below a folder of an object store."""
    fs, inner = _resolve(path)
    with storage_errors(path):
        return int(fs.du(inner)) if fs.exists(inner) else 0


def walk_files(path: str) -> list[str]:
    """Relative paths of all files below a folder, sorted; none where it is a file or absent."""
    return sorted(walk_infos(path))


def walk_infos(path: str) -> dict[str, FileInfo]:
    """The same with what is known of each file, in any order.

    An object store gives a listing page after page: as soon as there are folders enough, they are
    listed side by side.
    """
    fs, inner = _resolve(path)
    files: dict[str, _Entry] = {}
    folders = [inner]
    with storage_errors(path):
        while folders and not is_local(path) and len(folders) < _REQUESTS_AT_ONCE:
            listed = set(folders)
            entries = [*itertools.chain(*gather(lambda one: _entries(fs, one), folders, path))]
            files |= {one["name"]: one for one in entries if one["type"] == "file"}
            below = (one["name"] for one in entries if one["type"] == "directory")
            folders = [name for name in below if name not in listed]
        for found in gather(lambda one: fs.find(one, detail=True), folders, path):
            files |= found
    root = inner.rstrip("/") + "/"
    return {
        name.removeprefix(root): FileInfo(int(info["size"] or 0), _stamp(info))
        for name, info in files.items()
        if name.startswith(root) and not name.endswith("/")  # marks of folders end in a slash
    }


def _entries(fs: AbstractFileSystem, folder: str) -> list[_Entry]:
    """What a folder holds; nothing where it is absent."""
    try:
        found: list[_Entry] = fs.ls(folder, detail=True)
    except FileNotFoundError:
        return []
    return found


def remove(path: str) -> None:
    """Remove a file or a folder with all below it; a no-op where it is absent."""
    fs, inner = _resolve(path)
    named = inner if is_local(path) else glob.escape(inner)  # object stores take it for a pattern
    with storage_errors(path), contextlib.suppress(FileNotFoundError):
        fs.rm(named, recursive=True)


def size_of(path: str) -> int:
    """Bytes of one file."""
    fs, inner = _resolve(path)
    with storage_errors(path):
        return int(fs.size(inner))


def stamp_of(path: str) -> str:
    """A text that changes when the file does: its size, and its time or tag where there is one."""
    fs, inner = _resolve(path)
    with storage_errors(path):
        return _stamp(fs.info(inner))


def _stamp(info: _Entry) -> str:
    changed = info.get("ETag") or info.get("mtime") or info.get("LastModified") or ""
    return f"{info['size']} {changed}"


@contextlib.contextmanager
def open_read(path: str, *, by_range: bool = False) -> Iterator[IO[bytes]]:
    """Open for reading. by_range: fetch just the bytes asked for, without reading ahead."""
    fs, inner = _resolve(path)
    remote = {"cache_type": "none"} if by_range and not is_local(path) else {}
    with storage_errors(path), fs.open(inner, "rb", **remote) as file:
        yield file


@contextlib.contextmanager
def open_regular(path: str, *, by_range: bool = True) -> Iterator[IO[bytes]]:
    """Open for reading what must be a regular file: of a pipe or a device no byte is asked for.

    Raises:
        UnreadableFileError: it is none, is gone or forbidden.
    """
    if not is_local(path):
        with _missing_is_unreadable(path), open_read(path, by_range=by_range) as file:
            yield file
        return
    with storage_errors(path):
        descriptor = _open_regular(path)
        with os.fdopen(descriptor, "rb") as file:
            yield file


def _open_regular(path: str) -> int:
    name = path.removeprefix("file://")
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):  # noqa: PTH116  (before it is opened)
            raise UnreadableFileError(f"{path}: is no regular file")
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _OF_ONE_FILE:
            raise UnreadableFileError(f"{path}: {error.strerror}") from error
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise UnreadableFileError(f"{path}: is no regular file")


@contextlib.contextmanager
def _missing_is_unreadable(path: str) -> Iterator[None]:
    """Of an object store only a missing file is the file's own failure: others may be tokens'."""
    try:
        yield
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UnreadableFileError(str(error)) from error
        raise


def gather(function: Callable[[T], R], items: Iterable[T], path: str) -> list[R]:
    """Apply a function that reads files below a path: many at once where each is a request."""
    if is_local(path):
        return [function(item) for item in items]
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(function, items))


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Parts of files on one store, each from a byte to before another: many requests at once.

    Raises:
        StorageError: a file is missing or too short.
    """
    if not ranges:
        return []
    paths, starts, stops = (list(side) for side in zip(*ranges, strict=True))
    fs, _ = _resolve(paths[0])
    inner = [_resolve(path)[1] for path in paths]
    with storage_errors(paths[0]):
        found: list[bytes] = fs.cat_ranges(
            inner, starts, stops, on_error="raise", batch_size=_REQUESTS_AT_ONCE
        )
    for (path, start, stop), data in zip(ranges, found, strict=True):
        if len(data) != stop - start:
            raise StorageError(f"{path}: is too short; run the stage again")
    return found


@contextlib.contextmanager
def open_whole(path: str) -> Iterator[IO[bytes]]:
    """Open for writing so that the file appears whole, or not at all.

    A file system gets a hidden file and a rename, an object store an upload that is
    completed on success only.
    """
    fs, inner = _resolve(path)
    local = isinstance(fs, LocalFileSystem)
    target = f"{_parent(inner)}/.{uuid.uuid4().hex}{_PARTIAL}" if local else inner
    with storage_errors(path):
        if local:
            fs.makedirs(_parent(inner), exist_ok=True)
        file = fs.open(target, "wb")
        try:
            yield file
        except BaseException:
            _abandon(file, target, local)
            raise
        _finish(file, target, inner, local)


def remove_partials(path: str, *, deep: bool = True) -> None:
    """Remove what killed writers left half-written in a folder; object stores keep none.

    Only while nothing else writes there.
    """
    if not is_local(path):
        return
    folder = Path(path.removeprefix("file://"))
    for file in (folder.rglob if deep else folder.glob)(f".*{_PARTIAL}"):
        file.unlink(missing_ok=True)


def _finish(file: AbstractBufferedFile, target: str, inner: str, local: bool) -> None:
    try:
        file.close()
        if local:
            Path(target).replace(inner)
    except BaseException:
        _abandon(file, target, local)
        raise


def _abandon(file: AbstractBufferedFile, target: str, local: bool) -> None:
    """Throw a half-written file away; what is being raised matters more than failing at this."""
    with contextlib.suppress(OSError, AttributeError, NotImplementedError):
        if local:
            file.close()
        else:
            file.discard()
            file.closed = True  # else it would try to write once more when it is collected
    if local:
        Path(target).unlink(missing_ok=True)


def write_bytes(path: str, data: bytes) -> None:
    """Write a small file, whole or not at all."""
    with open_whole(path) as file:
        file.write(data)


def create(path: str, data: bytes) -> bool:
    """Write a small file where there is none; False where there is one.

    Object stores without conditional writes may let two create the same.
    """
    fs, inner = _resolve(path)
    with storage_errors(path):
        try:
            if is_local(path):
                with open(inner, "xb") as file:  # noqa: PTH123  (a path of any file system)
                    file.write(data)
            else:
                fs.pipe_file(inner, data, mode="create")
        except FileExistsError:
            return False
    return True


def read_bytes(path: str) -> bytes:
    """Read a small file, in one request: it may be replaced meanwhile."""
    fs, inner = _resolve(path)
    with storage_errors(path):
        data: bytes = fs.cat_file(inner)
    return data


class FileDigest(TypedDict):
    """What a file is, byte for byte."""

    size: int
    sha256: str


def digest_file(path: str) -> FileDigest:
    """Read a file from end to end, and hash it."""
    content, size = hashlib.sha256(), 0
    with open_read(path) as file:
        while block := file.read(_BLOCK):
            content.update(block)
            size += len(block)
    return {"size": size, "sha256": content.hexdigest()}


def read_start(path: str, count: int) -> bytes:
    """The first bytes of a file, or all where it has fewer, in one request."""
    fs, inner = _resolve(path)
    with storage_errors(path):
        data: bytes = fs.cat_file(inner, start=0, end=count)
    return data


def write_json(path: str, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: str) -> Any:
    """Read JSON.

    Raises:
        StorageError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not valid JSON ({error}); remove it and run again") from error


class _HashingFile:
    """Counts and hashes what passes through on its way to a file (writers only append)."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.closed = False
        self._last: deque[bytes | memoryview] = deque(maxlen=_LAST_WRITES)

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        self._file.write(view)
        self.sha256.update(view)
        self.num_bytes += view.nbytes
        self._last.append(data)
        return view.nbytes

    def last(self) -> bytes:
        """What was written last."""
        return b"".join(map(bytes, self._last))

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._file.flush()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


class Written(NamedTuple):
    """What a file is, once written."""

    num_bytes: int
    sha256: str
    footer: str
    """SHA-256 of the footer, where all its pages are found by."""


def write_parquet(path: str, table: pa.Table) -> Written:
    """Write one Parquet file whole, each page with its checksum.

    Row groups stay small so that readers of a few rows fetch little. Images and vectors are
    stored plain: they do not shrink, and a dictionary of vectors costs four times their decoding.
    """
    shrinking = [_leaf(field) for field in table.schema if not _is_dense(field.type)]
    looked_up = [name for name in _LOOKED_UP if name in table.column_names]
    rows = max(min(table.num_rows, _ROWS_PER_GROUP), 1)
    with open_whole(path) as file:
        sink = _HashingFile(file)
        pq.write_table(
            table,
            pa.PythonFile(sink, mode="w"),
            compression=dict.fromkeys(shrinking, "zstd"),
            use_dictionary=shrinking,
            write_statistics=shrinking,
            row_group_size=_ROWS_PER_GROUP,
            bloom_filter_options={name: {"ndv": rows, "fpp": 0.01} for name in looked_up},
            write_batch_size=_values_at_once(table.schema),
            write_page_checksum=True,
        )
    return Written(sink.num_bytes, sink.sha256.hexdigest(), _footer_digest(sink.last()))


def _values_at_once(schema: pa.Schema) -> int:
    """How many values go into a page before its size is looked at: of images, few.

    By the default a thousand photos would gather in one page that grows by copying itself.
    """
    return 32 if any(pa.types.is_large_binary(field.type) for field in schema) else 1024


def _is_dense(kind: pa.DataType) -> bool:
    """Whether values are images, or vectors of floats: bytes that no codec shrinks."""
    floats = pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)
    return bool(pa.types.is_large_binary(kind) or floats)


def _leaf(field: pa.Field) -> str:
    """Path of a column in a Parquet file."""
    is_list = pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type)
    return f"{field.name}.list.element" if is_list else str(field.name)


def read_parquet(path: str, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, only the columns asked for.

    Raises:
        StorageError: the file is missing or damaged.
    """
    with open_parquet(path) as file, parquet_errors(path):
        return file.read(columns=columns)


@contextlib.contextmanager
def open_parquet(path: str, footer: str | None = None) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; remotely only the footer is fetched until columns are asked for.

    Pages are checked against their checksums as they are read. footer: SHA-256 that it must have.

    Raises:
        StorageError: the file is missing or damaged.
    """
    with contextlib.ExitStack() as held:
        if is_local(path) and _is_utf8(path):  # Arrow takes no other names
            with storage_errors(path), parquet_errors(path):
                handle = held.enter_context(pa.memory_map(path.removeprefix("file://")))
        else:
            handle = held.enter_context(open_read(path, by_range=True))
        with parquet_errors(path):
            metadata = None if footer is None else _checked_footer(handle, footer)
            opened = pq.ParquetFile(
                handle,
                metadata=metadata,
                pre_buffer=not is_local(path),
                page_checksum_verification=True,
            )
        yield held.enter_context(opened)


def _checked_footer(file: IO[bytes], footer: str) -> pq.FileMetaData:
    """Read the footer, once.

    Raises:
        ArrowInvalid: it is not what was written.
    """
    size = file.seek(0, os.SEEK_END)
    tail = _read_last(file, size, _TAIL_BYTES)
    length = _footer_bytes(tail)
    if len(tail) < length <= size:
        tail = _read_last(file, size, length)
    if _footer_digest(tail) != footer:
        raise pa.ArrowInvalid("its footer is not what was written (SHA-256 differs)")
    return pq.read_metadata(pa.BufferReader(tail))


def _read_last(file: IO[bytes], size: int, count: int) -> bytes:
    file.seek(max(size - count, 0))
    return bytes(file.read(count))


def _footer_bytes(tail: bytes) -> int:
    """Bytes of a footer with its length and the mark behind it."""
    return int.from_bytes(tail[-8:-4], "little") + 8


def _footer_digest(tail: bytes) -> str:
    """SHA-256 of the footer at the end of a file's last bytes."""
    return hashlib.sha256(tail[-_footer_bytes(tail) :]).hexdigest()


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in name)


@contextlib.contextmanager
def parquet_errors(path: str) -> Iterator[None]:
    """Turn Arrow's errors about a damaged file into ours; some of them are plain OSErrors."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        detail = one_line(error)
        raise StorageError(f"{path}: not a readable Parquet file: {detail}") from error


@contextlib.contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Turn the errors of file systems into one line that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"{path}: no such file or folder") from error
    except (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"{path}: no space left on the device; free some, then run the same command again "
                "(finished shards are kept)"
            ) from error
        raise StorageError(f"{path}: {error.strerror or error}") from error
    except (ValueError, ImportError) as error:
        if "rotocol" not in str(error) and "Install" not in str(error):
            raise
        raise StorageError(f"{path}: {error}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        detail = one_line(error)
        raise StorageError(f"{path}: {type(error).__name__}: {detail}") from error


def _resolve(path: str) -> tuple[AbstractFileSystem, str]:
    if not path or "\0" in path:
        what = "with the character NUL" if path else "that is empty"
        raise StorageError(f"a path {what} was given; name a folder or a URL")
    if is_local(path):
        return LocalFileSystem(), os.path.abspath(path.removeprefix("file://"))  # noqa: PTH100
    with storage_errors(path):
        # Other processes write, too: what a listing said a moment ago is no answer.
        fs, inner = fsspec.core.url_to_fs(path, use_listings_cache=False)
    return fs, inner


def _parent(path: str) -> str:
    return os.path.dirname(path)  # noqa: PTH120  (also splits the keys of object stores)
