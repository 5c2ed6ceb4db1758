"""Arranged rows for the tests of neighbors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from curation.neighbors.clusters.passes import Fit
from curation.neighbors.index import vector_index
from curation.neighbors.index.vector_index import Comparison, arrange_queries, build_index
from curation.neighbors.rows.row_files import RowFiles
from curation.neighbors.rows.vectors import VectorSource
from curation.pool import Pool
from pipelines.engines.local_engine import LocalEngine
from tests.curation.conftest import Embed

Arranged = Callable[..., RowFiles]


@pytest.fixture
def arranged(embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arranged:
    """Make row files of an (N, D) array, with a partition for every 64 rows."""
    monkeypatch.setattr(vector_index, "_ROWS_PER_PARTITION", 64)

    def make(vectors: np.ndarray, name: str = "pool", *, queries_of: RowFiles | None = None):
        source, folder = VectorSource(embed(vectors, name), "copy"), str(tmp_path / f"{name}-rows")
        engine = LocalEngine()
        if queries_of is not None:
            return arrange_queries(source, queries_of, folder, engine)
        how = Comparison(method="all")
        return build_index((source,), folder, engine, comparison=how, seed=0).files

    return make


def vectors_of(files: RowFiles) -> np.ndarray:
    """(N, D) float64 unit rows, in the order of their positions."""
    parts = [files.vectors(partition) for partition in range(files.num_partitions)]
    rows = np.concatenate(parts).astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ids_of(files: RowFiles) -> np.ndarray:
    """(N, 16) uint8, in the order of their positions."""
    return np.concatenate([files.ids(partition) for partition in range(files.num_partitions)])


FIT = Fit(
    count=6,
    passes=1,
    iterations=5,
    resamplings=0,
    per_cluster=4,
    agreement=0.98,
    seed=0,
    threads=1,
    sample_bytes=1 << 30,
)
"""How six clusters are found."""


@pytest.fixture
def pool_like(embed: Embed) -> Pool:
    """A pool of one shard, to which rows found something."""
    return embed(np.ones((1, 2)), "shards")
