"""What a finished run no longer needs: stages of other settings, scratch, half-written files."""

from collections.abc import Iterator

from curation import storage
from curation.ledger import STAGE_FILE
from curation.lock import locked
from pipelines.operate.disk_budget import bytes_below
from pipelines.run.run_record import POOL, RunRecord, read_run

_SCRATCH = "_scratch"


def clean(work: str, *, dry_run: bool = False) -> dict[str, int]:
    """Remove it; give the bytes of each folder removed, relative to the work folder.

    Raises:
        DatasetError: no run has finished there.
        LockError: one is at work there.
    """
    record = read_run(work)
    with locked(work):
        return _remove_unneeded(work, record, dry_run=dry_run)


def _remove_unneeded(work: str, record: RunRecord, *, dry_run: bool) -> dict[str, int]:
    entries = [*record.pool, *(entry for flow in record.sets.values() for entry in flow)]
    needed = {entry.folder for entry in entries}
    removed = {}
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
    flows = [POOL, *(storage.join("sets", name) for name in _folders(storage.join(root, "sets")))]
    for flow in flows:
        for name in _folders(storage.join(root, flow)):
            if _is_stage(storage.join(root, flow, name)):
                yield storage.join("work", flow, name)


def _is_stage(folder: str) -> bool:
    return any(storage.exists(storage.join(folder, name)) for name in ("_key.json", STAGE_FILE))


def _folders(path: str) -> list[str]:
    return storage.list_folders(path)
