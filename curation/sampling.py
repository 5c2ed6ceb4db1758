"""Hierarchical balanced sampling: equal shares down a tree of clusters (SPEC A.5, Vo et al. 2024).

A node hands its target to its children so that the smallest are taken whole and the others equally:
the cut is the largest x with Σ min(x, a_i) ≤ target, a_i being what child i can give. What is left
goes one each to children that can give more, drawn by the generator.
C children of a node, N rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation.neighbors.kernels.grouping import by_group
from curation.schema import schema_of

TREE_COLUMNS = ("level", "cluster", "parent", "rows", "drawn")


def balanced_cut(available: np.ndarray, target: int) -> int:
    """The largest x with Σ min(x, a_i) ≤ target, at most the largest a_i.

    available: (C,) int64, what each child can give.
    """
    order: np.ndarray = np.sort(np.asarray(available, np.int64))
    before = np.concatenate([[0], np.cumsum(order)[:-1]])
    left = len(order) - np.arange(len(order))  # children that give at least order[i]
    cuts = (target - before) // left  # where the cut lies if child i is the first not exhausted
    fits = np.flatnonzero(cuts < order)
    return int(cuts[fits[0]]) if len(fits) else int(order[-1]) if len(order) else 0


def share_out(available: np.ndarray, target: int, rng: np.random.Generator) -> np.ndarray:
    """(C,) int64: what each child gives; they add up to the target, or to all that there is."""
    available = np.asarray(available, np.int64)
    if available.sum() <= target:
        return np.array(available)
    cut = balanced_cut(available, target)
    shares = np.minimum(available, cut)
    able = np.flatnonzero(available > cut)
    lucky = rng.choice(able, target - int(shares.sum()), replace=False)
    shares[lucky] += 1
    return np.asarray(shares)


@dataclass(frozen=True)
class Tree:
    """A tree of clusters, level by level from the leaves up."""

    sizes: np.ndarray
    """(C,) int64: rows of each leaf cluster."""
    parents: tuple[np.ndarray, ...] = ()
    """parents[t]: (C_t,) the cluster of level t + 1 that each cluster of level t lies in."""

    @property
    def num_levels(self) -> int:
        """Levels of clusters."""
        return 1 + len(self.parents)

    def level_sizes(self) -> list[np.ndarray]:
        """Rows of each cluster, leaves first."""
        sizes = [np.asarray(self.sizes, np.int64)]
        for parents in self.parents:
            count = int(parents.max(initial=-1)) + 1
            sizes.append(np.bincount(parents, weights=sizes[-1], minlength=count).astype(np.int64))
        return sizes


def leaf_targets(
    tree: Tree, target: int, rng: np.random.Generator, *, multiplier: int = 1
) -> list[np.ndarray]:
    """Rows to draw from each cluster of each level, leaves first; a row may be drawn m times.

    target: rows to draw from the whole tree; less come out where the tree is too small.
    """
    sizes = [multiplier * level for level in tree.level_sizes()]
    targets = [share_out(sizes[-1], target, rng)]
    for level in reversed(range(len(tree.parents))):
        targets.append(_share_level(sizes[level], tree.parents[level], targets[-1], rng))
    return targets[::-1]


def _share_level(
    available: np.ndarray, parents: np.ndarray, targets: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(C,) int64: shares of the clusters of one level, given the targets of those above."""
    shares = np.zeros(len(available), np.int64)
    order, bounds = by_group(parents, len(targets))
    for parent, target in enumerate(targets):
        children = order[bounds[parent] : bounds[parent + 1]]
        shares[children] = share_out(available[children], int(target), rng)
    return shares


def draw_counts(lots: np.ndarray, clusters: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(N,) int64: how often each row is drawn from its leaf.

    A leaf of n rows that must give t gives every row ⌊t/n⌋ times, and those with the smallest
    lots once more.

    lots: (N,) random numbers, fixed for a row; clusters: (N,) leaf of each row; targets: (C,).
    """
    counts = np.zeros(len(lots), np.int64)
    order = np.lexsort((lots, clusters))
    owners = np.asarray(clusters)[order]
    sizes = np.bincount(owners, minlength=len(targets))
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    ranks = np.arange(len(order)) - starts[owners]
    whole, rest = np.divmod(np.asarray(targets, np.int64), np.maximum(sizes, 1))
    counts[order] = whole[owners] + (ranks < rest[owners])
    return counts


def tree_level(tree: Tree, targets: Sequence[np.ndarray], level: int) -> pa.Table:
    """A line a cluster of one level, as level (from 1), parent (null at the top), rows, drawn."""
    sizes = tree.level_sizes()[level]
    top = level == len(tree.parents)
    columns = {
        "level": np.full(len(sizes), level + 1),
        "cluster": np.arange(len(sizes)),
        "parent": [None] * len(sizes) if top else tree.parents[level],
        "rows": sizes,
        "drawn": targets[level],
    }
    return pa.table(columns, schema=schema_of(TREE_COLUMNS))


def level_summary(tree: Tree, targets: Sequence[np.ndarray]) -> list[dict[str, int]]:
    """Clusters, rows and drawn rows of each level, leaves first."""
    return [
        {
            "level": level + 1,
            "clusters": len(sizes),
            "empty": int((sizes == 0).sum()),
            "largest": int(sizes.max(initial=0)),
            "largest_drawn": int(drawn.max(initial=0)),
            "rows": int(sizes.sum()),
            "drawn": int(drawn.sum()),
        }
        for level, (sizes, drawn) in enumerate(zip(tree.level_sizes(), targets, strict=True))
    ]
