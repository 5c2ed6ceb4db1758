import numpy as np
import pytest

from curation.neighbors.clusters import assignment
from curation.neighbors.clusters.assignment import Assignment, FindOwners
from curation.neighbors.clusters.centroids import Centroids, index_for
from pipelines.engines.local_engine import LocalEngine
from tests.curation.neighbors.conftest import vectors_of


@pytest.fixture
def assigned(arranged, tmp_path, monkeypatch):
    monkeypatch.setattr(assignment, "_ROWS_AT_ONCE", 20)
    rng = np.random.default_rng(0)
    files = arranged(np.eye(8)[rng.integers(0, 6, 300)] + 0.1 * rng.normal(size=(300, 8)))
    centroids = Centroids.written(str(tmp_path / "centroids.bin"), np.eye(8, dtype=np.float32))
    indexed = index_for(files, centroids, 0.98, 0, str(tmp_path), LocalEngine())
    return Assignment(files, indexed, 1)


def test_blocks__each_row_once_with_its_nearest(assigned):
    rows = vectors_of(assigned.files)
    owners = np.full(len(rows), -1)
    for item in range(3):
        for first, block, nearest in assigned.blocks(assigned.open(), item, 3):
            assert len(block) == len(nearest) <= 20
            assert (owners[first : first + len(block)] == -1).all()
            owners[first : first + len(block)] = nearest
    assert (owners == rows.argmax(axis=1)).all()


def test_find_owners__owners_and_counts_of_all_partitions(assigned, tmp_path):
    task = FindOwners(assigned, str(tmp_path / "owners"))
    task.run(LocalEngine(), "assign")
    expected = vectors_of(assigned.files).argmax(axis=1)
    parts = [task.owners(item) for item in range(assigned.files.num_partitions)]
    assert len(parts) > 1
    assert (np.concatenate(parts) == expected).all()
    assert task.counts().tolist() == np.bincount(expected, minlength=8).tolist()
