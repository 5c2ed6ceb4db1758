"""Where rows live and which lists they visit: those nearly as near as their own.

A row in the middle of its list needs no visits, one between many lists needs many; so a row visits
the lists whose centroids' cosine is less than some gap below that of the nearest, however many
these are. N rows, T visits of all rows, H questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from curation.neighbors.rows.row_files import map_array, write_array


@dataclass(frozen=True)
class Reach:
    """How far from a row the lists that it visits may be."""

    gap: float
    """How much lower than that of the nearest list a cosine may be."""
    most: int
    """Visits of a row at most, and those as near as the last of them."""
    groups: int = 1
    """Nearest groups whose lists a row meets, where lists are grouped."""
    near: float = np.inf
    """Cosine of a near list: a row that has met none looks for one in all groups."""
    least: int = -(1 << 31)
    """Product of the sketches of a row and a near list at least."""


@dataclass(frozen=True)
class Routes:
    """Lists of some rows."""

    own: np.ndarray
    """(N,) int32: the list that each lives in."""
    bounds: np.ndarray
    """(N + 1,) int64: first visit of each row, then the number of visits."""
    lists: np.ndarray
    """(T,) int32: lists visited."""
    gaps: np.ndarray
    """(T,) float16: by how much their cosine is below that of the row's own list."""

    @classmethod
    def at_home(cls, own: np.ndarray) -> "Routes":
        """Rows that visit nobody."""
        none = np.empty(0, np.int32)
        bounds = np.zeros(len(own) + 1, np.int64)
        return cls(own.astype(np.int32), bounds, none, none.astype(np.float16))

    @classmethod
    def joined(cls, parts: Sequence["Routes"]) -> "Routes":
        """The rows of all parts, one part after the other."""
        parts = [cls.at_home(np.empty(0, np.int32)), *parts]
        counts = np.concatenate([np.diff(part.bounds) for part in parts])
        own, lists, gaps = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("own", "lists", "gaps")
        )
        return cls(own, bounds_of(counts), lists, gaps)

    def __len__(self) -> int:
        return len(self.own)

    @property
    def visitors(self) -> np.ndarray:
        """(T,) int64: number of the row that makes each visit."""
        return np.repeat(np.arange(len(self)), np.diff(self.bounds))

    def take(self, rows: np.ndarray) -> "Routes":
        """Some of the rows, in any order."""
        counts = self.bounds[rows + 1] - self.bounds[rows]
        bounds = bounds_of(counts)
        visits = np.arange(bounds[-1]) + np.repeat(self.bounds[rows] - bounds[:-1], counts)
        return Routes(self.own[rows], bounds, self.lists[visits], self.gaps[visits])

    def within(self, gap: float) -> tuple[np.ndarray, np.ndarray]:
        """Visits no farther than a gap: numbers of their rows (V,) int64, and lists (V,) int32."""
        near = self.gaps <= np.float16(gap)
        return self.visitors[near], self.lists[near]

    def gap_at(self, count: int) -> float:
        """The gap of the visit with so many nearer ones before it, or of the last; 0 of none."""
        gaps = np.sort(self.gaps)
        return float(gaps[min(count, len(gaps) - 1)]) if len(gaps) else 0.0

    def gaps_to(self, rows: np.ndarray, lists: np.ndarray) -> np.ndarray:
        """(H,) float16: how far each row visits a list: 0 its own, infinity where it does not."""
        found = np.full(len(rows), np.inf, np.float16)
        keys, order = self._sorted
        if len(keys):
            wanted = _keys(rows, lists)
            places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            there = keys[places] == wanted
            found[there] = self.gaps[order[places[there]]]
        found[self.own[rows] == lists] = 0
        return found

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        keys = _keys(self.visitors, self.lists)
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    def write(self, path: str) -> None:
        """Write to a file."""
        bounds, own = self.bounds.astype(np.int64), self.own.astype(np.int32)
        write_array(path, bounds, own, self.lists, self.gaps)

    @classmethod
    def read(cls, path: str, num_rows: int) -> "Routes":
        """Read those of so many rows, mapped where the file is local."""
        head = 8 * (num_rows + 1)
        bounds = np.asarray(map_array(path, "int64", 0, (num_rows + 1,)))
        own = np.asarray(map_array(path, "int32", head, (num_rows,)))
        head, count = head + 4 * num_rows, int(bounds[-1])
        lists = np.asarray(map_array(path, "int32", head, (count,)))
        gaps = np.asarray(map_array(path, "float16", head + 4 * count, (count,)))
        return cls(own, bounds, lists, gaps)


def bounds_of(counts: np.ndarray) -> np.ndarray:
    """(N + 1,) int64: where each row's visits begin, then their number. counts: (N,)."""
    return np.concatenate([[0], np.cumsum(counts)])


def _keys(rows: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """(H,) int64: one number for a row and a list."""
    return (rows.astype(np.int64) << 32) | lists.astype(np.int64)
