"""Blocks of work side by side in one worker, each on one thread.

Numerical libraries split every product among their own threads and wait for the slowest; on a
machine that others use, too, that wait costs up to ten times the work. Threads that take a block
each never wait before the last.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_NAME = "side-by-side"


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """Results in the order of the items; items are drawn as they are needed.

    At most two items a thread are on their way, so what is held does not grow with the items.
    Work that calls this again goes on in its own thread.
    """
    if threads <= 1 or threading.current_thread().name.startswith(_NAME):
        with _one_thread():
            yield from map(work, items)
        return
    pool, waiting = _pool(threads, os.getpid()), deque[Future[Result]]()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for left in waiting:
            left.cancel()


def side_by_side(work: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Do the work on every item, on as many threads as products may use."""
    import torch

    for _ in in_threads(work, items, torch.get_num_threads()):
        pass


def limit_threads(count: int) -> None:
    """Let products of the calling thread run on so many threads."""
    import torch

    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products of the calling thread run on it alone until this ends."""
    import torch

    before = torch.get_num_threads()
    limit_threads(1)
    try:
        yield
    finally:
        limit_threads(before)


@cache
def _pool(count: int, process: int) -> ThreadPoolExecutor:
    """Threads that each compute alone; those of this process, since a fork has none of them."""
    import torch

    before, all_here = torch.get_num_threads(), threading.Barrier(count)

    def start(_: int) -> None:
        torch.get_num_threads()  # a thread takes the common number at its first question
        torch.set_num_threads(1)  # from then on its own
        all_here.wait()

    pool = ThreadPoolExecutor(count, _NAME)
    list(pool.map(start, range(count)))
    torch.set_num_threads(before)
    return pool
