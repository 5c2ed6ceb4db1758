"""The judges of components: which of some near-duplicates stays, and what leaks.

M members of the components of one bucket, in rule order inside each component.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from curation.neighbors.dedup.judge_components import Judge, id_bytes, ids_array
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.rows.vectors import exact_matrix, exact_similarities

_ROWS_AT_ONCE = 1 << 14
_WORST_SHOWN = 5


@dataclass(frozen=True)
class KeepOne(Judge):
    """Keeps one row of a component, by rule, or a few that are not within the threshold.

    Rows that an earlier delivery has published all stay, and come before any other.
    """

    threshold: float
    linkage: Literal["components", "representative"] = "components"
    first_base: int | None = None
    """Number of the first set of published rows, if any; they are the last sets."""

    def is_published(self, members: pa.Table) -> np.ndarray:
        """(M,) bool: members that an earlier delivery kept."""
        if self.first_base is None:
            return super().is_published(members)
        return np.asarray(members["set"]) >= self.first_base

    def judge(self, members: pa.Table, files: RowFiles) -> tuple[pa.Table, dict[str, Any]]:
        """Verdicts on the members of whole components (see `Judge`)."""
        firsts, sizes = groups_of(np.asarray(members["label"]))
        leaders = np.repeat(firsts, sizes)  # (M,)
        published = self.is_published(members)
        keep = published | (leaders == np.arange(len(leaders)))
        positions = np.asarray(members["position"])
        to_leader = np.ones(len(leaders), np.float32)
        new = np.flatnonzero(~published)
        to_leader[new] = similarities_between(files, positions[new], positions[leaders[new]])
        if self.linkage == "representative":
            for first, size in zip(firsts, sizes, strict=True):
                own = slice(first, first + size)
                keep[own] = self._representatives(files, positions[own], published[own])
        names = ["set", "shard", "row", "position", "twin", "twin_set", "similarity"]
        verdicts = members.select(names)
        verdicts = verdicts.append_column("keep", pa.array(keep))
        component = ids_array(id_bytes(members["id"])[leaders])
        verdicts = verdicts.append_column("component", component)
        many = pa.array(np.repeat(sizes, sizes).astype(np.int32))
        verdicts = verdicts.append_column("component_size", many)
        return verdicts, _health(members, firsts, sizes, to_leader)

    def _representatives(
        self, files: RowFiles, positions: np.ndarray, published: np.ndarray
    ) -> np.ndarray:
        """(S,) bool: in rule order, keep a row unless a kept one is within the threshold."""
        keep = published.copy()
        old = int(published.sum())  # they come first
        blocks = (positions[start : min(start + 256, old)] for start in range(0, old, 256))
        kept = [files.gather("vectors", block) for block in blocks]
        for start in range(old, len(positions), 256):
            block = files.gather("vectors", positions[start : start + 256])
            close = np.zeros(len(block), bool)
            for before in kept:
                close |= (exact_matrix(block, before) > np.float32(self.threshold)).any(axis=1)
            inside = exact_matrix(block, block) > np.float32(self.threshold)
            chosen: list[int] = []
            for row in np.flatnonzero(~close):
                if not inside[row, chosen].any():
                    chosen.append(int(row))
            keep[start + np.array(chosen, np.int64)] = True
            kept.append(block[chosen])
        return keep


@dataclass(frozen=True)
class DropLeaks(Judge):
    """Drops every component that holds a benchmark image (a row of set 1 or later)."""

    threshold: float

    def judge(self, members: pa.Table, files: RowFiles) -> tuple[pa.Table, dict[str, Any]]:
        """Verdicts on the pool's members of components with a benchmark image (see `Judge`)."""
        sets, labels = np.asarray(members["set"]), np.asarray(members["label"])
        leaking = np.isin(labels, labels[sets > 0])
        members = members.filter(pa.array(leaking)).combine_chunks()
        firsts, sizes = groups_of(np.asarray(members["label"]))
        twin, similarity = self._nearest(members, files, firsts, sizes)
        sets, ids = np.asarray(members["set"]), id_bytes(members["id"])
        verdicts = members.select(["set", "shard", "row", "position"])
        columns = {
            "keep": pa.array(np.zeros(len(twin), bool)),
            "twin": ids_array(ids[twin]),
            "twin_set": pa.array(sets[twin]),
            "similarity": pa.array(similarity),
            "direct": pa.array(similarity > np.float32(self.threshold)),
        }
        for name, values in columns.items():
            verdicts = verdicts.append_column(name, values)
        return verdicts, {"leaking_components": len(firsts)}

    def _nearest(
        self, members: pa.Table, files: RowFiles, firsts: np.ndarray, sizes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Number of the nearest benchmark image in its component, and its cosine, a member."""
        twin, similarity = np.zeros(len(members), np.int64), np.zeros(len(members), np.float32)
        sets, positions = np.asarray(members["set"]), np.asarray(members["position"])
        ids = id_bytes(members["id"]).view(">u8").reshape(-1, 2)
        for first, size in zip(firsts, sizes, strict=True):
            rows = np.arange(first, first + size)
            images = rows[sets[rows] > 0]
            images = images[np.lexsort((sets[images], ids[images, 1], ids[images, 0]))]
            best = _nearest_of(files, positions[rows], positions[images])
            twin[rows], similarity[rows] = images[best[0]], best[1]
        return twin, similarity


def groups_of(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row and size of each run of equal labels. labels: (M,) sorted."""
    _, firsts, sizes = np.unique(labels, return_index=True, return_counts=True)
    return firsts, sizes


def similarities_between(files: RowFiles, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(M,) float32: exact cosines of pairs of positions."""
    found = np.empty(len(left), np.float32)
    for start in range(0, len(left), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        pairs = np.stack([left[some], right[some]])
        known, numbers = np.unique(pairs, return_inverse=True)
        vectors = files.gather("vectors", known)  # both sides at once: a partition is read once
        a, b = numbers.reshape(pairs.shape)
        found[some] = exact_similarities(vectors[a], vectors[b])
    return found


def _nearest_of(
    files: RowFiles, rows: np.ndarray, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each row the first of the nearest images, and its cosine; all given as positions."""
    best, top = np.zeros(len(rows), np.int64), np.full(len(rows), -np.inf, np.float32)
    for start in range(0, len(images), 1024):
        right = files.gather("vectors", images[start : start + 1024])
        for begin in range(0, len(rows), 4096):
            left = files.gather("vectors", rows[begin : begin + 4096])
            scores = exact_matrix(left, right)
            column = scores.argmax(axis=1)
            score = scores[np.arange(len(left)), column]
            better = begin + np.flatnonzero(score > top[begin : begin + 4096])
            best[better], top[better] = start + column[better - begin], score[better - begin]
    return best, top


def _health(
    members: pa.Table, firsts: np.ndarray, sizes: np.ndarray, to_leader: np.ndarray
) -> dict[str, Any]:
    """The components whose members are least like their representative."""
    if not len(firsts):
        return {"least_alike": []}
    lowest = np.minimum.reduceat(to_leader, firsts)
    leaders = id_bytes(members["id"])[firsts]
    worst = np.lexsort((firsts, lowest))[:_WORST_SHOWN]
    return {
        "least_alike": [
            {
                "component": leaders[one].tobytes().hex(),
                "size": int(sizes[one]),
                "lowest_similarity": float(lowest[one]),
            }
            for one in worst
        ]
    }
