"""Work on files that a killed run resumes: each item is finished by a receipt that knows its files.

A `FileTask` works on the items 0, 1, …; it writes files, and says which with a small summary.
`run_file_tasks` leaves out the items whose receipt is there and whose files have the sizes that it
names, so what was deleted or truncated between two runs is noticed and made again. In use:

    class CountRows(FileTask[None, int]):
        def __call__(self, item: int, opened: None) -> TaskResult[int]:
            write_columns(path_of(item), {"rows": rows})
            return TaskResult([path_of(item)], len(rows))

    counts = run_file_tasks(engine, CountRows(), num_items, folder, "count rows")
"""

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from curation import storage
from curation.stage import Engine, Opened, Resources, Task

Summary = TypeVar("Summary")


@dataclass(frozen=True)
class TaskResult(Generic[Summary]):
    """What the work on one item left behind."""

    files: Sequence[str]
    """Paths written."""
    summary: Summary
    """What the driver needs to know of the item: small, of JSON's types."""


class FileTask(Task[int, Opened, TaskResult[Summary]]):
    """Work on one of some numbered items, which writes files and says which."""

    @abstractmethod
    def __call__(self, item: int, opened: Opened) -> TaskResult[Summary]:
        """Do the work on one item."""


def run_file_tasks(
    engine: Engine, task: FileTask[Opened, Summary], num_items: int, folder: str, label: str
) -> list[Summary]:
    """Do the work on every item that is not finished; give the summaries of all, in order.

    folder: of the receipts.
    """
    found: dict[int, Summary] = _finished(folder, num_items)
    waiting = [item for item in range(num_items) if item not in found]
    for item, summary in engine.map(_Recorded(task, folder), waiting, label):
        found[item] = summary
    return [found[item] for item in range(num_items)]


def finished_summaries(folder: str, num_items: int) -> list[Any] | None:
    """Summaries of all items where every one is finished and its files are whole; else None."""
    found = _finished(folder, num_items)
    return [found[item] for item in range(num_items)] if len(found) == num_items else None


@dataclass(frozen=True)
class _Recorded(Task[int, Opened, Summary]):
    """A file task whose items each leave a receipt; it gives their summaries."""

    task: FileTask[Opened, Summary]
    folder: str

    @property
    def resources(self) -> Resources:
        return self.task.resources

    def open(self) -> Opened:
        return self.task.open()

    def __call__(self, item: int, opened: Opened) -> Summary:
        result = self.task(item, opened)
        sizes = storage.gather(storage.size_of, result.files, self.folder)
        receipt = {"files": dict(zip(result.files, sizes, strict=True)), "summary": result.summary}
        data = json.dumps(receipt).encode()
        storage.write_bytes(_receipt_path(self.folder, item), data)
        summary: Summary = json.loads(data)["summary"]  # as a run that resumes will read it
        return summary


def _finished(folder: str, num_items: int) -> dict[int, Any]:
    """Summaries of the items whose receipt is there and whose files are whole."""
    stems = (name.removesuffix(".json") for name in storage.list_files(folder, ".json"))
    items = [int(stem) for stem in stems if stem.isdigit() and int(stem) < num_items]
    paths = [_receipt_path(folder, item) for item in items]
    receipts = storage.gather(storage.read_json, paths, folder)
    files = {path: path.rpartition("/") for one in receipts for path in one["files"]}
    sizes = {parent: storage.list_sizes(parent) for parent in {one[0] for one in files.values()}}
    found = {path: sizes[parent].get(name) for path, (parent, _, name) in files.items()}
    return {
        item: receipt["summary"]
        for item, receipt in zip(items, receipts, strict=True)
        if all(found[path] == size for path, size in receipt["files"].items())
    }


def _receipt_path(folder: str, item: int) -> str:
    return storage.join(folder, f"{item:06d}.json")
