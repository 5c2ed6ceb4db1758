import numpy as np

from curation.neighbors.clusters import levels
from curation.neighbors.clusters.centroids import Centroids
from curation.neighbors.clusters.levels import centroid_rows, fits_in_memory, level_above
from pipelines.engines.local_engine import LocalEngine
from tests.curation.neighbors.conftest import FIT, vectors_of


def below(tmp_path, monkeypatch):
    """90 centroids around 6 directions, in files of 40."""
    monkeypatch.setattr(levels, "_CENTROIDS_PER_FILE", 40)
    rng = np.random.default_rng(0)
    rows = np.eye(6, 12)[np.arange(90) % 6] + 0.1 * rng.normal(size=(90, 12))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    centroids = Centroids.written(str(tmp_path / "centroids.bin"), rows)
    return rows, centroid_rows(centroids, str(tmp_path / "rows"), LocalEngine())


def test_centroid_rows__are_the_centroids_in_files(tmp_path, monkeypatch):
    rows, files = below(tmp_path, monkeypatch)
    assert [files.size(partition) for partition in range(3)] == [40, 40, 10]
    assert (np.concatenate([files.vectors(partition) for partition in range(3)]) == rows).all()


def test_level_above__each_centroid_lies_in_its_nearest_cluster(tmp_path, monkeypatch):
    rows, files = below(tmp_path, monkeypatch)
    level, figures = level_above(files, FIT, str(tmp_path / "above"), LocalEngine())
    assert level.count == 6
    assert (level.owners() == (rows @ vectors_of(level.rows).T).argmax(axis=1)).all()
    assert [len(set(level.owners()[start::6])) for start in range(6)] == [1] * 6
    assert figures["mean_cosine_by_pass"][0] > 0.9


def test_fits_in_memory__as_stored_and_as_integers(arranged):
    files = arranged(np.random.default_rng(1).normal(size=(100, 8)))
    assert fits_in_memory(files, 100 * 8 * 3)
    assert not fits_in_memory(files, 100 * 8 * 3 - 1)
