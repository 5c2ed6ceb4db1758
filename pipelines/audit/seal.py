"""The seal of a run: one digest over every file that says what the run did, or that it made.

Shards are covered by the digests in their manifests, what pretraining wrote by `digests.json`
beside it. Manifests, receipts and records are covered here, folder by folder, and all other files
of the run one by one, so that a changed byte in any of them is found and its place named.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from curation import storage
from curation.dataset import MANIFEST, Dataset
from curation.errors import CurateError, StorageError
from curation.lock import LOCK_FILE
from pipelines.run.run_record import RUN_FILE, RunRecord
from pretrain.digests import DIGESTS, read_digests

SEAL_FILE = "_seal.json"
PRETRAIN = "pretrain"
_MADE = (PRETRAIN, "evaluate", "events", "forgotten", "work/report")
"""Folders of the run besides those of its stages and sets."""
REPORT = "report.html"

Seal = dict[str, Any]
"""`digest` over all; `folders`: digest of each; `files`: path -> `FileDigest` of all others."""


def write_seal(work: str, record: RunRecord, *, whole: bool = True) -> str:
    """Seal a finished run; give the digest over all.

    whole: with the files that steps after the last stage write; these are sealed when all is done.
    """
    seal = make_seal(work, record)
    if whole:
        names = loose_files(work, record)
        seal["files"] = {name: storage.digest_file(storage.join(work, name)) for name in names}
    seal = {"digest": digest_of_seal(seal), **seal}
    storage.write_json(storage.join(work, SEAL_FILE), seal)
    return str(seal["digest"])


def is_sealed_whole(work: str) -> bool:
    """Whether the seal says what each file is; a damaged seal is left for `verify` to tell."""
    path = storage.join(work, SEAL_FILE)
    if not storage.exists(path):
        return False
    try:
        return "files" in storage.read_json(path)
    except (StorageError, TypeError):
        return True


def make_seal(work: str, record: RunRecord) -> Seal:
    """Digests of the small files of each folder."""
    folders = {folder: folder_digest(work, folder) for folder in sealed_folders(record)}
    run = hashlib.sha256(storage.read_bytes(storage.join(work, RUN_FILE))).hexdigest()
    return {"folders": {**folders, RUN_FILE: run}}


def seal_again(work: str, name: str) -> None:
    """Take in one file that was written anew, where the seal names it."""
    path = storage.join(work, SEAL_FILE)
    if not storage.exists(path):
        return
    seal = storage.read_json(path)
    if name in seal.get("files", {}):
        seal["files"][name] = storage.digest_file(storage.join(work, name))
        seal["digest"] = digest_of_seal(seal)
        storage.write_json(path, seal)


def sealed_folders(record: RunRecord) -> list[str]:
    """Folders of stages and sets that the run is made of, relative to the work folder."""
    entries = record.entries
    published = [one for one in (record.manifest, record.packed) if one]
    return sorted({*(entry.folder for entry in entries), *published})


def loose_files(work: str, record: RunRecord) -> list[str]:
    """Files of the run that neither a manifest nor the digest of a folder covers."""
    names = [REPORT] if storage.exists(storage.join(work, REPORT)) else []
    names += [storage.join("work", name) for name in storage.list_files(storage.join(work, "work"))]
    for folder in (*_MADE, *sealed_folders(record)):
        below = storage.walk_files(storage.join(work, folder))
        names += [storage.join(folder, name) for name in below]
    names = [name for name in names if name.rpartition("/")[2] != LOCK_FILE]
    return sorted({*names} - covered_files(work, record))


def covered_files(work: str, record: RunRecord) -> set[str]:
    """Files of the run that manifests, folders' digests and those of pretraining cover."""
    covered = {RUN_FILE, SEAL_FILE, *_covered_by_pretraining(work)}
    for folder in sealed_folders(record):
        for name in storage.walk_files(storage.join(work, folder)):
            if name.endswith(".json"):
                covered.add(storage.join(folder, name))
            if name.rpartition("/")[2] == MANIFEST:
                inner = storage.join(folder, name).rpartition("/")[0]
                covered.update(f"{inner}/{file}" for file in _files_of(storage.join(work, inner)))
    return covered


def _files_of(path: str) -> Iterator[str]:
    """Files that a data set's manifest covers; none of a damaged one."""
    try:
        shards = Dataset.open(path).manifest.shards
    except CurateError:
        return
    for shard in shards:
        yield from (shard.name, *shard.companion)


def _covered_by_pretraining(work: str) -> Iterator[str]:
    """Files that `digests.json` beside weights and checkpoints covers; these are sealed."""
    if not storage.is_local(work):
        return
    root = Path(work.removeprefix("file://"))
    for path in (root / PRETRAIN).glob(f"**/{DIGESTS}"):
        try:
            names = list(read_digests(path.parent))
        except (OSError, ValueError):
            continue
        yield from ((path.parent / name).relative_to(root).as_posix() for name in names)


def folder_digest(work: str, folder: str) -> str:
    """SHA-256 over the names and hashes of all JSON files below a folder."""
    root = storage.join(work, folder)
    digest = hashlib.sha256()
    for name in storage.walk_files(root):
        if name.endswith(".json"):
            data = storage.read_bytes(storage.join(root, name))
            digest.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    return digest.hexdigest()


def digest_of_seal(seal: Seal) -> str:
    """SHA-256 over the folders' digests, then over those of single files."""
    lines = [f"{name} {value}\n" for name, value in sorted(seal["folders"].items())]
    for name, one in sorted(seal.get("files", {}).items()):
        lines.append(f"{name} {one['size']} {one['sha256']}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def broken_seals(work: str, record: RunRecord) -> list[str] | None:
    """What no longer matches the seal; None where the run was never sealed."""
    path = storage.join(work, SEAL_FILE)
    if not storage.exists(path):
        return None
    try:
        seal = storage.read_json(path)
        folders, sealed = dict(seal["folders"]), sealed_files(seal)
        is_own = seal["digest"] == digest_of_seal(seal)
    except (StorageError, KeyError, TypeError, ValueError, AttributeError):
        return [f"{SEAL_FILE} is damaged"]
    if not is_own:
        return [f"{SEAL_FILE} does not match its own digest"]
    found = make_seal(work, record)["folders"]
    names = sorted({*found, *folders})
    broken = [
        f"{name}: a manifest, receipt or record was changed"
        for name in names
        if found.get(name) != folders.get(name)
    ]
    lines = ((name, _difference(work, name, one)) for name, one in sealed.items())
    return broken + [f"{name}: {line}" for name, line in lines if line]


def sealed_files(seal: Seal) -> dict[str, storage.FileDigest]:
    """The single files that a seal names."""
    return dict(seal.get("files", {}))


def _difference(work: str, name: str, sealed: storage.FileDigest) -> str:
    """What tells a file from its seal; empty where nothing does."""
    if not storage.exists(storage.join(work, name)):
        return "is missing"
    found = storage.digest_file(storage.join(work, name))
    if found["size"] != sealed["size"]:
        return f"has {found['size']:,} bytes where {sealed['size']:,} were sealed"
    if found["sha256"] != sealed["sha256"]:
        return "its bytes are not those that were sealed (SHA-256 differs)"
    return ""
