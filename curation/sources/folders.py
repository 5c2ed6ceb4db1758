"""What lies below a folder: images, tars and Parquet files, and what is left out and why."""

import os
import stat
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from curation import storage
from curation.errors import StorageError
from curation.sources.names import (
    IMAGE_SUFFIXES,
    Kind,
    counted_as,
    hidden_part,
    inside,
    kind_of,
    own_folders,
    shown,
    suffix_of,
)
from curation.storage import FileInfo
from embedder.image_files import looks_like_image
from embedder.images import DEFAULT_LIMITS

SNIFFED_BYTES = 256
_SHOWN_REASONS = 8
_WORDS = {
    "hidden": "hidden",
    "own_output": "folders that curate wrote",
    "loop": "links that lead back",
    "linked_twice": "links to folders read already",
    "not_a_file": "no regular files",
    "unreadable": "unreadable",
    "too_large": "too large",
    "no_suffix": "without a suffix",
    "no_images": "Parquet files without images",
    "not_a_tar": "no readable tars",
    "not_a_table": "no readable Parquet files",
    "odd_suffix": "with odd suffixes",
    "link": "links in tars",
}


@dataclass
class Listing:
    """Files below a root, by what they hold; names are relative and sorted."""

    root: str
    images: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    packed_tars: list[str] = field(default_factory=list)
    """Compressed ones: their images cannot be read singly."""
    is_own: bool = False
    """Whether this is a finished data set of ours."""
    is_packed: bool = False
    """Whether the Parquet files are the index of packed shards."""
    odd: dict[str, str] = field(default_factory=dict)
    """Images that cannot be read as far as the listing tells, and why: rows all the same."""
    stamps: dict[str, str] = field(default_factory=dict)
    """What changes when a file does, of each that is read."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Files that are not read: how many, by reason or suffix."""

    def path(self, name: str) -> str:
        """Path of a file."""
        return storage.join(self.root, name) if name else self.root

    def summary(self) -> str:
        """One line that says what was found and what is left out."""
        kinds = ((self.images, "image"), (self.tars, "tar"), (self.tables, "Parquet file"))
        found = [f"{len(n):,} {word}{'s' * (len(n) != 1)}" for n, word in kinds if n]
        line = f"{shown(self.root)}: {', '.join(found) or 'no images'}"
        return f"{line}; left out: {told(self.left_out)}" if self.left_out else line

    def emptiness(self) -> str:
        """The same of a folder without images, and what is wanted."""
        left = f" (left out: {told(self.left_out)})" if self.left_out else ""
        return (
            f"{shown(self.root)}: holds no images{left}; wanted: packed shards, tars, Parquet with "
            f"image bytes, or files that end in {', '.join(IMAGE_SUFFIXES)}"
        )


def fault_of(size: int | None, offset: int = 0) -> str:
    """What is wrong with an image of some bytes, -1 for unknown, at a place; "" for nothing."""
    if size is None or offset < 0:
        return "unreadable"
    return "too_large" if size > DEFAULT_LIMITS.max_bytes else "" if size else "empty"


def told(left_out: Counter[str]) -> str:
    """Counts by reason, the largest first, in words."""
    parts = [
        f"{count:,} {_WORDS.get(reason, reason)}"
        for reason, count in sorted(left_out.items(), key=lambda one: (-one[1], one[0]))
    ]
    more = len(parts) - _SHOWN_REASONS
    return ", ".join([*parts[:_SHOWN_REASONS], *([f"{more} more suffixes"] if more > 0 else [])])


def list_files(path: str) -> Listing:
    """List what lies below a folder, linked folders included, or the one file of that path.

    Raises:
        StorageError: the folder cannot be listed.
    """
    if storage.is_file(path):
        return _only(path)
    listing = Listing(path)
    files = walk(path, listing.left_out)
    own = own_folders(files)
    skipped, unnamed = set[str](), list[str]()
    for name in sorted(files):
        top = inside(name, own) or hidden_part(name)
        if top is None:
            _sort_in(listing, name, files[name], unnamed)
        else:
            skipped.add(top)
    listing.left_out["own_output"] += len(skipped & own)
    listing.left_out["hidden"] += len(skipped - own)
    _sniff(listing, {name: files[name] for name in unnamed})
    listing.left_out = +listing.left_out
    return listing


def _only(path: str) -> Listing:
    """A file that was named by itself: what is no container is an image, whatever its name."""
    root, _, name = path.rpartition("/")
    listing = Listing(root or ("/" if path.startswith("/") else "."))
    _list_of(listing, kind_of(name)).append(name)
    listing.stamps[name] = storage.stamp_of(path)
    return listing


def _list_of(listing: Listing, kind: Kind) -> list[str]:
    lists = {"tar": listing.tars, "table": listing.tables, "packed_tar": listing.packed_tars}
    return lists.get(kind, listing.images)


def _sort_in(listing: Listing, name: str, info: FileInfo, unnamed: list[str]) -> None:
    kind, is_regular = kind_of(name), info.size >= 0
    if kind == "other" and is_regular and not suffix_of(name):
        unnamed.append(name)
    elif kind == "other":
        listing.left_out[counted_as(name)] += 1
    elif kind != "image" and not is_regular:
        listing.left_out["not_a_file"] += 1
    else:
        _list_of(listing, kind).append(name)
        listing.stamps[name] = info.stamp
        if fault := fault_of(info.size if is_regular else None):
            listing.odd[name] = fault


def _sniff(listing: Listing, unnamed: dict[str, FileInfo]) -> None:
    """Take files without a suffix that begin as images do."""

    def begins_as_image(name: str) -> bool:
        try:
            with storage.open_regular(listing.path(name)) as file:
                return looks_like_image(file.read(SNIFFED_BYTES))
        except storage.UnreadableFileError:
            return False

    verdicts = storage.gather(begins_as_image, list(unnamed), listing.root)
    taken = [name for name, is_image in zip(unnamed, verdicts, strict=True) if is_image]
    listing.images = sorted([*listing.images, *taken])
    listing.stamps |= {name: unnamed[name].stamp for name in taken}
    listing.left_out["no_suffix"] += len(unnamed) - len(taken)


def walk(root: str, left_out: Counter[str]) -> dict[str, FileInfo]:
    """Names of files below a root, linked folders included, with what is known of each.

    left_out: what cannot be walked is counted here, by reason.
    """
    if storage.is_local(root):
        return dict(_LocalWalk(storage.local_path(root), left_out).files())
    return storage.walk_infos(root)


class _LocalWalk:
    """Files below a folder of this machine. Folders are read once, by their own path before links.

    Linked folders are followed, except those that lead back to the root or above it.
    """

    def __init__(self, root: Path, left_out: Counter[str]) -> None:
        self._root = root
        self._left_out = left_out
        self._links: deque[tuple[str, Path]] = deque()
        self._seen: set[tuple[int, int]] = set()

    def files(self) -> Iterator[tuple[str, FileInfo]]:
        """Relative names of files; hidden folders as if they were files."""
        root = self._root.resolve()
        yield from self._below("", self._root)
        while self._links:
            name, path = self._links.popleft()
            target, here = path.resolve(), path.parent.resolve()
            if target in (root, here, *root.parents, *here.parents):
                self._left_out["loop"] += 1
            else:
                yield from self._below(name, path)

    def _below(self, name: str, folder: Path) -> Iterator[tuple[str, FileInfo]]:
        waiting = [(name, folder)]
        while waiting:
            above, current = waiting.pop()
            for entry in self._entries(current, above):
                relative = f"{above}/{entry.name}" if above else entry.name
                info = FileInfo(-1, "") if hidden_part(entry.name) else _info(entry)
                if info is not None:
                    yield relative, info
                elif entry.is_symlink():
                    self._links.append((relative, Path(entry.path)))
                else:
                    waiting.append((relative, Path(entry.path)))

    def _entries(self, folder: Path, name: str) -> list[os.DirEntry[str]]:
        try:
            found = folder.stat()
            if (found.st_dev, found.st_ino) in self._seen:
                self._left_out["linked_twice"] += 1
                return []
            self._seen.add((found.st_dev, found.st_ino))
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not name:
                raise StorageError(f"{folder}: {error.strerror or error}") from error
            self._left_out["unreadable"] += 1
            return []


def _info(entry: os.DirEntry[str]) -> FileInfo | None:
    """Size and stamp of a file, size -1 of what is no regular file; None of a folder."""
    try:
        found = entry.stat()
    except OSError:  # a link to nothing, to itself, or what may not be looked at
        return FileInfo(-1, "")
    if stat.S_ISDIR(found.st_mode):
        return None
    size = found.st_size if stat.S_ISREG(found.st_mode) else -1
    return FileInfo(size, f"{found.st_size} {found.st_mtime}")
