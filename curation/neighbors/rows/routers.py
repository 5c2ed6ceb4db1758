"""Who says in which list a row lives; those of exhaustive comparison and of rows in id order."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation.neighbors.kernels.identical import fingerprints
from curation.neighbors.rows.routes import Routes


class Router(ABC):
    """Says in which list a row lives and which lists it probes."""

    num_lists: int

    def open(self) -> Any:
        """Load what the router needs, once a worker."""
        return None

    @abstractmethod
    def route(self, ids: np.ndarray, vectors: np.ndarray, opened: Any) -> Routes:
        """Homes and probes of rows. ids: (N, 16) uint8, vectors: (N, D)."""


@dataclass(frozen=True)
class HashRouter(Router):
    """Lists by a hash of the vector: for exhaustive comparison, where all lists meet all.

    Identical rows still share a list, which keeps their pairs linear.
    """

    num_lists: int

    def route(self, ids: np.ndarray, vectors: np.ndarray, opened: None) -> Routes:
        """Which range the upper half of the fingerprint falls into."""
        return _of_range(fingerprints(vectors)[:, 0] >> np.uint64(32), self.num_lists)


@dataclass(frozen=True)
class IdRouter(Router):
    """Lists of equal ranges of the id space: positions then lie in the order of ids."""

    num_lists: int

    def route(self, ids: np.ndarray, vectors: np.ndarray, opened: None) -> Routes:
        """Which range the first four bytes of the id fall into."""
        leading = np.ascontiguousarray(ids[:, :4]).view(">u4")[:, 0].astype(np.uint64)
        return _of_range(leading, self.num_lists)


def _of_range(numbers: np.ndarray, num_lists: int) -> Routes:
    """Homes by equal ranges of numbers below 2^32, without probes. numbers: (N,) uint64."""
    return Routes.at_home((numbers * np.uint64(num_lists)) >> np.uint64(32))
