"""The engine of one machine: in this process, or in a few worker processes."""

import ctypes
import logging
import multiprocessing
import os
import pickle
import platform
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from curation.stage import Engine, Item, Result, Task
from embedder.encoder import available_cpus
from pipelines.attempts import Attempts, Backlog
from pipelines.memory_guard import give_back, private_bytes

logger = logging.getLogger(__name__)

_worker_state: dict[str, Any] = {}
"""In a worker process: the task that it has open, under its file's name."""


_WORTH_GIVING_BACK = 1 << 28
"""Bytes; looking for them takes a tenth of a second."""


class LocalEngine(Engine):
    """Runs tasks in this process (one worker), or in worker processes started once.

    Workers read a task from a file when they meet it first, and open it then. One that dies takes
    only its unfinished items with it: they are tried again.
    """

    def __init__(self, workers: int = 1, *, attempts: int = 3, first_pause_s: float = 0.5) -> None:
        self._workers = workers
        self._attempts = attempts
        self._first_pause_s = first_pause_s
        self._pool: ProcessPoolExecutor | None = None

    @property
    def workers(self) -> int:
        """Processes that run at once."""
        return self._workers

    def everywhere(self, task: Task[None, Result], label: str) -> list[tuple[str, Result]]:
        """Run a task once in each worker (see `Engine.everywhere`)."""
        if self._workers == 1:
            return super().everywhere(task, label)
        pool, host = self._processes(), platform.node()
        text = pickle.dumps(task)
        waiting = [pool.submit(_run_once, text) for _ in range(self._workers)]
        found = sorted(future.result() for future in waiting)
        return [(f"{host} worker {number + 1}", pickle.loads(r)) for number, r in found]

    def map(
        self, task: Task[Item, Result], items: Sequence[Item], label: str
    ) -> Iterator[tuple[Item, Result]]:
        """Run a task on every item (see `Engine.map`)."""
        if self._workers == 1 or len(items) <= 1:
            before = private_bytes()
            yield from self._map_here(task, items, label)
            if self._workers > 1 and private_bytes() > before + _WORTH_GIVING_BACK:
                give_back()  # what comes next runs beside this process
        else:
            yield from self._map_in_processes(task, items, label)

    def _map_here(
        self, task: Task[Item, Result], items: Sequence[Item], label: str
    ) -> Iterator[tuple[Item, Result]]:
        if not items:
            return
        attempts = self._new_attempts(label)
        backlog = Backlog(items)
        opened = task.open()
        while len(backlog):
            item = backlog.pop()
            if item is None:
                time.sleep(backlog.pause_s() or 0.0)
                continue
            try:
                result = task(item, opened)
            except Exception as error:  # noqa: BLE001  (counted, retried, raised at the end)
                attempts.failed(item, error, backlog)
            else:
                attempts.succeeded += 1
                yield item, result
        self.retries += attempts.retries
        attempts.raise_failures(len(items))

    def _map_in_processes(
        self, task: Task[Item, Result], items: Sequence[Item], label: str
    ) -> Iterator[tuple[Item, Result]]:
        attempts = self._new_attempts(label)
        backlog, suspects = Backlog(items), Backlog[Item]()
        with tempfile.TemporaryDirectory(prefix="curate-task-") as folder:
            file = Path(folder) / uuid.uuid4().hex
            file.write_bytes(pickle.dumps(task))
            while len(backlog) or len(suspects):
                try:
                    # One at a time, so that only the item which kills its worker is blamed.
                    yield from self._drain(str(file), suspects, suspects, attempts, 1)
                    in_flight = 2 * self._workers
                    yield from self._drain(str(file), backlog, suspects, attempts, in_flight)
                except BrokenProcessPool:
                    logger.warning("%s: a worker process died; its items are tried again", label)
                    self._pool = None
        self.retries += attempts.retries
        attempts.raise_failures(len(items))

    def _new_attempts(self, label: str) -> Attempts:
        return Attempts(label, self._attempts, self._first_pause_s)

    def _processes(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("forkserver")
            started, all_here = context.Value("i", 0), context.Barrier(self._workers)
            self._pool = ProcessPoolExecutor(
                self._workers, context, _set_up_worker, (self._workers, started, all_here)
            )
        return self._pool

    def _drain(
        self,
        task_file: str,
        backlog: Backlog[Item],
        suspects: Backlog[Item],
        attempts: Attempts,
        in_flight: int,
    ) -> Iterator[tuple[Item, Any]]:
        """Run until `backlog` is empty; what is in flight when a worker dies becomes suspect."""
        running: dict[Future[Any], Item] = {}
        pool = self._processes()
        while len(backlog) or running:
            while len(running) < in_flight and (item := backlog.pop()) is not None:
                running[_submit(pool, task_file, item)] = item
            if not running:
                time.sleep(backlog.pause_s() or 0.0)
            pause_s = backlog.pause_s() if len(running) < in_flight else None
            for future in wait(running, pause_s, FIRST_COMPLETED).done:
                item = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    if in_flight == 1:
                        attempts.failed(item, error, suspects)
                    for suspect in [item, *running.values()] if in_flight > 1 else []:
                        suspects.put(suspect)
                    raise error
                if error is None:
                    attempts.succeeded += 1
                    yield item, future.result()
                else:
                    attempts.failed(item, error, backlog)


def _submit(pool: ProcessPoolExecutor, task_file: str, item: Any) -> Future[Any]:
    """The answer to come; where a worker has died meanwhile, one that says so already.

    A pool that is about to break has closed its pipes: it cannot start its next worker (OSError).
    """
    try:
        return pool.submit(_run_item, task_file, item)
    except (BrokenProcessPool, OSError) as error:
        broken: Future[Any] = Future()
        broken.set_exception(BrokenProcessPool(str(error)))
        return broken


_SECONDS_TO_MEET = 120.0
_place: dict[str, Any] = {}
"""In a worker process: its number, and where all workers meet."""


def _run_once(task: bytes) -> tuple[int, bytes]:
    """Run a task in this worker and in no other twice: none goes on before all have begun."""
    _place["all_here"].wait(_SECONDS_TO_MEET)
    opened = pickle.loads(task)
    return _place["number"], pickle.dumps(opened(None, opened.open()))


def _set_up_worker(workers: int, started: Any, all_here: Any) -> None:
    """In a new worker: share cores and GPUs out, before a library that computes is loaded.

    started: number of workers before this one, in memory that all of them share. all_here: a
    barrier for all of them.
    """
    os.environ["OMP_NUM_THREADS"] = str(max(1, available_cpus() // workers))
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    _place.update(number=number, all_here=all_here)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpu = gpu_of_worker(number, devices, len(list(Path("/dev").glob("nvidia[0-9]*"))))
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    _keep_freed_memory()


def gpu_of_worker(number: int, visible: str | None, installed: int) -> str | None:
    """The one GPU that a worker shall see: they take turns. None where there is no choice.

    number: of the worker, from 0. visible: the devices that this process is allowed, as CUDA's
    environment variable names them. installed: devices of the machine.
    """
    names = [str(device) for device in range(installed)] if visible is None else visible.split(",")
    return names[number % len(names)].strip() if len(names) > 1 else None


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h


def _keep_freed_memory() -> None:
    """Have glibc keep what one shard frees for the next: new pages cost more than filling them."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 256 << 20)
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_ARENA_MAX, 4)


_SECONDS_BEFORE_REST = 1.0


def _rest_after(seconds: float) -> None:
    """Have a worker that still waits then give back the memory that it keeps. 0: not at all.

    By a signal, as Arrow's allocator gives back only what the thread that asks had taken.
    """
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda *_: give_back())
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _run_item(task_file: str, item: Any) -> Any:
    _rest_after(0)
    try:
        return _work_on(task_file, item)
    finally:
        _rest_after(_SECONDS_BEFORE_REST)


def _work_on(task_file: str, item: Any) -> Any:
    if task_file not in _worker_state:
        _worker_state.clear()  # the last task's model goes first
        task = pickle.loads(Path(task_file).read_bytes())
        _worker_state[task_file] = (task, task.open())
    task, opened = _worker_state[task_file]
    return task(item, opened)
