"""Tars: where the bytes of each image lie, found by reading headers only.

Read by our own lines and not by `tarfile`, which ends in silence at a damaged header, believes any
size, and has no place for what lies in a tar of tars. A block that is no header is skipped up to
the next that is one, as GNU tar does with `--ignore-zeros`, so two archives in one file are both
read.
"""

import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from curation.sources.folders import SNIFFED_BYTES
from curation.sources.names import counted_as, hidden_part, kind_of, suffix_of
from embedder.image_files import looks_like_image

_BLOCK = tarfile.BLOCKSIZE
_MAGIC, _MAGIC_AT = b"ustar", 257
_WINDOW = 1 << 20
_LOST_AFTER = 1 << 30
"""Bytes without a header after which none is looked for any more."""
_MAX_EXTENSION_BYTES = 4 << 20
_MAX_DEPTH = 4
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_WITHOUT_DATA = (*_LINKS, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_FILES = (*tarfile.REGULAR_TYPES, tarfile.GNUTYPE_SPARSE)
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

NOWHERE = -1
"""Offset of an image that the tar names and whose bytes do not lie there in one piece."""


class Member(NamedTuple):
    """An image in a tar."""

    name: str
    offset: int
    size: int
    """As its header says: the file may end before."""


@dataclass
class TarMembers:
    """What the headers of a tar say."""

    images: list[Member] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Other members, by reason or suffix."""
    num_headers: int = 0
    damages: list[int] = field(default_factory=list)
    """Where a block is no header, or a member reaches beyond the end."""


def packing_of(file: IO[bytes]) -> str | None:
    """How a file is compressed, by its first bytes; None where it is not."""
    file.seek(0)
    head = file.read(_BLOCK)
    if _parse(head) is not None:  # a member may be called as a compressed file begins
        return None
    return next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)


def read_members(file: IO[bytes], size: int) -> TarMembers:
    """List the images of a tar of some bytes, links to images and images in tars inside included.

    Names that repeat are told apart by `#2`, `#3`, …
    """
    reader = _Reader(file)
    reader.read(0, size, "", 0)
    reader.follow_links()
    found = reader.found
    seen: Counter[str] = Counter()
    unique = []
    for member in found.images:
        seen[member.name] += 1
        count = seen[member.name]
        name = member.name if count == 1 else f"{member.name}#{count}"
        unique.append(member._replace(name=name))
    found.images = unique
    return found


class _Extension(NamedTuple):
    """What headers before a member say of it."""

    name: str | None = None
    link: str | None = None
    size: int | None = None
    is_sparse: bool = False


class _Reader:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.found = TarMembers()
        self._places: dict[str, tuple[int, int]] = {}
        self._links: list[tuple[str, str]] = []

    def read(self, start: int, end: int, folder: str, depth: int) -> None:
        """Read the headers between two places. folder: name of the tar inside, with a slash."""
        position, extension = start, _Extension()
        while position < end:
            block = self._bytes(position, min(_BLOCK, end - position))
            header = _parse(block)
            if header is None:
                if block.strip(b"\0"):
                    self.found.damages.append(position)
                position, extension = self._next_header(position + _BLOCK, end), _Extension()
                continue
            self.found.num_headers += 1
            data = position + _BLOCK
            if header.type in _EXTENSIONS:
                stop = data + _padded(header.size)
                if header.size > _MAX_EXTENSION_BYTES or stop > end + _BLOCK:
                    self.found.damages.append(position)
                    position = self._next_header(data, end)
                    continue
                payload = self._bytes(data, header.size)
                extension, position = _extended(extension, header.type, payload), stop
                continue
            position = self._take(header, block, extension, (position, end), (folder, depth))
            extension = _Extension()

    def _take(
        self,
        header: tarfile.TarInfo,
        block: bytes,
        extension: _Extension,
        place: tuple[int, int],
        inside: tuple[str, int],
    ) -> int:
        """Note a member; give where the next header lies."""
        position, end = place
        name = inside[0] + (extension.name or header.name)
        size = header.size if extension.size is None else extension.size
        data = position + _BLOCK
        if header.type == tarfile.GNUTYPE_SPARSE:
            data = self._after_map(block, data, end)
        if header.type in _WITHOUT_DATA:
            if header.type in _LINKS:
                self._note_link(name, inside[0], extension.link or header.linkname, header.type)
            return data
        is_sparse = extension.is_sparse or header.type == tarfile.GNUTYPE_SPARSE
        if header.type in _FILES:
            self._note(Member(name, NOWHERE if is_sparse else data, size), end, inside[1])
        if data + size <= end:
            return data + _padded(size)
        self.found.damages.append(position)  # cut, or lying: what follows may still be there
        return end if kind_of(name) == "tar" else self._next_header(position + _BLOCK, end)

    def _note(self, member: Member, end: int, depth: int) -> None:
        name, offset, size = member
        self._places[posixpath.normpath(name)] = (offset, size)
        kind = kind_of(name)
        if hidden_part(name) is not None:
            self.found.left_out["hidden"] += 1
        elif kind == "image":
            self.found.images.append(member)
        elif kind == "tar" and offset >= 0 and depth < _MAX_DEPTH:
            self.read(offset, min(offset + size, end), f"{name}/", depth + 1)
        elif kind == "other" and not suffix_of(name) and self._begins_as_image(member, end):
            self.found.images.append(member)
        else:
            self.found.left_out[counted_as(name)] += 1

    def _begins_as_image(self, member: Member, end: int) -> bool:
        size = min(SNIFFED_BYTES, member.size, end - member.offset)
        return member.offset >= 0 and looks_like_image(self._bytes(member.offset, max(0, size)))

    def _note_link(self, name: str, folder: str, target: str, kind: bytes) -> None:
        """A hard link names a member; a symbolic link a file beside itself."""
        beside = folder if kind == tarfile.LNKTYPE else f"{posixpath.dirname(name)}/"
        path = posixpath.normpath(posixpath.join(beside.lstrip("/"), target))
        if kind_of(name) != "image" or hidden_part(name) is not None:
            self.found.left_out["link"] += 1
        elif kind == tarfile.LNKTYPE and path in self._places:
            self.found.images.append(Member(name, *self._places[path]))
        else:
            self._links.append((name, path))

    def follow_links(self) -> None:
        """Make links to images the images that they name."""
        targets = {posixpath.normpath(name): target for name, target in self._links}
        for name, target in self._links:
            seen = set[str]()
            while target in targets and target not in self._places and target not in seen:
                seen.add(target)
                target = targets[target]
            self.found.images.append(Member(name, *self._places.get(target, (NOWHERE, 0))))

    def _after_map(self, block: bytes, data: int, end: int) -> int:
        """Where the data of an old GNU sparse member begin: behind blocks of its map."""
        is_extended = bool(block[482])
        while is_extended and data < end:
            is_extended = bool(self._bytes(data, _BLOCK).ljust(_BLOCK, b"\0")[504])
            data += _BLOCK
        return data

    def _next_header(self, position: int, end: int) -> int:
        """The place of the next header from a block on; the end where there is none."""
        stop, size = min(end, position + _LOST_AFTER), _BLOCK
        while position < stop:
            size = min(2 * size, _WINDOW)
            window = self._bytes(position, min(size, stop - position))
            for place in _found_in(window):
                if _parse(window[place : place + _BLOCK]) is not None:
                    return position + place
            position += size
        return end

    def _bytes(self, position: int, count: int) -> bytes:
        self._file.seek(position)
        return self._file.read(count)


def _found_in(window: bytes) -> Iterator[int]:
    """Blocks of a window that may be headers."""
    at = window.find(_MAGIC)
    while at >= 0:
        if at % _BLOCK == _MAGIC_AT:
            yield at - _MAGIC_AT
        at = window.find(_MAGIC, at + 1)


def _parse(block: bytes) -> tarfile.TarInfo | None:
    """What a header says; None of what is none, as its checksum tells."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return header if header.size >= 0 else None


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


# --- headers that say more of the next one ------------------------------------------------------

_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE, *_PAX)


_DIGITS = re.compile("[0-9]{1,20}")


def _extended(extension: _Extension, kind: bytes, payload: bytes) -> _Extension:
    if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        text = payload.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        is_name = kind == tarfile.GNUTYPE_LONGNAME
        return extension._replace(name=text) if is_name else extension._replace(link=text)
    if kind == tarfile.XGLTYPE:  # of all members: comments and times
        return extension
    records = dict(_pax_records(payload))
    name = records.get("GNU.sparse.name") or records.get("path")
    size = records.get("size", "")
    return _Extension(
        name=name if name is not None else extension.name,
        link=records.get("linkpath", extension.link),
        size=int(size) if _DIGITS.fullmatch(size) else extension.size,
        is_sparse=extension.is_sparse or any(key.startswith("GNU.sparse.") for key in records),
    )


def _pax_records(payload: bytes) -> Iterator[tuple[str, str]]:
    """Key and value of each record `LENGTH KEY=VALUE` and a line's end, up to what is none."""
    start = 0
    while start < len(payload):
        length, space, _ = payload[start : start + 20].partition(b" ")
        stop = start + (int(length) if space and length.isdigit() else 0)
        if not start + len(length) < stop <= len(payload):
            return
        key, _, value = payload[start + len(length) + 1 : stop - 1].partition(b"=")
        yield key.decode("utf-8", "replace"), value.decode("utf-8", "surrogateescape")
        start = stop
