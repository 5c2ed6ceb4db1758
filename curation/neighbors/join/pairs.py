"""Pairs above a threshold, boiled down while they are found.

Of all pairs that a task meets it keeps two things: spanning edges of the threshold graph, and for
each row the pairs that may hold its most similar other row. Both stay linear in the rows.
M rows held by the task, H pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from curation.neighbors.kernels.components import spanning_edges
from curation.neighbors.kernels.selection import ranks_within
from curation.neighbors.rows.vectors import exact_similarities

_PENDING = 1 << 22
"""Pairs held before they are boiled down."""
_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Candidates:
    """Rows, other rows that may be their most similar, and what is known of the cosine."""

    rows: np.ndarray
    twins: np.ndarray
    scores: np.ndarray
    """(H,) float32: approximate cosines."""
    bands: np.ndarray
    """(H,) float32: their largest possible errors."""

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def empty(cls) -> "Candidates":
        """No candidates."""
        none = np.empty(0, np.int64)
        return cls(none, none, none.astype(np.float32), none.astype(np.float32))

    @classmethod
    def joined(cls, parts: list["Candidates"]) -> "Candidates":
        """All candidates of some parts."""
        names = ("rows", "twins", "scores", "bands")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def take(self, which: np.ndarray) -> "Candidates":
        """Some of the candidates, by mask or number."""
        return Candidates(
            self.rows[which], self.twins[which], self.scores[which], self.bands[which]
        )

    def possible(self, num_rows: int, k: int = 1) -> "Candidates":
        """Those that may be among the k best of their row, given the errors.

        rows: below `num_rows`; where k is above 1, no pair may stand there twice.
        """
        surely = np.full(num_rows, -np.inf, np.float32)
        least = self.scores - self.bands
        if k == 1:
            np.maximum.at(surely, self.rows, least)
        else:
            order = np.lexsort((-least, self.rows))
            kth = order[ranks_within(self.rows[order]) == k - 1]
            surely[self.rows[kth]] = least[kth]
        return self.take(self.scores + self.bands >= surely[self.rows])

    def possible_of_any(self, k: int = 1) -> "Candidates":
        """Those that may be among the k best of their row, for rows of any number."""
        some = self if k == 1 else self.take(self._first_of_each_pair())
        known, numbered = np.unique(some.rows, return_inverse=True)
        few = Candidates(numbered, np.arange(len(some)), some.scores, some.bands)
        return some.take(few.possible(len(known), k).twins)

    def _first_of_each_pair(self) -> np.ndarray:
        """(H,) int64: numbers of the candidates, of those met in two lists only one."""
        order = np.lexsort((self.twins, self.rows))
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(self.rows[order]) != 0) | (np.diff(self.twins[order]) != 0)
        return order[new]


class PairCollector:
    """Takes approximate pairs of numbered rows, block by block."""

    def __init__(
        self,
        num_rows: int,
        threshold: float,
        vectors: Callable[[np.ndarray], np.ndarray],
        k: int = 1,
    ) -> None:
        self._num_rows = num_rows
        self._k = k
        self._threshold = np.float32(threshold)
        self._vectors = vectors
        self._pending: list[Candidates] = []
        self._held = 0
        self._candidates = Candidates.empty()
        self._edges = np.empty((0, 2), np.int64)
        self.num_pairs = 0

    def bound(self, band: float) -> float:
        """Approximate cosines below this are surely not above the threshold."""
        return float(self._threshold) - band

    def add(self, left: np.ndarray, right: np.ndarray, scores: np.ndarray, band: float) -> None:
        """Take pairs whose approximate cosine lies above the threshold less the band.

        left, right: (H,) row numbers; scores: (H,) float32.
        """
        if len(left):
            bands = np.full(len(left), band, np.float32)
            self._pending.append(Candidates(left, right, scores, bands))
            self._held += len(left)
        if self._held > _PENDING:
            self._boil_down()

    def edges(self) -> np.ndarray:
        """(E, 2) int64: spanning edges, fewer than rows."""
        self._boil_down()
        return self._edges

    def candidates(self) -> Candidates:
        """What may be among the k most similar other rows of each row that has a pair."""
        self._boil_down()
        return self._candidates

    def _boil_down(self) -> None:
        if not self._pending:
            return
        pairs = self._surely_above(Candidates.joined(self._pending))
        self._pending, self._held = [], 0
        self.num_pairs += len(pairs)
        both = np.stack([pairs.rows, pairs.twins], axis=1)
        self._edges = spanning_edges(np.concatenate([self._edges, both]))
        back = Candidates(pairs.twins, pairs.rows, pairs.scores, pairs.bands)
        found = Candidates.joined([self._candidates, pairs, back]).possible(self._num_rows, self._k)
        if len(found) > 8 * self._k * self._num_rows:
            found = self._settled(found)
        self._candidates = found

    def _surely_above(self, pairs: Candidates) -> Candidates:
        """The pairs above the threshold; those within the error of it are scored exactly."""
        sure = np.abs(pairs.scores - self._threshold) > pairs.bands
        near = np.flatnonzero(~sure)
        for start in range(0, len(near), _AT_ONCE):
            some = near[start : start + _AT_ONCE]
            left, right = self._vectors(pairs.rows[some]), self._vectors(pairs.twins[some])
            sure[some] = exact_similarities(left, right) > self._threshold
        return pairs.take(sure)

    def _settled(self, found: Candidates) -> Candidates:
        """In a crowd of near-copies: score exactly, so that few candidates remain."""
        scores = np.empty(len(found), np.float32)
        for start in range(0, len(found), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            left, right = self._vectors(found.rows[some]), self._vectors(found.twins[some])
            scores[some] = exact_similarities(left, right)
        exact = Candidates(found.rows, found.twins, scores, np.zeros(len(found), np.float32))
        return exact.possible(self._num_rows, self._k)
