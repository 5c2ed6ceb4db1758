"""What became of an item in a worker: its result, or its error in a form that travels."""

import contextlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from curation.errors import StageError
from curation.stage import Result
from embedder.errors import one_line

_MOST_BYTES = 1 << 20
"""Of an error: one that holds more, such as a batch of images, is told by its text alone."""


class ItemError(StageError):
    """An error of a worker that could not travel itself: the text names it."""


class WorkerDiedError(StageError):
    """A worker ended while it was at work on an item."""


class TimeLimitError(StageError):
    """An item took longer than its stage allows."""

    @classmethod
    def after(cls, limit_s: float, where: str = "") -> "TimeLimitError":
        """The error of an item that was stopped. where: what it was doing then."""
        place = f" at {where}" if where else ""
        return cls(f"took more than {limit_s:g} s and was stopped{place}; --time-limit allows more")


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """The answer of a worker, which any process can read that knows this class."""

    result: bytes = b""
    """Pickled, where there is one."""
    error: bytes = b""
    """Pickled, where that can be done."""
    text: str = ""
    """Name and message of the error; empty where there is a result."""

    @classmethod
    def of(cls, work: Callable[[], Result]) -> "Outcome[Result]":
        """Do the work. Whatever it raises, `SystemExit` too, is a failure of the item alone."""
        try:
            return cls(pickle.dumps(work()))
        except BaseException as error:  # noqa: BLE001  (counted, retried, raised in the driver)
            data = b""
            with contextlib.suppress(Exception):  # it runs foreign code, which may raise anything
                data = pickle.dumps(error)
            return cls(error=data if len(data) <= _MOST_BYTES else b"", text=named(error))

    def unwrap(self) -> Result:
        """The result, or raise the error.

        Raises:
            Exception: what the work raised, or an `ItemError` with its text where it cannot be
                made again, or would not be the same.
        """
        if not self.text:
            result: Result = pickle.loads(self.result)
            return result
        error: Exception = ItemError(self.text)
        with contextlib.suppress(Exception):  # as above
            loaded = pickle.loads(self.error)
            if isinstance(loaded, Exception) and named(loaded) == self.text:
                error = loaded
        raise error


def named(error: BaseException) -> str:
    """Name and message of an error in one line."""
    text = one_line(error)
    return text if isinstance(error, ItemError) else f"{type(error).__name__}: {text}".rstrip(": ")
