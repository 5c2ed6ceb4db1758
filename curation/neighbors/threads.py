"""Threads inside one worker: blocks of rows side by side, each product on one thread.

Numerical libraries split every product among their own threads and wait for the slowest; on a
machine that others use, too, that wait costs up to ten times the work. Blocks do not wait.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """Results in the order of the items; items are drawn as they are needed.

    At most two items a thread are on their way, so what is held does not grow with the items.
    """
    if threads <= 1:
        limit_threads(1)
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads, initializer=limit_threads, initargs=(1,)) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def limit_threads(count: int) -> None:
    """Let products of the calling thread run on so many threads."""
    import torch

    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
