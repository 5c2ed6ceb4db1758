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
from pipelines.engines.attempts import Attempts, Backlog
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
        attempts = Attempts(label, self._attempts, self._first_pause_s)
        if self._workers:
            yield from self._map_in_processes(task, Backlog(items), attempts)
        else:
            yield from _map_here(task, Backlog(items), attempts)
        self.retries += attempts.retries
        attempts.raise_failures(len(items))

    def _map_in_processes(
        self, task: Task[Item, Opened, Result], backlog: Backlog[Item], attempts: Attempts
    ) -> Iterator[tuple[Item, Result]]:
        pool = self._pool_for(len(backlog))
        with _written(task) as file:
            yield from pool.run(file, self.limit_s(task.resources), backlog, attempts)

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
    task: Task[Item, Opened, Result], backlog: Backlog[Item], attempts: Attempts
) -> Iterator[tuple[Item, Result]]:
    opened = task.open()
    while len(backlog):
        item = backlog.pop()
        if item is None:
            time.sleep(backlog.pause_s() or 0.0)
            continue
        try:
            result = task(item, opened)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (counted, retried, raised later)
            attempts.failed(item, error, backlog)
        else:
            attempts.succeeded += 1
            yield item, result


class _Pool:
    """Worker processes that start when they are needed; one that ends is replaced."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._workers: list[WorkerProcess] = []
        weakref.finalize(self, _end_all, self._workers)

    def run(
        self, task_file: str, limit_s: float, backlog: Backlog[Item], attempts: Attempts
    ) -> Iterator[tuple[Item, Any]]:
        """Give (item, result) as they finish."""
        try:
            while len(backlog) or self._busy():
                self._hand_out(task_file, limit_s, backlog)
                for worker in self._answering(backlog):
                    yield from self._collect(worker, limit_s, backlog, attempts)
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
        try:
            for worker in self._workers:
                worker.send(task_file, limit_s, None)
            return sorted((one.number, self._answer_of(one, limit_s)) for one in self._workers)
        finally:
            for worker in self._busy():
                self._end(worker)

    def _answer_of(self, worker: WorkerProcess, limit_s: float) -> Any:
        try:
            outcome = worker.answer()
        except (EOFError, OSError) as error:
            raise EngineError(str(_cause_of_death(worker, limit_s))) from error
        return outcome.unwrap()

    def _busy(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers if worker.busy]

    def _hand_out(self, task_file: str, limit_s: float, backlog: Backlog[Item]) -> None:
        """Give each worker that waits an item, as long as one is due."""
        while (worker := self._waiting(len(backlog))) and (item := backlog.pop()) is not None:
            worker.send(task_file, limit_s, item)

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

    def _answering(self, backlog: Backlog[Item]) -> list[WorkerProcess]:
        """Workers that have answered or died; none if an item for one that waits is due before."""
        busy = self._busy()
        pause_s = backlog.pause_s() if len(busy) < self._size else None
        ready = wait([worker.connection for worker in busy], pause_s)
        return [worker for worker in busy if worker.connection in ready]

    def _collect(
        self, worker: WorkerProcess, limit_s: float, backlog: Backlog[Item], attempts: Attempts
    ) -> Iterator[tuple[Item, Any]]:
        """Take an answer: give the result, or see to what went wrong."""
        try:
            outcome = worker.answer()
        except (EOFError, OSError):
            error = _cause_of_death(worker, limit_s)
            self._end(worker)
            attempts.failed(worker.item, error, backlog)
            return
        try:
            result = outcome.unwrap()
        except Exception as error:  # noqa: BLE001  (counted, retried, raised at the end)
            if isinstance(error, MemoryError):  # what it holds would fail its next item, too
                self._end(worker)
            attempts.failed(worker.item, error, backlog)
        else:
            attempts.succeeded += 1
            yield worker.item, result

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
