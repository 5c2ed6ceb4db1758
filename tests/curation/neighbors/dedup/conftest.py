"""Rows, arranged and joined above a threshold, and what brute force says of them."""

from dataclasses import dataclass

import numpy as np
import pytest

from curation.neighbors.dedup.threshold_graph import ThresholdGraph, connect
from curation.neighbors.index.vector_index import Comparison, build_index, self_join
from curation.neighbors.rows.vectors import VectorSource
from curation.schema import ids_to_bytes
from pipelines.engines.local_engine import LocalEngine

THRESHOLD = 0.7


def crowd(seed, count=160, width=8):
    """Rows around a few centers, some of them identical: components of many sizes."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(count // 4, width))
    rows = centers[rng.integers(0, len(centers), count)] + 0.35 * rng.normal(size=(count, width))
    rows[count // 2 : count // 2 + 10] = rows[:10]
    return rows.astype(np.float16)


@dataclass(frozen=True)
class Made:
    """A joined pool and sets, by position."""

    graph: ThresholdGraph
    pools: list
    ids: np.ndarray
    sets: np.ndarray
    cosines: np.ndarray

    @property
    def partners(self):
        above = self.cosines > np.float32(THRESHOLD)
        np.fill_diagonal(above, False)
        return above

    def labels(self):
        """The smallest position that each can be reached from."""
        labels = np.arange(len(self.ids))
        for _ in range(len(labels)):
            reached = np.where(self.partners, labels[None], len(labels)).min(axis=1)
            labels = np.minimum(labels, reached)
        return labels


@pytest.fixture
def made(embed, tmp_path):
    def make(*groups, name="made", **columns):
        pools = [
            embed(
                rows,
                f"{name}{n}",
                sizes=[len(rows) // 3, len(rows) - len(rows) // 3],
                columns=columns if n == 0 else None,
            )
            for n, rows in enumerate(groups)
        ]
        sources = [VectorSource(pool, "copy") for pool in pools]
        folder, engine = str(tmp_path / name), LocalEngine()
        index = build_index(sources, folder, engine, comparison=Comparison(method="all"), seed=0)
        joined, _ = self_join(index, THRESHOLD, f"{folder}/join", engine)
        graph, _ = connect(joined, f"{folder}/labels.bin")
        stored = [graph.files.rows(part) for part in range(graph.files.num_partitions)]
        vectors, ids, sets = (
            np.concatenate([rows[column] for rows in stored])
            for column in ("vectors", "ids", "set")
        )
        unit = vectors.astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1)[:, None]
        cosines = np.array([[(a * b).sum() for b in unit] for a in unit], np.float32)
        assert {row.tobytes() for row in ids} == {
            row.tobytes()
            for pool in pools
            for shard in range(2)
            for row in ids_to_bytes(pool.live_ids(shard))
        }
        return Made(graph, pools, ids, sets, cosines)

    return make
