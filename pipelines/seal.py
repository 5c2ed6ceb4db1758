"""The seal of a run: one digest over every small file that says what the run did.

Shards are covered by the digests in their manifests. Manifests, receipts and records are covered
here, folder by folder, so that a changed byte in any of them is found and its folder named.
"""

import hashlib
from typing import Any

from curation import storage
from curation.errors import StorageError
from pipelines.run_record import RUN_FILE, RunRecord

SEAL_FILE = "_seal.json"


def write_seal(work: str, record: RunRecord) -> str:
    """Seal a finished run; give the digest over all."""
    seal = make_seal(work, record)
    storage.write_json(storage.join(work, SEAL_FILE), seal)
    return str(seal["digest"])


def make_seal(work: str, record: RunRecord) -> dict[str, Any]:
    """Digests of the small files of each folder, and one over them."""
    folders = {folder: folder_digest(work, folder) for folder in sealed_folders(record)}
    run = hashlib.sha256(storage.read_bytes(storage.join(work, RUN_FILE))).hexdigest()
    folders[RUN_FILE] = run
    return {"digest": digest_of_folders(folders), "folders": folders}


def sealed_folders(record: RunRecord) -> list[str]:
    """Folders that the run is made of, relative to the work folder."""
    entries = [*record.pool, *(entry for flow in record.sets.values() for entry in flow)]
    published = [record.manifest] if record.manifest else []
    return sorted({*(entry.folder for entry in entries), *published})


def folder_digest(work: str, folder: str) -> str:
    """SHA-256 over the names and hashes of all JSON files below a folder."""
    root = storage.join(work, folder)
    digest = hashlib.sha256()
    for name in storage.walk_files(root):
        if name.endswith(".json"):
            data = storage.read_bytes(storage.join(root, name))
            digest.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    return digest.hexdigest()


def digest_of_folders(folders: dict[str, str]) -> str:
    """SHA-256 over the folders' digests."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(folders.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def broken_seals(work: str, record: RunRecord) -> list[str] | None:
    """What no longer matches the seal; None where the run was never sealed."""
    path = storage.join(work, SEAL_FILE)
    if not storage.exists(path):
        return None
    try:
        seal = storage.read_json(path)
        folders, digest = dict(seal["folders"]), str(seal["digest"])
    except (StorageError, KeyError, TypeError, ValueError):
        return [f"{SEAL_FILE} is damaged"]
    if digest != digest_of_folders(folders):
        return [f"{SEAL_FILE} does not match its own digest"]
    found = make_seal(work, record)["folders"]
    names = sorted({*found, *folders})
    return [
        f"{name}: a manifest, receipt or record was changed"
        for name in names
        if found.get(name) != folders.get(name)
    ]
