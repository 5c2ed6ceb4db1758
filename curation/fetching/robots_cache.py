"""The rules of each origin, asked for once for all rows; a failure is soon asked about again."""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from curation.fetching.connections import Origin
from curation.fetching.outcomes import FetchError
from curation.fetching.robots import RobotsRules

_MAX_ORIGINS = 10_000
_MAX_RETRY_AFTER_S = 60.0


@dataclass
class _Entry:
    found: Future[RobotsRules | FetchError] = field(default_factory=Future)
    ends_at: float = math.inf


class RobotsCache:
    """Rules by origin. The first who needs them asks; the others wait for the answer."""

    def __init__(self, ask: Callable[[Origin], RobotsRules], failure_s: float) -> None:
        """failure_s: how long a failure holds for those who come after it, at least."""
        self._ask = ask
        self._failure_s = failure_s
        self._lock = threading.Lock()
        self._entries: dict[Origin, _Entry] = {}  # oldest first

    def rules_of(self, origin: Origin) -> RobotsRules:
        """Give the rules that hold for an origin.

        Raises:
            FetchError: they could not be had.
        """
        entry, is_new = self._entry_of(origin)
        if is_new:
            self._fill(entry, origin)
        found = entry.found.result()
        if isinstance(found, FetchError):
            left = max(entry.ends_at - time.monotonic(), 0.0)
            raise FetchError(found.reason, None if found.retry_after_s is None else left)
        return found

    def _entry_of(self, origin: Origin) -> tuple[_Entry, bool]:
        with self._lock:
            entry = self._entries.get(origin)
            if entry is not None and time.monotonic() < entry.ends_at:
                return entry, False
            if len(self._entries) >= _MAX_ORIGINS:
                del self._entries[next(iter(self._entries))]
            self._entries.pop(origin, None)
            entry = self._entries[origin] = _Entry()
            return entry, True

    def _fill(self, entry: _Entry, origin: Origin) -> None:
        try:
            entry.found.set_result(self._ask(origin))
        except FetchError as error:
            wanted_s = min(error.retry_after_s or 0.0, _MAX_RETRY_AFTER_S)
            entry.ends_at = time.monotonic() + max(self._failure_s, wanted_s)
            entry.found.set_result(error)
        except BaseException as error:  # a mistake of ours: whoever waits must hear of it
            entry.ends_at = 0.0
            entry.found.set_exception(error)
            raise
