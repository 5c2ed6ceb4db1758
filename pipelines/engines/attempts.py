"""Items of a map that wait, and the failures of those that were tried."""

import heapq
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Generic

from curation.errors import CurateError, EngineError
from curation.stage import Item
from pipelines.engines.outcome import named

logger = logging.getLogger(__name__)

_MOST_LOSSES = 10
"""Workers that may vanish under an item, such as with their nodes, before it is blamed."""


class Backlog(Generic[Item]):
    """Items in order, some of them only due after a pause."""

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._numbers = itertools.count()
        self._heap = [(0.0, next(self._numbers), item) for item in items]

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, item: Item, pause_s: float = 0.0) -> None:
        """Let an item wait; without a pause it is due at once."""
        due = time.monotonic() + pause_s if pause_s else 0.0
        heapq.heappush(self._heap, (due, next(self._numbers), item))

    def pop(self) -> Item | None:
        """The next item that is due, or None."""
        if self.pause_s() != 0.0:
            return None
        return heapq.heappop(self._heap)[2]

    def pause_s(self) -> float | None:
        """Seconds until an item is due; None where none waits."""
        if not self._heap:
            return None
        return max(0.0, self._heap[0][0] - time.monotonic())


class Attempts:
    """The failures of one map over items, with a longer pause after each."""

    def __init__(self, label: str, limit: int, first_pause_s: float) -> None:
        self._label = label
        self._limit = limit
        self._first_pause_s = first_pause_s
        self._counts: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._given_up: dict[str, tuple[Any, BaseException]] = {}
        self.succeeded = 0
        """Items that gave their result."""
        self.retries = 0
        """Failures that were, or will be, tried again."""

    def failed(self, item: Item, error: BaseException, backlog: Backlog[Item]) -> None:
        """Record a failure; put the item back after a pause, or set it aside for good.

        Raises:
            CurateError: the error itself, where another try cannot mend it.
        """
        if isinstance(error, CurateError) and error.is_final:
            raise error
        name = describe(item)
        self._counts[name] += 1
        if self._counts[name] >= self._limit:
            logger.warning("%s: shard %s is set aside: %s", self._label, name, named(error))
            self._given_up[name] = (item, error)
            return
        pause_s = self._first_pause_s * 4 ** (self._counts[name] - 1)
        text = "%s: shard %s failed, trying again in %.3g s: %s"
        logger.warning(text, self._label, name, pause_s, named(error))
        self.retries += 1
        backlog.put(item, pause_s)

    def lost(self, item: Item, error: BaseException, backlog: Backlog[Item]) -> None:
        """Record that an item's worker vanished through no fault of the item's, such as a node's.

        Raises:
            CurateError: see `failed`.
        """
        name = describe(item)
        self._losses[name] += 1
        if self._losses[name] > _MOST_LOSSES:
            self.failed(item, error, backlog)
            return
        self.retries += 1
        backlog.put(item)

    def raise_failures(self, num_items: int) -> None:
        """Raise if items were given up; the finished ones are kept on disk.

        Raises:
            EngineError: names the items and the first cause; or the engine has lost items itself.
        """
        if not self._given_up:
            if self.succeeded != num_items:
                raise EngineError(
                    f"{self._label}: {self.succeeded} results of {num_items} shards; the engine "
                    "lost the others, please report this; the same command goes on from here"
                )
            return
        names = ", ".join(list(self._given_up)[:5])
        more = len(self._given_up) - 5
        first = next(iter(self._given_up.values()))[1]
        raise EngineError(
            f"{self._label}: {len(self._given_up)} of {num_items} shards failed {self._limit} "
            f"times ({names}{f' and {more} more' if more > 0 else ''}): "
            f"{named(first)}; the others are kept",
            [(item, named(error)) for item, error in self._given_up.values()],
        ) from first


def describe(item: Any) -> str:
    """Short name of an item."""
    return str(item[0] if isinstance(item, tuple) else item)[:120]
