"""The error tree of the product. Every error tells a person where, what was found, and what to do.

CurateError (embedder.errors)
├── ConfigError      a setting or a recipe that cannot run        -> exit 2
├── DatasetError     a folder that is not the data set it should be -> exit 1
│   └── SchemaError  columns missing or of the wrong type
├── SpaceError       embeddings of different spaces or widths
├── LedgerError      rows that do not add up: a bug of ours, never of the user's
├── StageError       a stage that cannot go on with this data
├── LockError        a folder in which another process writes
├── EngineError      items that failed after their retries
│   └── FailedShardsError  shards of a stage, more than a run accepts
└── StorageError     a path that cannot be read or written

An engine tries an item again after the last three, and after errors that are not ours; the others
end it at once (`is_final`).
"""

from collections.abc import Sequence
from typing import Any

from embedder.errors import CurateError

__all__ = [
    "ConfigError",
    "CurateError",
    "DatasetError",
    "EngineError",
    "FailedShardsError",
    "LedgerError",
    "LockError",
    "SchemaError",
    "SpaceError",
    "StageError",
    "StorageError",
]


class ConfigError(CurateError):
    """A setting, a recipe or a command line that cannot run as written."""


class DatasetError(CurateError):
    """A folder that is no finished data set, or not the one expected."""


class SchemaError(DatasetError):
    """A column that is missing or has the wrong type."""


class SpaceError(CurateError):
    """Embeddings that may not be compared: another encoder, whitening or width."""


class LedgerError(CurateError):
    """Rows in differ from rows out plus rows dropped."""


class StageError(CurateError):
    """A stage that cannot go on with the data that it was given."""

    is_final = False


class LockError(CurateError):
    """A folder in which another process writes: the text names it."""


class EngineError(CurateError):
    """Items that still failed after their retries: `failures` holds each with its cause."""

    is_final = False

    def __init__(self, text: str, failures: Sequence[tuple[Any, str]] = ()) -> None:
        super().__init__(text)
        self.failures = tuple(failures)


class FailedShardsError(EngineError):
    """Shards that do not depend on each other, so that `--max-failed-shards` can accept some."""


class StorageError(CurateError):
    """A path that cannot be read or written: permission, space, or a wrong URL."""

    is_final = False
