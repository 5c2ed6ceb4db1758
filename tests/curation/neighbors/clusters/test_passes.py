from dataclasses import replace

import numpy as np

from curation.neighbors.clusters.centroids import Centroids
from curation.neighbors.clusters.passes import nearest_of_each, refine, resample
from pipelines.engines.local_engine import LocalEngine
from tests.curation.neighbors.conftest import FIT, vectors_of


def made(arranged, tmp_path, seed):
    """300 rows around 6 directions, and 6 centroids that lie a little beside these."""
    rng = np.random.default_rng(seed)
    files = arranged(np.eye(6, 12)[rng.integers(0, 6, 300)] + 0.15 * rng.normal(size=(300, 12)))
    start = np.eye(6, 12) + 0.2 * rng.normal(size=(6, 12))
    start = (start / np.linalg.norm(start, axis=1, keepdims=True)).astype(np.float32)
    return files, Centroids.written(str(tmp_path / "start.bin"), start)


def unit_means(rows, owners):
    sums = np.stack([rows[owners == number].sum(axis=0) for number in range(6)])
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def test_refine__passes_are_iterations_of_lloyd(arranged, tmp_path):
    files, start = made(arranged, tmp_path, 0)
    fit = replace(FIT, passes=3)
    found, cosines = refine(files, start, fit, str(tmp_path / "fit"), LocalEngine())
    rows, expected, means = vectors_of(files), start.load().astype(np.float64), []
    for _ in range(3):
        scores = rows @ expected.T
        means.append(scores.max(axis=1).mean())
        expected = unit_means(rows, scores.argmax(axis=1))
    assert np.allclose(found.load(), expected, atol=1e-5)
    assert np.allclose(cosines, means, atol=1e-3)  # 8-bit products take near equals for equal
    assert not list((tmp_path / "fit").rglob("found-*"))  # no later run needs the sums


def test_resample__clusters_the_rows_nearest_to_each_centroid(arranged, tmp_path):
    files, start = made(arranged, tmp_path, 1)
    found = resample(files, start, FIT, 0, str(tmp_path / "fit"), LocalEngine())
    scores = vectors_of(files) @ start.load().T
    best, nearest = scores.max(axis=1), scores.argmax(axis=1)
    order = np.lexsort((-best, nearest))
    drawn = [order[nearest[order] == number][: FIT.per_cluster] for number in range(6)]
    rows = vectors_of(files)[np.concatenate(drawn)]
    owners = (rows @ found.load().T).argmax(axis=1)
    # at rest on these rows, and on no others
    assert np.allclose(found.load(), unit_means(rows, owners), atol=1e-4)


def test_nearest_of_each__of_equals_the_first():
    rng = np.random.default_rng(2)
    parts = [
        {
            "clusters": rng.integers(0, 5, 60).astype(np.int32),
            "cosines": rng.integers(0, 4, 60).astype(np.float32),
            "positions": np.arange(start, start + 60),
        }
        for start in (60, 0)
    ]
    names = ("clusters", "cosines", "positions")
    rows = sorted(
        (cluster, -cosine, position)
        for part in parts
        for cluster, cosine, position in zip(*(part[one].tolist() for one in names), strict=True)
    )
    expected = [row for number in range(5) for row in [r for r in rows if r[0] == number][:7]]
    found = nearest_of_each(parts, 7)
    assert found["positions"].tolist() == [position for *_, position in expected]
