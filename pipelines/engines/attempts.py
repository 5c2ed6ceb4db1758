"""The items of a map that wait, and the failures of those that were tried."""

import heapq
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Generic

from curation.errors import CurateError, EngineError
from curation.stage import Item
from pipelines.engines.outcome import named

logger = logging.getLogger(__name__)

_MOST_LOSSES = 10
"""Workers that may vanish under an item, such as with their nodes, before it is blamed."""


class Backlog(Generic[Item]):
    """Items in order; one that has failed is due again after a pause, longer each time."""

    def __init__(
        self,
        items: Iterable[Item],
        label: str,
        name_of: Callable[[Item], str] = str,
        *,
        attempts: int = 3,
        first_pause_s: float = 0.5,
    ) -> None:
        """label: of the map, for messages; name_of: what they call an item."""
        self.name_of = name_of
        self._label = label
        self._attempts, self._first_pause_s = attempts, first_pause_s
        self._numbers = itertools.count()
        self._heap = [(0.0, next(self._numbers), item) for item in items]
        self._num_items = len(self._heap)
        self._failures: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._given_up: dict[str, tuple[Item, BaseException]] = {}
        self._succeeded = 0
        self.retries = 0
        """Failures that were, or will be, tried again."""

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

    def succeeded(self) -> None:
        """Record that an item has given its result."""
        self._succeeded += 1

    def failed(self, item: Item, error: BaseException) -> None:
        """Record a failure; put the item back after a pause, or set it aside for good.

        Raises:
            CurateError: the error itself, where another try cannot mend it.
        """
        if isinstance(error, CurateError) and error.is_final:
            raise error
        name = self.name_of(item)
        self._failures[name] += 1
        if self._failures[name] >= self._attempts:
            logger.warning("%s: shard %s is set aside: %s", self._label, name, named(error))
            self._given_up[name] = (item, error)
            return
        pause_s = self._first_pause_s * 4 ** (self._failures[name] - 1)
        text = "%s: shard %s failed, trying again in %.3g s: %s"
        logger.warning(text, self._label, name, pause_s, named(error))
        self.retries += 1
        self.put(item, pause_s)

    def lost(self, item: Item, error: BaseException) -> None:
        """Record that an item's worker vanished through no fault of the item's, such as a node's.

        Raises:
            CurateError: see `failed`.
        """
        name = self.name_of(item)
        self._losses[name] += 1
        if self._losses[name] > _MOST_LOSSES:
            self.failed(item, error)
            return
        self.retries += 1
        self.put(item)

    def raise_failures(self) -> None:
        """Raise if items were given up; the finished ones are kept on disk.

        Raises:
            EngineError: names the items and the first cause; or the engine has lost items itself.
        """
        if not self._given_up:
            if self._succeeded != self._num_items:
                raise EngineError(
                    f"{self._label}: {self._succeeded} results of {self._num_items} shards; the "
                    "engine lost the others, please report this; the same command goes on from here"
                )
            return
        names = ", ".join(list(self._given_up)[:5])
        more = len(self._given_up) - 5
        first = next(iter(self._given_up.values()))[1]
        raise EngineError(
            f"{self._label}: {len(self._given_up)} of {self._num_items} shards failed "
            f"{self._attempts} times ({names}{f' and {more} more' if more > 0 else ''}): "
            f"{named(first)}; the others are kept",
            [(item, named(error)) for item, error in self._given_up.values()],
        ) from first
