"""What a finished run no longer needs: stages of other settings, scratch, half-written files."""

from collections.abc import Iterator

from curation import storage
from curation.ledger import STAGE_FILE
from curation.lock import locked
from pipelines.operate.disk_budget import bytes_below
from pipelines.run.run_record import POOL, read_run

_SCRATCH = "_scratch"


def clean(work: str, *, dry_run: bool = False) -> dict[str, int]:
    """Remove it; give the bytes of each folder removed, relative to the work folder.

    Raises:
        DatasetError: no run has finished there.
        LockError: one is at work there.
    """
    needed = {entry.folder for entry in read_run(work).entries}
    removed = {}
    with locked(work):
        for folder in _stage_folders(work):
            target = folder if folder not in needed else storage.join(folder, _SCRATCH)
            path = storage.join(work, target)
            if storage.exists(path):
                removed[target] = bytes_below(path)
                if not dry_run:
                    storage.remove(path)
        if not dry_run:
            storage.remove_partials(work)
    return removed


def _stage_folders(work: str) -> Iterator[str]:
    """Folders of stages, relative to the work folder, whether a finished run names them or not."""
    root = storage.join(work, "work")
    sets = storage.list_folders(storage.join(root, "sets"))
    for flow in (POOL, *(storage.join("sets", name) for name in sets)):
        for name in storage.list_folders(storage.join(root, flow)):
            files = (storage.join(root, flow, name, file) for file in ("_key.json", STAGE_FILE))
            if any(storage.exists(file) for file in files):
                yield storage.join("work", flow, name)
