"""What a file holds, told from its name: an image, a container of images, or neither."""

import re
from collections.abc import Iterable
from typing import Literal

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".png", ".apng"),
    *(".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif"),
)
"""Of the formats that `embedder.images` decodes; others are left out and counted."""

Kind = Literal["image", "tar", "packed_tar", "table", "other"]

_SUFFIXES = "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
# Also what a suffix grew on its way: photo.jpg_large, photo.jpg:orig, photo.jpg?width=1.5
_IMAGE = re.compile(rf".*\.(?:{_SUFFIXES})(?:\?.*|[^a-z0-9.][^.]*)?", re.DOTALL)
_PACKED_TAR = re.compile(r".*\.(?:tar\.(?:gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)", re.DOTALL)
_PLAIN_SUFFIX = re.compile(r"\.[a-z0-9_+~-]{1,12}")
_JUNK_FOLDERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})
_OWN_FILES = frozenset({"_manifest.json", "_stage.json", "_key.json"})
_OWN_FOLDERS = frozenset({"_receipts", "_scratch"})


def kind_of(name: str) -> Kind:
    """What a file of that name holds; upper and lower case are the same."""
    base = name.rpartition("/")[2].lower()
    if _PACKED_TAR.fullmatch(base):
        return "packed_tar"
    if base.endswith((".tar", ".parquet")):
        return "tar" if base.endswith(".tar") else "table"
    return "image" if _IMAGE.fullmatch(base) else "other"


def suffix_of(name: str) -> str:
    """The suffix in lower case, with its dot; empty where there is none."""
    base = name.rpartition("/")[2]
    stem, dot, suffix = base.rpartition(".")
    return f".{suffix.lower()}" if dot and stem else ""


def counted_as(name: str) -> str:
    """The reason that a file that is no image counts under: its suffix, if that looks like one."""
    suffix = suffix_of(name)
    return suffix if _PLAIN_SUFFIX.fullmatch(suffix) else "odd_suffix" if suffix else "no_suffix"


def hidden_part(name: str) -> str | None:
    """The topmost file or folder on the way to a name that is hidden; None where none is.

    Dot files, what macOS, Windows and Synology lay beside images, `.ipynb_checkpoints`.
    """
    parts = name.split("/")
    for depth, part in enumerate(parts):
        dotted = part.startswith(".") and part not in (".", "..")
        if dotted or part in _JUNK_FOLDERS:
            return "/".join(parts[: depth + 1])
    return None


def own_folders(names: Iterable[str]) -> set[str]:
    """Folders that hold what our own commands wrote, finished or not.

    The root is none of them: who names it means it.
    """
    found, records, parents = set(), set(), set()
    for name in names:
        *folders, base = name.split("/")
        if base in _OWN_FILES:
            found.add("/".join(folders))
        for depth, folder in enumerate(folders):
            if folder in _OWN_FOLDERS:
                found.add("/".join(folders[:depth]))
            if folder == "work":
                parents.add("/".join(folders[:depth]))
        if base == "run.json":
            records.add("/".join(folders))
    return (found | (records & parents)) - {""}


def inside(name: str, folders: set[str]) -> str | None:
    """The topmost of some folders that a name lies in."""
    if not folders:
        return None
    parts = name.split("/")
    paths = ("/".join(parts[:depth]) for depth in range(1, len(parts)))
    return next((path for path in paths if path in folders), None)


def shown(name: str) -> str:
    """A name as text; bytes that are no UTF-8 are escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def as_bytes(path: str) -> bytes:
    """A path as the file system knows it."""
    return path.encode("utf-8", "surrogateescape")


def as_path(path: bytes) -> str:
    """The path again."""
    return path.decode("utf-8", "surrogateescape")
