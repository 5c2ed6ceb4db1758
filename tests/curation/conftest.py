"""Sets of embeddings for the tests of neighbors."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.dataset import Dataset, commit, write_dataset, write_shard
from curation.pool import Pool
from curation.schema import make_id

ATTRIBUTES = {"space": "a space", "thresholds": {"dedup": 0.6, "leak": 0.45}}

Embed = Callable[..., Pool]


@pytest.fixture
def embed(tmp_path: Path) -> Embed:
    """Make a pool with the side-car "copy" out of an (N, D) array."""

    def make(
        vectors: np.ndarray,
        name: str = "pool",
        *,
        sizes: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
        ids: Sequence[str] | None = None,
        kind: pa.DataType | None = None,
        attributes: dict[str, Any] | None = None,
        columns: dict[str, Any] | None = None,
    ) -> Pool:
        vectors = np.asarray(vectors)
        names = list(ids or (make_id(f"{name} {row}") for row in range(len(vectors))))
        kind = kind or pa.list_(pa.float16(), vectors.shape[1])
        values = vectors.astype(np.float16 if kind.value_type == pa.float16() else np.float32)
        table = pa.table({"id": pa.array(names, pa.string()), **(columns or {})})
        table = table.append_column("embedding", pa.array(list(values), kind))
        if order is not None:
            table = table.take(list(order))
        bounds = np.cumsum([0, *(sizes or [len(names)])])
        tables = [table.slice(a, b - a) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        attributes = ATTRIBUTES if attributes is None else attributes
        dataset = write_dataset(str(folder), tables, table.schema, attributes)
        return Pool(name, {"copy": dataset})

    return make


def verdicts_of(decisions: Dataset) -> dict[str, dict[str, Any]]:
    """Decisions by id."""
    return {row["id"]: row for row in decisions.read().to_pylist()}


def with_shard(pool: Pool, index: int, table: pa.Table) -> Pool:
    """The same side-car "copy", one shard of which holds another table."""
    copy = pool.layers["copy"]
    infos = list(copy.manifest.shards)
    infos[index] = write_shard(copy.path, index, table)
    return Pool(pool.name, {"copy": commit(copy.path, table.schema, infos, copy.attributes)})
