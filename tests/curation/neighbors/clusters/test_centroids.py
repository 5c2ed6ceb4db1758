import numpy as np

from curation.neighbors.clusters.centroids import (
    Centroids,
    index_for,
    sample_positions,
    train_centroids,
)
from curation.neighbors.kernels.id_hashes import hash_ids
from curation.neighbors.kernels.quantized import quantize_rows
from pipelines.engines.local_engine import LocalEngine
from tests.curation.neighbors.conftest import ids_of, vectors_of


def test_sample_positions__rows_with_the_smallest_hash_in_its_order(arranged):
    files = arranged(np.random.default_rng(0).normal(size=(400, 8)))
    hashes = hash_ids(ids_of(files), "a", 3)
    found = sample_positions(files, 50, "a", 3)
    assert (found == np.argsort(hashes)[: len(found)]).all()
    assert 30 < len(found) < 70
    assert (sample_positions(files, 400, "a", 3) == np.argsort(hashes)).all()


def test_train_centroids__one_in_each_cloud(arranged, tmp_path):
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(5), [60, 50, 40, 30, 50])
    files = arranged(np.eye(5, 16)[labels] + 0.05 * rng.normal(size=(230, 16)))
    centroids = train_centroids(files, 5, str(tmp_path / "fit"), LocalEngine(), seed=0)
    assert (centroids.count, centroids.width) == (5, 16)
    rows = centroids.load()
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert sorted(rows.argmax(axis=1)) == [0, 1, 2, 3, 4]
    assert (vectors_of(files) @ rows.T).max(axis=1).min() > 0.9


def test_train_centroids__no_more_than_rows(arranged, tmp_path):
    files = arranged(np.random.default_rng(2).normal(size=(6, 8)))
    assert train_centroids(files, 50, str(tmp_path / "fit"), LocalEngine(), seed=0).count == 6


def test_index_for__finds_the_nearest_of_all(arranged, tmp_path):
    rng = np.random.default_rng(3)
    files = arranged(rng.normal(size=(200, 16)))
    rows = rng.normal(size=(40, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    centroids = Centroids.written(str(tmp_path / "centroids.bin"), rows)
    indexed = index_for(files, centroids, 0.98, 0, str(tmp_path), LocalEngine())
    assert indexed.figures() == {"groups": 1, "groups_met": 1, "agreement": 1.0}
    scores = vectors_of(files) @ rows.T
    nearest = indexed.load().nearest(quantize_rows(vectors_of(files)))
    given = scores[np.arange(len(scores)), nearest]
    assert (given > scores.max(axis=1) - 0.01).all()  # 8-bit products take near equals for equal
    assert (nearest == scores.argmax(axis=1)).mean() > 0.97
