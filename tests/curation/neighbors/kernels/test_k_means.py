import numpy as np
import pytest

from curation.neighbors.kernels.k_means import (
    assign_exactly,
    lloyd,
    means_of,
    spherical_kmeans,
    spread_rows,
)


def blobs(seed, count, clusters=12, width=32, noise=0.1):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, clusters, count)
    centers = np.random.default_rng(99).normal(size=(clusters, width))
    rows = centers[labels] / np.linalg.norm(centers[labels], axis=1, keepdims=True)
    rows = rows + noise * rng.normal(size=(count, width))
    return labels, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_spherical_kmeans__finds_well_separated_groups():
    labels, rows = blobs(0, 2000, noise=0.03)
    nearest, cosines = assign_exactly(rows, spherical_kmeans(rows, 12, 10, seed=0))
    pairs = {(int(a), int(b)) for a, b in zip(labels, nearest, strict=True)}
    assert len(pairs) == 12
    assert cosines.mean() > 0.95


@pytest.mark.slow
def test_spherical_kmeans__objective_is_that_of_faiss():
    import faiss

    _, rows = blobs(1, 20_000, clusters=300, width=48, noise=0.15)
    ours = spherical_kmeans(rows, 600, 10, seed=0)
    theirs = faiss.Kmeans(
        48, 600, niter=10, spherical=True, seed=0, max_points_per_centroid=10**6, verbose=False
    )
    theirs.train(rows)
    objective = [assign_exactly(rows, one)[1].mean() for one in (ours, theirs.centroids)]
    assert objective[0] >= 0.99 * objective[1]


def test_lloyd__same_generator_same_centroids():
    _, rows = blobs(2, 3000)
    found = [lloyd(rows, 700, 3, np.random.default_rng(4)) for _ in range(2)]
    assert (found[0] == found[1]).all()


def test_lloyd__fewer_rows_than_centroids():
    _, rows = blobs(3, 5)
    centroids = lloyd(rows, 9, 3, np.random.default_rng(0))
    assert centroids.shape == (5, 32)
    assert sorted((rows @ centroids.T).argmax(axis=1)) == [0, 1, 2, 3, 4]


def test_lloyd__one_iteration_moves_centroids_to_the_means_of_their_rows():
    _, rows = blobs(6, 400)
    start = lloyd(rows, 10, 0, np.random.default_rng(1))
    nearest = (rows @ start.T).argmax(axis=1)
    means = np.stack([rows[nearest == number].mean(axis=0) for number in range(10)])
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    assert np.allclose(lloyd(rows, 10, 1, np.random.default_rng(1)), expected, atol=1e-5)


def test_lloyd__identical_rows():
    rows = np.ones((100, 8), np.float32)
    centroids = lloyd(rows, 4, 3, np.random.default_rng(0))
    assert np.isfinite(centroids).all()


def test_means_of__empty_clusters_move_beside_the_largest():
    sums = np.array([[10.0, 0], [0, 0], [0, 1.0]])
    found = means_of(sums, np.array([10, 0, 1]), np.eye(3, 2), np.random.default_rng(0))
    assert found[1] @ found[0] > 0.99
    assert found[2].tolist() == [0, 1]


def test_spread_rows__takes_rows_of_all_groups():
    labels, rows = blobs(4, 500, noise=0.01)
    chosen = spread_rows(rows, 12, np.random.default_rng(0))
    nearest = (rows @ chosen.T).argmax(axis=1)
    assert len({(int(a), int(b)) for a, b in zip(labels, nearest, strict=True)}) == 12


def test_assign_exactly__blocks_do_not_matter_and_ties_take_the_first():
    _, rows = blobs(5, 300)
    centroids = np.concatenate([rows[:20], rows[:20]])
    whole, _ = assign_exactly(rows, centroids)
    assert whole.max() < 20
    parts = [assign_exactly(rows[i : i + 7], centroids)[0] for i in range(0, 300, 7)]
    assert (np.concatenate(parts) == whole).all()
