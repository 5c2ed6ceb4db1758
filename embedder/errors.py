"""The root of the error tree and the errors of this package.

CurateError
├── ImageError       bytes that are no acceptable image; carries a reason
├── EncoderError     an encoder that is unknown, or cannot work here
└── CheckpointError  weights that do not fit the model

`curation.errors` holds the rest of the tree.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class CurateError(Exception):
    """An error whose text is for people: where, what was found, and what to do."""

    is_final: ClassVar[bool] = True
    """Whether another try with the same input would end the same: an engine then makes none."""


class ImageError(CurateError):
    """Bytes that cannot become pixels.

    `reason` is one of the closed list in `embedder.images.REASONS` and ends up in a decision row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.reason, str(self).removeprefix(self.reason).removeprefix(": "))


class EncoderError(CurateError):
    """An encoder that is unknown, or lacks a file or library that it needs."""


class CheckpointError(CurateError):
    """Weights that do not fit the model that should take them."""


@contextmanager
def foreign_weights(what: str, kind: type[CurateError]) -> Iterator[None]:
    """Map whatever other libraries raise over a file of weights to one line, `what` and why.

    They unpickle, parse and allocate by what the file says, and their errors share no base.
    """
    try:
        yield
    except CurateError:
        raise
    except Exception as error:
        raise kind(f"{what} ({reason_of(error)})") from error


def one_line(error: BaseException) -> str:
    """The message of an error as one line of at most 500 characters, even where its text fails."""
    try:
        return " ".join(str(error).split())[:500]
    except Exception as other:  # noqa: BLE001  (foreign code)
        return f"(its text cannot be told: {type(other).__name__})"


def reason_of(error: Exception) -> str:
    """What another library's error about a file of weights says, in one short line."""
    if isinstance(error, pickle.UnpicklingError):  # torch then advises to run what is in it
        return "it holds no weights, or more than weights"
    return one_line(error) or type(error).__name__
