from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import storage
from curation.errors import EngineError
from curation.neighbors.rows.file_tasks import (
    FileTask,
    TaskResult,
    finished_summaries,
    run_file_tasks,
)
from pipelines.engines.local_engine import LocalEngine

NUM_ITEMS = 5


@dataclass(frozen=True)
class WriteBytes(FileTask[None, dict[str, int]]):
    """Item n writes n bytes to a file, and a mark to one that counts its turns."""

    folder: str
    fails_at: int = -1

    def path(self, item):
        return storage.join(self.folder, "written", f"{item}.bin")

    def __call__(self, item, opened):
        if item == self.fails_at:
            raise OSError("no luck")
        turns = storage.join(self.folder, "turns", f"{item}-")
        number = len(storage.list_files(storage.join(self.folder, "turns"))) + 1
        storage.write_bytes(f"{turns}{number}", b"")
        storage.write_bytes(self.path(item), bytes(item))
        return TaskResult([self.path(item)], {"bytes": item, "parity": item % 2})

    def run(self):
        engine = LocalEngine(attempts=1)
        return run_file_tasks(engine, self, NUM_ITEMS, f"{self.folder}/receipts", "write")

    def turns(self, item):
        names = storage.list_files(storage.join(self.folder, "turns"))
        return sum(name.startswith(f"{item}-") for name in names)


WANTED = [{"bytes": item, "parity": item % 2} for item in range(NUM_ITEMS)]


@settings(max_examples=40, deadline=None)
@given(
    damage=st.lists(
        st.tuples(st.integers(0, NUM_ITEMS - 1), st.sampled_from(["file", "receipt", "longer"]))
    )
)
@pytest.mark.parametrize("root", ["", "memory:/"])
def test_run_file_tasks__does_again_what_is_missing_or_damaged_and_nothing_else(
    tmp_path_factory, root, damage
):
    task = WriteBytes(f"{root}{tmp_path_factory.mktemp('tasks')}")
    assert task.run() == WANTED
    for item, what in damage:
        if what == "longer":
            storage.write_bytes(task.path(item), bytes(99))
        path = f"{task.folder}/receipts/{item:06d}.json" if what == "receipt" else task.path(item)
        if what != "longer" and storage.exists(path):
            storage.remove(path)
    assert task.run() == WANTED
    hit = {item for item, _ in damage}
    assert [task.turns(item) for item in range(NUM_ITEMS)] == [
        1 + (item in hit) for item in range(NUM_ITEMS)
    ]


def test_run_file_tasks__keeps_what_a_failed_run_finished(tmp_path):
    with pytest.raises(EngineError, match="no luck"):
        WriteBytes(str(tmp_path), fails_at=3).run()
    receipts = f"{tmp_path}/receipts"
    assert finished_summaries(receipts, 3) == WANTED[:3]
    assert finished_summaries(receipts, NUM_ITEMS) is None
    assert WriteBytes(str(tmp_path)).run() == WANTED
    assert [WriteBytes(str(tmp_path)).turns(item) for item in range(NUM_ITEMS)] == [1] * NUM_ITEMS


def test_run_file_tasks__other_files_among_the_receipts_are_none(tmp_path):
    folder = Path(tmp_path / "receipts")
    folder.mkdir()
    for name in ("notes.json", "000009.json"):
        (folder / name).write_text("{}")
    assert WriteBytes(str(tmp_path)).run() == WANTED


@dataclass(frozen=True)
class Opens(FileTask[list[int], int]):
    def open(self):
        return [7]

    def __call__(self, item, opened):
        return TaskResult([], opened[0] + item)


def test_run_file_tasks__hands_on_what_the_task_opens(tmp_path):
    assert run_file_tasks(LocalEngine(), Opens(), 3, str(tmp_path), "open") == [7, 8, 9]
