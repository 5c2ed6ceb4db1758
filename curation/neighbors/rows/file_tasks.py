"""Steps of a long computation on files: each item is finished by a receipt that knows its files.

A receipt names every file that the item wrote, with its size: what was deleted or truncated
between two runs is noticed and made again.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from curation import storage
from curation.stage import Engine, Resources, Task


@dataclass(frozen=True)
class Done:
    """What one item's work left behind."""

    files: Sequence[str] = ()
    """Paths written."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Small figures that the driver needs; JSON."""


class Work(Task[int, Done]):
    """Work on item 0, 1, …; it writes files and says which."""

    @abstractmethod
    def __call__(self, item: int, opened: Any) -> Done:
        """Do the work on one item."""


def run_steps(
    engine: Engine, work: Work, num_items: int, folder: str, label: str
) -> list[dict[str, Any]]:
    """Do the work on every item that is not finished; give the facts of all, in order."""
    waiting = [item for item in range(num_items) if not is_finished(folder, item)]
    for _ in engine.map(_Recorded(work, folder), waiting, label):
        pass
    return [storage.read_json(_receipt(folder, item))["facts"] for item in range(num_items)]


def finished_steps(folder: str, num_items: int) -> list[dict[str, Any]] | None:
    """Facts of all items where every one is finished and its files are whole; else None."""
    if not all(is_finished(folder, item) for item in range(num_items)):
        return None
    return [storage.read_json(_receipt(folder, item))["facts"] for item in range(num_items)]


@dataclass(frozen=True)
class _Recorded(Task[int, None]):
    work: Work
    folder: str

    @property
    def resources(self) -> Resources:  # type: ignore[override]  # a constant elsewhere
        return self.work.resources

    def open(self) -> Any:
        return self.work.open()

    def __call__(self, item: int, opened: Any) -> None:
        done = self.work(item, opened)
        files = {path: storage.size_of(path) for path in done.files}
        storage.write_json(_receipt(self.folder, item), {"files": files, "facts": done.facts})


def _receipt(folder: str, item: int) -> str:
    return storage.join(folder, f"{item:06d}.json")


def is_finished(folder: str, item: int) -> bool:
    """Whether an item was finished, and its files are all there."""
    if not storage.exists(_receipt(folder, item)):
        return False
    files = storage.read_json(_receipt(folder, item))["files"]
    return all(storage.exists(path) and storage.size_of(path) == n for path, n in files.items())
