"""Files of a stage that are gone, or cut short: their shards are made again, and no others."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from curation import storage
from curation.dataset import MANIFEST, Dataset, ShardInfo
from curation.errors import DatasetError
from curation.ledger import STAGE_FILE, StageRecord, finished_shards, read_stage, receipt_path
from curation.stage import StageFolder

_NAMED = 5


@dataclass
class LostFiles:
    """What a stage wrote and is no longer there."""

    paths: list[str] = field(default_factory=list)
    """The files."""
    shards: set[int] = field(default_factory=set)
    """Numbers of the shards that they belong to."""

    def __str__(self) -> str:
        more = len(self.paths) - _NAMED
        names = ", ".join(self.paths[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        return f"{names}: gone or cut short"

    def add(self, other: "LostFiles") -> None:
        """Add what is lost of another output of the same shards."""
        self.paths += other.paths
        self.shards |= other.shards

    def look(self, folder: str, shards: Sequence[tuple[int, ShardInfo]]) -> None:
        """Add what is lost of some shards in the folder of an output."""
        sizes = storage.list_sizes(folder)
        for index, shard in shards:
            lengths = {shard.name: shard.num_bytes, **dict.fromkeys(shard.companion)}
            for name, num_bytes in lengths.items():
                path = storage.join(folder, name)
                seen = name in sizes and num_bytes in (None, sizes[name])
                if not seen and _is_lost(path, num_bytes):
                    self.paths.append(path)
                    self.shards.add(index)


def _is_lost(path: str, num_bytes: int | None) -> bool:
    """Asked of the file itself: a listing of a network file system may be old."""
    if not storage.exists(path):
        return True
    return num_bytes is not None and storage.size_of(path) != num_bytes


def lost_files(folder: StageFolder) -> LostFiles:
    """What is lost of a stage: of all of it where it has finished, else of its finished shards.

    Outputs that are deleted after use are left out.
    """
    record = read_stage(folder)
    return _lost_of_receipts(folder) if record is None else _lost_of_stage(folder, record)


def _lost_of_stage(folder: StageFolder, record: StageRecord) -> LostFiles:
    lost = LostFiles()
    promised = {folder.output(name) for name in record.outputs}
    used_up = {folder.output(name) for name in folder.deleted_after_use}
    for path in sorted(promised - used_up):
        if Dataset.is_finished(path):
            lost.add(lost_of(Dataset.open(path)))
        else:
            lost.paths.append(storage.join(path, MANIFEST))
    for path in _own_data_sets(folder) - promised - used_up:
        lost.paths += lost_of(Dataset.open(path)).paths  # its shards are not those of the rows
    return lost


def _own_data_sets(folder: StageFolder) -> set[str]:
    """What the stage may have written besides its side-cars, such as packed images."""
    inner = (storage.join(folder.path, name) for name in storage.list_folders(folder.path))
    places = (folder.path, *dict(folder.elsewhere).values(), *inner)
    return {path for path in places if Dataset.is_finished(path)}


def lost_of(dataset: Dataset) -> LostFiles:
    """What is lost of a data set."""
    lost = LostFiles()
    lost.look(dataset.path, list(enumerate(dataset.manifest.shards)))
    return lost


def _lost_of_receipts(folder: StageFolder) -> LostFiles:
    lost, receipts = LostFiles(), finished_shards(folder)
    names = {name for receipt in receipts.values() for name in receipt.outputs}
    for name in names - set(folder.deleted_after_use):
        shards = [(index, one.outputs[name]) for index, one in receipts.items()]
        lost.look(folder.output(name), shards)
    return lost


def unfinished_shards(folder: StageFolder, num_shards: int) -> list[int]:
    """Shards that the stage has still to make, or to make again."""
    lost = lost_files(folder).shards
    if read_stage(folder) is not None:
        return sorted(lost)
    done = {index for index, one in finished_shards(folder).items() if not one.failure}
    return [index for index in range(num_shards) if index in lost or index not in done]


def reopen(folder: StageFolder, shards: Iterable[int]) -> None:
    """Take the commit of some shards back, so that the stage makes them again."""
    storage.remove(storage.join(folder.path, STAGE_FILE))
    for index in shards:
        storage.remove(receipt_path(folder, index))
    storage.remove(folder.scratch)  # it may say that these shards are done


def reopen_failed(folder: StageFolder, record: StageRecord, allowed: int) -> bool:
    """Reopen a stage that accepted more failed shards than are allowed now."""
    if len(record.failed_shards) <= allowed:
        return False
    reopen(folder, record.failed_shards)
    return True


def require_files(datasets: Iterable[Dataset]) -> None:
    """Check that the shards of data sets are there.

    Raises:
        DatasetError: some are not. It names them, and what to do.
    """
    for dataset in datasets:
        lost = lost_of(dataset)
        if lost.paths:
            raise DatasetError(
                f"{lost}; run the command that wrote {dataset.path} again: it makes just these"
            )
