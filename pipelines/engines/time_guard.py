"""Ends a worker whose item hangs, even in foreign code that never returns to Python."""

import contextlib
import faulthandler
import re
from collections.abc import Iterator
from typing import IO

OPENING_S = 600.0
"""Opening a task loads libraries and models, or fetches them: it may take as long at least."""


@contextlib.contextmanager
def ending_after(limit_s: float, report: IO[str]) -> Iterator[None]:
    """End this process if what runs inside takes longer; `report` says then where it was."""
    faulthandler.dump_traceback_later(limit_s, exit=True, file=report)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def place_in(report: str) -> str:
    """Where the main thread was, as `FILE:LINE FUNCTION`; empty where nothing was reported."""
    main = report.rpartition("most recent call first")[2]
    found = re.search(r'File "(.*)", line (\d+) in (\S+)', main)
    return f"{found[1]}:{found[2]} {found[3]}" if found else ""
