"""A worker of this machine: a process that opens tasks and works on the items it is sent.

It ends with its driver. Nothing else would end it after a SIGKILL: it would go on writing.
"""

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import pickle
import platform
import signal
import tempfile
import threading
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

from curation.stage import Item, Opened, Result, Task
from embedder.encoder import available_cpus
from pipelines.engines.memory_guard import give_back
from pipelines.engines.outcome import Outcome
from pipelines.engines.time_guard import OPENING_S, ending_after, place_in

_SECONDS_BEFORE_REST = 1.0
"""A worker that waits for longer gives back the memory that it keeps for its next item."""
_SECONDS_TO_END = 5.0


@dataclass(eq=False)
class WorkerProcess:
    """One worker as the driver sees it."""

    number: int
    """From 0: with a GPU each, its GPU."""
    process: BaseProcess
    connection: Connection
    hang: IO[str]
    """Says where the worker was when it ran out of time."""
    busy: bool = False
    """Whether the item that it was sent last was not answered yet."""

    @classmethod
    def start(cls, number: int, workers: int) -> "WorkerProcess":
        """Start one of several processes that wait for items."""
        context = multiprocessing.get_context("forkserver")
        here, there = context.Pipe()
        hang = tempfile.NamedTemporaryFile("r", prefix="curate-hang-")  # noqa: SIM115
        process = context.Process(
            target=_serve, args=(there, hang.name, number, workers), daemon=True
        )
        process.start()
        there.close()  # else its end would not be seen
        return cls(number, process, here, hang)

    def send(self, task_file: str, limit_s: float, item: object) -> None:
        """Hand over an item. Where the worker has died, the next `answer` says so."""
        self.busy = True
        with contextlib.suppress(OSError):
            self.connection.send((task_file, limit_s, item))

    def answer(self) -> Outcome[Any]:
        """What became of its item.

        Raises:
            EOFError, OSError: the worker has died.
        """
        outcome: Outcome[Any] = self.connection.recv()
        self.busy = False
        return outcome

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join(_SECONDS_TO_END)
        self.connection.close()
        self.hang.close()

    def last_words(self) -> str:
        """Where it was stopped for want of time, as `FILE:LINE FUNCTION`; empty if it was not."""
        self.process.join(_SECONDS_TO_END)
        return place_in(self.hang.read())

    def cause(self) -> str:
        """How it ended."""
        self.process.join(_SECONDS_TO_END)
        code = self.process.exitcode
        if code is not None and -code in set(signal.Signals):
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}"


def _serve(connection: Connection, hang_file: str, number: int, workers: int) -> None:
    """Answer items until the driver closes the connection, or ends."""
    _end_with_driver()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to answer
    _set_up(number, workers)
    opened: dict[str, Any] = {}
    with Path(hang_file).open("w") as hang, contextlib.suppress(EOFError, OSError):
        while True:
            if not connection.poll(_SECONDS_BEFORE_REST):
                give_back()
            work = partial(_work_on, opened, hang, *connection.recv())
            connection.send(Outcome.of(work))


def _work_on(
    opened: dict[str, tuple[Task[Item, Opened, Result], Opened]],
    hang: IO[str],
    task_file: str,
    limit_s: float,
    item: Item,
) -> Result:
    if task_file not in opened:
        with ending_after(max(limit_s, OPENING_S), hang):
            opened.clear()  # the last task's model goes first
            task = pickle.loads(Path(task_file).read_bytes())
            opened[task_file] = (task, task.open())
    task, model = opened[task_file]
    with ending_after(limit_s, hang):
        return task(item, model)


def _end_with_driver() -> None:
    """End this process once the pipe to its driver closes, which is when the driver is gone.

    A thread waits for that, on every system. It stands still while foreign code keeps Python's
    lock, so on Linux the kernel kills this process at the same event.
    """
    driver = multiprocessing.parent_process()
    assert driver is not None, "called in a worker only"

    def exit_after(driver: BaseProcess) -> None:
        driver.join()
        os._exit(1)

    threading.Thread(target=exit_after, args=(driver,), daemon=True).start()
    with contextlib.suppress(AttributeError, OSError):
        pipe = driver.sentinel
        fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)


def _set_up(number: int, workers: int) -> None:
    """Share cores and GPUs out, before a library that computes is loaded."""
    if workers > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_cpus() // workers))
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
