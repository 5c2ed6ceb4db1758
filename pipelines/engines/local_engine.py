"""The engine of one machine: a few worker processes, or this process itself."""

import contextlib
import pickle
import platform
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from curation.errors import EngineError
from curation.stage import Engine, Item, Opened, Result, Task
from pipelines.engines.attempts import Backlog
from pipelines.engines.outcome import TimeLimitError, WorkerDiedError
from pipelines.engines.worker_process import WorkerProcess


class LocalEngine(Engine):
    """Runs tasks in worker processes, which start once, or in this process (no workers).

    Workers read a task from a file when they meet it first, and open it then. One that dies, or
    that is ended since an item takes longer than its stage allows, costs that item a try and the
    others nothing. What runs in this process nothing can stop.
    """

    def __init__(
        self,
        workers: int = 0,
        *,
        attempts: int = 3,
        first_pause_s: float = 0.5,
        time_limit_s: float | None = None,
    ) -> None:
        self.time_limit_s = time_limit_s
        self._workers = workers
        self._attempts = attempts
        self._first_pause_s = first_pause_s
        self._pools: dict[int, _Pool] = {}

    @property
    def workers(self) -> int:
        """Processes that run at once."""
        return max(1, self._workers)

    def everywhere(self, task: Task[None, Opened, Result], label: str) -> list[tuple[str, Result]]:
        """Run a task once in each worker (see `Engine.everywhere`)."""
        if not self._workers:
            return super().everywhere(task, label)
        with _written(task) as file:
            found = self._pool_for(self._workers).run_once_each(file, self.limit_s(task.resources))
        return [(f"{platform.node()} worker {number + 1}", result) for number, result in found]

    def map(
        self, task: Task[Item, Opened, Result], items: Sequence[Item], label: str
    ) -> Iterator[tuple[Item, Result]]:
        """Run a task on every item (see `Engine.map`)."""
        if not items:
            return
        backlog = Backlog(
            items,
            label,
            task.name_of,
            attempts=self._attempts,
            first_pause_s=self._first_pause_s,
        )
        if self._workers:
            with _written(task) as file:
                pool = self._pool_for(len(items))
                yield from pool.run(file, self.limit_s(task.resources), backlog)
        else:
            yield from _map_here(task, backlog)
        self.retries += backlog.retries
        backlog.raise_failures()

    def _pool_for(self, num_items: int) -> "_Pool":
        """All workers, or for a single item one that takes all cores."""
        size = self._workers if num_items > 1 else 1
        if size not in self._pools:
            self._pools[size] = _Pool(size)
        return self._pools[size]


@contextlib.contextmanager
def _written(task: Task[Item, Opened, Result]) -> Iterator[str]:
    """A file with the task, under a name of its own."""
    with tempfile.TemporaryDirectory(prefix="curate-task-") as folder:
        file = Path(folder) / uuid.uuid4().hex
        file.write_bytes(pickle.dumps(task))
        yield str(file)


def _map_here(
    task: Task[Item, Opened, Result], backlog: Backlog[Item]
) -> Iterator[tuple[Item, Result]]:
    """Run a task in this process."""
    opened = task.open()
    while len(backlog):
        item = backlog.pop()
        if item is None:
            time.sleep(backlog.pause_s() or 0.0)
            continue
        try:
            result = task(item, opened)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (counted, retried, raised later)
            backlog.failed(item, error)
        else:
            backlog.succeeded()
            yield item, result


class _Pool:
    """Worker processes that start when they are needed; one that ends is replaced."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._workers: list[WorkerProcess] = []
        weakref.finalize(self, _end_all, self._workers)  # a method would keep this object

    def run(
        self, task_file: str, limit_s: float, backlog: Backlog[Item]
    ) -> Iterator[tuple[Item, Any]]:
        """Give (item, result) as they finish."""
        sent: dict[WorkerProcess, Item] = {}
        try:
            while len(backlog) or self._busy():
                # Each worker that waits gets an item, as long as one is due.
                while free := self._waiting(len(backlog)):
                    if (item := backlog.pop()) is None:
                        break
                    free.send(task_file, limit_s, item)
                    sent[free] = item
                # Until one answers or dies, or an item for one that waits is due.
                busy = self._busy()
                pause_s = backlog.pause_s() if len(busy) < self._size else None
                ready = wait([one.connection for one in busy], pause_s)
                for worker in busy:
                    if worker.connection in ready:
                        yield from self._collect(worker, sent[worker], limit_s, backlog)
        finally:  # what an abandoned map had in flight is nobody's any more
            for worker in self._busy():
                self._end(worker)

    def run_once_each(self, task_file: str, limit_s: float) -> list[tuple[int, Any]]:
        """Give (number, result) of every worker.

        Raises:
            EngineError: one has died at it.
        """
        for number in self._free_numbers():
            self._workers.append(WorkerProcess.start(number, self._size))
        results = []
        try:
            for worker in self._workers:
                worker.send(task_file, limit_s, None)
            for worker in sorted(self._workers, key=lambda one: one.number):
                try:
                    outcome = worker.answer()
                except (EOFError, OSError) as error:
                    raise EngineError(str(_cause_of_death(worker, limit_s))) from error
                results.append((worker.number, outcome.unwrap()))
        finally:
            for worker in self._busy():
                self._end(worker)
        return results

    def _busy(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers if worker.busy]

    def _waiting(self, num_items: int) -> WorkerProcess | None:
        """A worker that waits, started if there is more to do than there are; None if all work."""
        waiting = next((worker for worker in self._workers if not worker.busy), None)
        if waiting is None and num_items and (free := self._free_numbers()):
            waiting = WorkerProcess.start(free[0], self._size)
            self._workers.append(waiting)
        return waiting

    def _free_numbers(self) -> list[int]:
        taken = {worker.number for worker in self._workers}
        return [number for number in range(self._size) if number not in taken]

    def _collect(
        self, worker: WorkerProcess, item: Item, limit_s: float, backlog: Backlog[Item]
    ) -> Iterator[tuple[Item, Any]]:
        """Take an answer: give the result, or see to what went wrong."""
        try:
            outcome = worker.answer()
        except (EOFError, OSError):
            error = _cause_of_death(worker, limit_s)
            self._end(worker)
            backlog.failed(item, error)
            return
        try:
            result = outcome.unwrap()
        except Exception as error:  # noqa: BLE001  (counted, retried, raised at the end)
            if isinstance(error, MemoryError):  # what it holds would fail its next item, too
                self._end(worker)
            backlog.failed(item, error)
        else:
            backlog.succeeded()
            yield item, result

    def _end(self, worker: WorkerProcess) -> None:
        worker.end()
        self._workers.remove(worker)


def _end_all(workers: list[WorkerProcess]) -> None:
    for worker in workers:
        worker.end()


def _cause_of_death(worker: WorkerProcess, limit_s: float) -> Exception:
    where = worker.last_words()
    if where:
        return TimeLimitError.after(limit_s, where)
    return WorkerDiedError(f"its worker process died ({worker.cause()})")
