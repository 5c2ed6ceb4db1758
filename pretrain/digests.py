"""Digests of the files that a run leaves, so that a damaged byte is found before it is used.

`digests.json` holds `{relative path: {"size": bytes, "sha256": hex}}` of the files of its folder
and is written after them. A run's folder has one, and each checkpoint below it one of its own.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from curation.lock import LOCK_FILE

DIGESTS = "digests.json"
FEATURES = "features-"
"""Begins the names of folders that a run can make again; their files have no digests."""
_GROWING = (".jsonl",)
_TENSORBOARD = "tensorboard/"


class FileDigest(TypedDict):
    """What one file was when it was written."""

    size: int
    sha256: str


def digest_of(path: Path, size: int | None = None) -> FileDigest:
    """Digest a file, or its first `size` bytes."""
    content, left = hashlib.sha256(), path.stat().st_size if size is None else size
    total = left
    with path.open("rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            content.update(block)
            left -= len(block)
    return {"size": total - left, "sha256": content.hexdigest()}


def write_digests(folder: Path, digests: Mapping[str, FileDigest] | None = None) -> None:
    """Write what the files of a folder are, whole or not at all; `digests` are known already.

    Left out are folders that have their own, and what is only half written.
    """
    known = {} if digests is None else digests
    found = {name: known.get(name) or digest_of(folder / name) for name in _names(folder)}
    partial = folder / f"{DIGESTS}.partial"
    partial.write_bytes(_encoded(found))
    partial.replace(folder / DIGESTS)


def find_damage(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Compare files with their digests, and say in a line each what is wrong.

    names: the files to look at; all of the folder and of the checkpoints below it where absent.
    Logs may have grown since. Without digests, as older runs are, nothing is found.
    """
    found = []
    inner = [] if names is not None else sorted(folder.glob(f"checkpoints/step-*/{DIGESTS}"))
    for path in inner:
        where = path.parent.relative_to(folder).as_posix()
        found += [f"{where}/{line}" for line in find_damage(path.parent)]
    if not (folder / DIGESTS).is_file():
        return found
    try:
        digests = read_digests(folder)
    except ValueError as error:
        return [f"{DIGESTS}: {error}", *found]
    wanted = digests if names is None else {name: digests.get(name) for name in names}
    lines = ((name, _difference(folder / name, name, one)) for name, one in wanted.items())
    return [f"{name}: {line}" for name, line in lines if line] + found


def read_digests(folder: Path) -> dict[str, FileDigest]:
    """Read the digests of a folder.

    Raises:
        ValueError: they are damaged.
    """
    raw = (folder / DIGESTS).read_bytes()
    try:
        digests: dict[str, FileDigest] = json.loads(raw)
        is_whole = _encoded(digests) == raw and all(
            isinstance(one["size"], int) and isinstance(one["sha256"], str)
            for one in digests.values()
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError("is damaged") from error
    if not is_whole:
        raise ValueError("is damaged")
    return digests


def _difference(path: Path, name: str, digest: FileDigest | None) -> str:
    """What tells a file from its digest; empty where nothing does."""
    if digest is None:
        return "has no digest"
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    grows = name.endswith(_GROWING) or name.startswith(_TENSORBOARD)
    if size < digest["size"] or (size > digest["size"] and not grows):
        return f"has {size:,} bytes of {digest['size']:,}"
    if digest_of(path, digest["size"])["sha256"] != digest["sha256"]:
        return "is not what was written: its SHA-256 differs"
    return ""


def _names(folder: Path) -> list[str]:
    """Relative paths of the files below a folder that its digests cover."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in files)
    return sorted(name for name in names if not _is_apart(name))


def _is_apart(name: str) -> bool:
    # _step.json is of who runs the training, and written after these digests; the lock goes when
    # the run ends. Torch's own files begin with underscores, too.
    of_the_runner = name == LOCK_FILE or (name.startswith("_") and name.endswith(".json"))
    apart = name.startswith(("checkpoints/", FEATURES)) or ".partial" in name
    return name == DIGESTS or of_the_runner or apart


def _encoded(digests: Mapping[str, FileDigest]) -> bytes:
    return json.dumps(digests, sort_keys=True, indent=1).encode() + b"\n"
