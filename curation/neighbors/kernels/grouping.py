"""Rows in the order of their groups. N rows."""

import numpy as np


def by_group(groups: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the rows group by group, and (count + 1,) where those of each group begin.

    groups: (N,) number of each row's group; rows of negative ones come before all.
    """
    order = np.argsort(groups, kind="stable")
    return order, np.searchsorted(groups[order], np.arange(count + 1))
