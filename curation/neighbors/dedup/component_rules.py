"""Component rules: which rows of a component of near-duplicates stay.

A further rule is a class here with a name of its own: settings and commands know it by that.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from curation.neighbors.dedup.members import Members
from curation.neighbors.rows.vectors import exact_matrix

_BLOCK = 1 << 8
"""Rows that are compared with those kept before at a time."""


class ComponentRule(ABC):
    """Chooses representatives among the members of components."""

    name: ClassVar[str]
    """What settings call it."""
    is_guarded: ClassVar[bool]
    """Whether a large component fails the run, since a chain of rows takes unlike ones along."""

    @abstractmethod
    def keeps(self, members: Members, threshold: float) -> np.ndarray:
        """(M,) bool: members that stay; published ones stay whatever is said of them."""


class KeepFirst(ComponentRule):
    """One row of each component: a published one, or the best original."""

    name = "components"
    is_guarded = True

    def keeps(self, members: Members, threshold: float) -> np.ndarray:
        """The first member of each component."""
        return np.asarray(members.firsts == np.arange(len(members)))


class KeepRepresentatives(ComponentRule):
    """All rows that are not within the threshold of one that is kept."""

    name = "representative"
    is_guarded = False

    def keeps(self, members: Members, threshold: float) -> np.ndarray:
        """In the order of members: a row, unless one kept before is within the threshold."""
        keeps = members.published.copy()
        for component in members.components():
            keeps[component] = self._keeps(members, component, np.float32(threshold))
        return keeps

    def _keeps(self, members: Members, component: slice, threshold: np.float32) -> np.ndarray:
        published = members.published[component]
        old, start, stop = int(published.sum()), component.start, component.stop
        kept = [
            members.vectors(slice(first, min(first + _BLOCK, start + old)))
            for first in range(start, start + old, _BLOCK)
        ]
        keeps = published.copy()
        for first in range(start + old, stop, _BLOCK):
            block = members.vectors(slice(first, min(first + _BLOCK, stop)))
            is_near = np.zeros(len(block), bool)
            for before in kept:
                is_near |= (exact_matrix(block, before) > threshold).any(axis=1)
            inside = exact_matrix(block, block) > threshold
            chosen: list[int] = []
            for row in np.flatnonzero(~is_near).tolist():
                if not inside[row, chosen].any():
                    chosen.append(row)
            keeps[first - start + np.array(chosen, np.int64)] = True
            kept.append(block[chosen])
        return keeps


COMPONENT_RULES = {rule.name: rule for rule in (KeepFirst(), KeepRepresentatives())}
