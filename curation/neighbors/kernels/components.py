"""Connected components over shards of edges, with one number a row.

Edges of a shard are contracted among themselves first, so a shard costs its own size and the sets
see spanning edges only. The label of a component is its smallest row: the result does not depend
on the order of the edges, the shards or the workers. N rows, E edges.
"""

from collections.abc import Iterable

import numpy as np

_EDGES_AT_ONCE = 1 << 21
_ROWS_AT_ONCE = 1 << 22


class DisjointSets:
    """Sets of the rows 0 … N-1: 4 bytes a row, 8 from 2^31 rows on."""

    def __init__(self, num_rows: int) -> None:
        kind = np.int32 if num_rows < 1 << 31 else np.int64
        self._above = np.arange(num_rows, dtype=kind)  # never larger than the row itself

    def unite(self, edges: np.ndarray) -> None:
        """Join the sets of the two rows of every edge. edges: (E, 2) row numbers."""
        for start in range(0, len(edges), _EDGES_AT_ONCE):
            some = edges[start : start + _EDGES_AT_ONCE]
            roots = self._roots(some.reshape(-1)).reshape(-1, 2)  # (E, 2)
            spanning = spanning_edges(roots[roots[:, 0] != roots[:, 1]])
            self._above[spanning[:, 1]] = spanning[:, 0]

    def labels(self) -> np.ndarray:
        """(N,): the smallest row of each row's set, as a view that `unite` would change."""
        for start in range(0, len(self._above), _ROWS_AT_ONCE):
            some = self._above[start : start + _ROWS_AT_ONCE]
            some[:] = self._climb(some)
        return self._above

    def _roots(self, rows: np.ndarray) -> np.ndarray:
        roots = self._climb(self._above[rows])
        self._above[rows] = roots  # shorten the paths
        return roots

    def _climb(self, rows: np.ndarray) -> np.ndarray:
        while True:
            above: np.ndarray = self._above[rows]
            if np.array_equal(above, rows):
                return above
            rows = above


def connected_components(num_rows: int, shards: Iterable[np.ndarray]) -> np.ndarray:
    """(N,): label of each row's component, its smallest row. shards: (E, 2) row numbers each."""
    sets = DisjointSets(num_rows)
    for edges in shards:
        sets.unite(edges)
    return sets.labels()


def spanning_edges(pairs: np.ndarray) -> np.ndarray:
    """(E, 2) int64: edges that connect the same rows as the pairs, each row to its smallest.

    pairs: (H, 2) row numbers.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components as label

    if len(pairs) == 0:
        return np.empty((0, 2), np.int64)
    rows, numbered = np.unique(pairs, return_inverse=True)
    numbered = numbered.reshape(-1, 2).astype(np.int32)
    shape = (len(rows), len(rows))
    graph = coo_matrix((np.ones(len(pairs), bool), (numbered[:, 0], numbered[:, 1])), shape)
    _, labels = label(graph, directed=False)
    _, firsts = np.unique(labels, return_index=True)  # rows ascend: the first is the smallest
    roots = rows[firsts[labels]]
    others = roots != rows
    return np.stack([roots[others], rows[others]], axis=1).astype(np.int64)


def component_sizes(labels: np.ndarray) -> np.ndarray:
    """(N,): rows of the component whose label the number is, 0 where it is no label."""
    sizes = np.zeros(len(labels), labels.dtype)
    for start in range(0, len(labels), _ROWS_AT_ONCE):
        found, counts = np.unique(labels[start : start + _ROWS_AT_ONCE], return_counts=True)
        sizes[found] += counts.astype(sizes.dtype)
    return sizes
