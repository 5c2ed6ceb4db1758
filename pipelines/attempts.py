"""Counts the failures of items: which to try again, and what to say of those given up."""

import logging
from collections import Counter
from typing import Any

from curation.errors import ConfigError, EngineError, LedgerError, SchemaError, SpaceError

logger = logging.getLogger(__name__)

_HOPELESS = (ConfigError, LedgerError, SchemaError, SpaceError)
"""Errors that another try cannot mend."""


class Attempts:
    """The failures of one map over items."""

    def __init__(self, label: str, limit: int) -> None:
        self._label = label
        self._limit = limit
        self._counts: Counter[str] = Counter()
        self._given_up: dict[str, BaseException] = {}

    def failed(self, item: Any, error: BaseException) -> bool:
        """Record a failure; say whether to try the item again.

        Raises:
            CurateError: the error itself, where another try cannot mend it.
        """
        if isinstance(error, _HOPELESS):
            raise error
        name = describe(item)
        self._counts[name] += 1
        if self._counts[name] < self._limit:
            logger.warning("%s: shard %s failed, trying again: %s", self._label, name, error)
            return True
        self._given_up[name] = error
        return False

    def raise_failures(self, num_items: int) -> None:
        """Raise if items were given up; the finished ones are kept on disk.

        Raises:
            EngineError: names the items and the first cause.
        """
        if not self._given_up:
            return
        names = ", ".join(list(self._given_up)[:5])
        more = len(self._given_up) - 5
        first = next(iter(self._given_up.values()))
        raise EngineError(
            f"{self._label}: {len(self._given_up)} of {num_items} shards failed {self._limit} "
            f"times ({names}{f' and {more} more' if more > 0 else ''}): "
            f"{type(first).__name__}: {first}; the others are kept: run the same command again"
        ) from first


def describe(item: Any) -> str:
    """Short name of an item."""
    return str(item[0] if isinstance(item, tuple) else item)[:120]
