"""A bound on what a work folder may hold, checked before a run and held during it."""

import os
import shutil
import time
from pathlib import Path

from curation import storage
from curation.errors import ConfigError, StorageError

_PAUSE_PER_LOOK = 50
"""Looking takes a fiftieth of the time at most."""
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}


class DiskBudget:
    """Looks how much a work folder holds, now and then, and raises when it is too much."""

    def __init__(self, work: str, max_bytes: int) -> None:
        """Check at once.

        Raises:
            StorageError: the folder holds more already, or the device has no room for the budget.
        """
        self._work = work
        self._max_bytes = max_bytes
        self._next_look = 0.0
        used = self.check()
        if storage.is_local(work):
            free = shutil.disk_usage(work.removeprefix("file://")).free
            if used + free < max_bytes:
                raise StorageError(
                    f"{work}: holds {used / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free, "
                    f"less than --max-disk {max_bytes / 1e9:.2f} GB; free some or lower the budget"
                )

    def check(self) -> int:
        """Bytes held, where it is time to look again, else 0.

        Raises:
            StorageError: more than the budget.
        """
        if time.monotonic() < self._next_look:
            return 0
        began = time.monotonic()
        used = bytes_below(self._work)
        took = time.monotonic() - began
        self._next_look = time.monotonic() + _PAUSE_PER_LOOK * took
        if used > self._max_bytes:
            raise StorageError(
                f"{self._work}: holds {used / 1e9:.2f} GB, more than --max-disk "
                f"{self._max_bytes / 1e9:.2f} GB; `curate clean {self._work}` removes what is not "
                "needed, a larger budget goes on where this stopped"
            )
        return used


def parse_bytes(text: str, option: str = "--max-disk") -> int:
    """Read a size such as 200GB, 1.5T or 1e12. option: what errors name.

    Raises:
        ConfigError: it is none.
    """
    number = text.strip().lower().removesuffix("b")
    unit = _UNITS.get(number[-1:], 1.0)
    try:
        size = float(number.rstrip("kmgtp")) * unit
    except ValueError:
        raise ConfigError(f"{option} {text}: write a size such as 200GB or 1.5TB") from None
    if size <= 0:
        raise ConfigError(f"{option} {text}: must be above 0")
    return int(size)


def bytes_below(path: str) -> int:
    """Bytes of all files below a folder."""
    if not storage.is_local(path):
        return storage.total_bytes(path)
    return sum(_bytes_of(Path(root), names) for root, _, names in os.walk(path))


def _bytes_of(root: Path, names: list[str]) -> int:
    total = 0
    for name in names:
        try:
            total += (root / name).stat().st_size
        except FileNotFoundError:  # a worker has renamed or removed it since
            continue
    return total
