"""Stops an item that makes its worker grow past a limit, with the cause as its error."""

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from curation.errors import StageError

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_UNWIND = 5.0
_STATM = Path("/proc/self/statm")


class MemoryLimitError(StageError):
    """A worker grew past what its task may hold."""


class _Stopped(BaseException):
    """Raised inside the thread that works; a task cannot take it for an error of its data."""


class MemoryGuard:
    """Watches this process while an item runs. Where there is no /proc it sees nothing."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Raise `MemoryLimitError` from what runs inside, once the process holds too much.

        A process that does not come back to Python in time is ended.
        """
        finished, lock = threading.Event(), threading.Lock()
        watcher = threading.Thread(
            target=self._watch, args=(threading.get_ident(), finished, lock), daemon=True
        )
        watcher.start()
        try:
            yield
            with lock:  # what the watcher raises from here on would hit the next item
                finished.set()
        except _Stopped as stop:
            raise MemoryLimitError(
                f"its worker held {private_bytes() / 1e9:.2f} GB, and its stage may hold "
                f"{self._limit_bytes / 1e9:.2f}; use smaller shards or declare more memory"
            ) from stop
        finally:
            finished.set()

    def _watch(self, worker: int, finished: threading.Event, lock: threading.Lock) -> None:
        while not finished.wait(_SECONDS_BETWEEN_LOOKS):
            if private_bytes() <= self._limit_bytes:
                continue
            with lock:
                if finished.is_set():
                    return
                _raise_in(worker)
            if not finished.wait(_SECONDS_TO_UNWIND):
                os._exit(1)


def private_bytes() -> int:
    """Bytes that this process holds in memory, shared pages left out; 0 where that is unknown."""
    if not _STATM.exists():
        return 0
    resident, shared = map(int, _STATM.read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Give to the system what the last task freed: allocators keep it, and it would count here."""
    import pyarrow as pa

    gc.collect()
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU library's
    if trim is not None:
        trim(0)


def _raise_in(thread: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Stopped))
