"""What `curate forget` leaves, so that later builds keep out what it took away.

A folder of three lists: ids, which `ingest` asks about, and SHA-256 and PDQ hashes, which are
blocklists of `canonicalize`: the same picture stays out, whatever URL it comes from.
"""

from collections.abc import Iterable

from curation import storage

Blocklists = dict[str, dict[str, str]]
"""Kind of hash -> name of a list -> its file."""

FOLDER = "forgotten"
FILES = {"ids": "id", "sha256": "sha256", "pdq": "phash"}
"""List -> the column that it holds."""


def list_file(folder: str, name: str) -> str:
    """Path of one of the lists."""
    return storage.join(folder, f"{name}.txt")


def id_files(folders: Iterable[str]) -> tuple[str, ...]:
    """The lists of ids of some folders."""
    return tuple(list_file(folder, "ids") for folder in folders)


def with_tombstones(blocklists: Blocklists | None, folders: Iterable[str]) -> Blocklists:
    """Settings of blocklists that hold the hashes of some folders, too."""
    merged = dict(blocklists or {})
    for kind in ("sha256", "pdq"):
        lists = {
            FOLDER if not number else f"{FOLDER}-{number + 1}": list_file(folder, kind)
            for number, folder in enumerate(folders)
        }
        merged[kind] = {**(merged.get(kind) or {}), **lists}
    return merged


def folders_of(works: Iterable[str]) -> tuple[str, ...]:
    """The folders of tombstones that work folders hold, where they hold any."""
    folders = (storage.join(work, FOLDER) for work in works)
    return tuple(folder for folder in folders if storage.exists(list_file(folder, "ids")))
