"""Groups of like images in a sample of the pool: how full each is before curation, and after."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROWS_A_GROUP = 8
_MOST = 12


@dataclass(frozen=True)
class Groups:
    """A clustering of the sample, the fullest group first."""

    labels: NDArray[np.int64]  # (N,) number of each row's group
    before: list[int]
    """Rows of the sample in each group."""
    after: list[int]
    """Those of them that are in the set."""


def groups_of(vectors: np.ndarray, kept: NDArray[np.bool_]) -> Groups | None:
    """Group unit rows by Ward's method, the same every time; None where there are too few.

    vectors: (N, D) float32. kept: (N,) whether each is in the set.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    number = min(_MOST, len(vectors) // _ROWS_A_GROUP)
    if number < 2:
        return None
    found = fcluster(linkage(vectors.astype(np.float64), "ward"), number, "maxclust") - 1
    sizes = np.bincount(found, minlength=number)
    labels = np.argsort(np.argsort(-sizes, kind="stable"))[found]  # the fullest is 0
    before = np.bincount(labels, minlength=number)
    after = np.bincount(labels[kept], minlength=number)
    return Groups(labels, before.tolist(), after.tolist())
