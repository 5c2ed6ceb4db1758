"""Where rows live and which lists they probe: those nearly as near as their home.

A row in the middle of its list needs no probes, one between many lists needs many; so a row probes
the lists whose centroids' cosine is less than some margin below that of the nearest, however many
these are. N rows, T probes of all rows, H questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from curation.neighbors.rows.column_file import ColumnFile, write_columns


@dataclass(frozen=True)
class ProbeLimits:
    """How far from a row the lists that it probes may be."""

    margin: float
    """How much lower than that of the nearest list a cosine may be."""
    most: int
    """Probes of a row at most, and those as near as the last of them."""
    groups: int = 1
    """Nearest groups whose lists a row meets, where lists are grouped."""
    near: float = np.inf
    """Cosine of a near list: a row that has met none looks for one in all groups."""
    least: int = -(1 << 31)
    """Product of the sketches of a row and a near list at least."""


@dataclass(frozen=True)
class Routes:
    """Lists of some rows."""

    home: np.ndarray
    """(N,) int32: the list that each lives in."""
    bounds: np.ndarray
    """(N + 1,) int64: first probe of each row, then the number of probes."""
    probes: np.ndarray
    """(T,) int32: lists probed."""
    margins: np.ndarray
    """(T,) float16: by how much their cosine is below that of the row's home."""

    @classmethod
    def at_home(cls, home: np.ndarray) -> "Routes":
        """Rows that probe no further list."""
        none = np.empty(0, np.int32)
        bounds = np.zeros(len(home) + 1, np.int64)
        return cls(home.astype(np.int32), bounds, none, none.astype(np.float16))

    @classmethod
    def joined(cls, parts: Sequence["Routes"]) -> "Routes":
        """The rows of all parts, one part after the other."""
        parts = [cls.at_home(np.empty(0, np.int32)), *parts]
        counts = np.concatenate([np.diff(part.bounds) for part in parts])
        home, probes, margins = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("home", "probes", "margins")
        )
        return cls(home, bounds_of(counts), probes, margins)

    def __len__(self) -> int:
        return len(self.home)

    @property
    def probing_rows(self) -> np.ndarray:
        """(T,) int64: number of the row that makes each probe."""
        return np.repeat(np.arange(len(self)), np.diff(self.bounds))

    def take(self, rows: np.ndarray) -> "Routes":
        """Some of the rows, in any order."""
        counts = self.bounds[rows + 1] - self.bounds[rows]
        bounds = bounds_of(counts)
        taken = np.arange(bounds[-1]) + np.repeat(self.bounds[rows] - bounds[:-1], counts)
        return Routes(self.home[rows], bounds, self.probes[taken], self.margins[taken])

    def within(self, margin: float) -> tuple[np.ndarray, np.ndarray]:
        """Probes within a margin: numbers of their rows (V,) int64, and lists (V,) int32."""
        near = self.margins <= np.float16(margin)
        return self.probing_rows[near], self.probes[near]

    def lists_met(self, margin: float) -> float:
        """Lists that a row meets within a margin on average, its home included."""
        return 1 + float((self.margins <= np.float16(margin)).sum()) / max(1, len(self))

    def margin_at(self, count: int) -> float:
        """The margin of the probe with so many nearer ones before it, or of the last; 0 of none."""
        margins = np.sort(self.margins)
        return float(margins[min(count, len(margins) - 1)]) if len(margins) else 0.0

    def margins_to(self, rows: np.ndarray, lists: np.ndarray) -> np.ndarray:
        """(H,) float16: the margin at which each row meets a list: 0 its home, infinity if never.

        rows: (H,) numbers; lists: (H,).
        """
        found = np.full(len(rows), np.inf, np.float16)
        keys, order = self._sorted
        if len(keys):
            wanted = _keys(rows, lists)
            places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            there = keys[places] == wanted
            found[there] = self.margins[order[places[there]]]
        found[self.home[rows] == lists] = 0
        return found

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        keys = _keys(self.probing_rows, self.probes)
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    def write(self, path: str) -> None:
        """Write to a file."""
        columns: dict[str, np.ndarray] = {
            "bounds": self.bounds.astype(np.int64),
            "home": self.home.astype(np.int32),
            "probes": self.probes,
            "margins": self.margins,
        }
        write_columns(path, columns)

    @classmethod
    def read(cls, path: str, num_rows: int) -> "Routes":
        """Read those of so many rows, mapped where the file is local."""
        file = ColumnFile.open(path)
        (home,) = file.read(["home"], 0, num_rows)
        probes, margins = file.read(["probes", "margins"], 0, file.num_rows("probes"))
        return cls(home, file["bounds"], probes, margins)


def bounds_of(counts: np.ndarray) -> np.ndarray:
    """(N + 1,) int64: where each row's probes begin, then their number. counts: (N,)."""
    return np.concatenate([[0], np.cumsum(counts)])


def _keys(rows: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """(H,) int64: one number for a row and a list."""
    return (rows.astype(np.int64) << 32) | lists.astype(np.int64)
