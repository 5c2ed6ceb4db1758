import numpy as np
import pytest

from curation.neighbors.kernels.centroid_index import FLAT_UP_TO, ranks_of_groups
from curation.neighbors.kernels.k_means import index_centroids
from curation.neighbors.kernels.quantized import (
    nearest_centroids,
    quantize_centroids,
    quantize_rows,
)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def made():
    """Centroids in clouds, rows near them, and both indexed."""
    rng = np.random.default_rng(0)
    clouds = rng.normal(size=(60, 32))
    centroids = unit(clouds[rng.integers(0, 60, 5000)] + 0.5 * rng.normal(size=(5000, 32)))
    rows = quantize_rows(centroids[rng.integers(0, 5000, 20_000)] + 0.05 * rng.normal(size=32))
    index, agreement = index_centroids(centroids, rows[:3000], 0.98, np.random.default_rng(1))
    return centroids, rows, index, agreement


def test_nearest__agrees_with_all_centroids_as_measured(made):
    centroids, rows, index, agreement = made
    assert 1 < len(index.groups) < 100
    assert index.groups_met * 5 < len(index.groups)  # a fifth of the products, at most
    exact = nearest_centroids(rows, quantize_centroids(centroids))
    share = (index.nearest(rows) == exact).mean()
    assert agreement >= 0.98
    assert share == pytest.approx(agreement, abs=0.01)


def test_nearest__a_row_is_assigned_alone_as_among_others(made):
    _, rows, index, _ = made
    whole = index.nearest(rows)
    parts = [index.nearest(rows[i : i + 33]) for i in range(0, 330, 33)]
    assert (np.concatenate(parts) == whole[:330]).all()
    assert (index.nearest(rows[::-1])[::-1] == whole).all()


def test_nearest__of_equal_centroids_the_first(made):
    centroids, rows, _, _ = made
    twice = np.concatenate([centroids[:2500], centroids[:2500]])
    index, _ = index_centroids(twice, rows[:2000], 0.9, np.random.default_rng(1))
    assert len(index.groups) > 1
    assert index.nearest(rows).max() < 2500


def test_index_centroids__few_are_all_compared():
    centroids = unit(np.random.default_rng(0).normal(size=(FLAT_UP_TO, 4)))
    none = np.empty((0, 4), np.int8)
    index, agreement = index_centroids(centroids, none, 0.9, np.random.default_rng(0))
    assert (len(index.groups), agreement) == (1, 1.0)
    rows = quantize_rows(centroids[:50])
    assert (index.nearest(rows) == nearest_centroids(rows, quantize_centroids(centroids))).all()


def test_index_centroids__without_groups_that_help_all_are_compared(made):
    rng = np.random.default_rng(0)
    centroids = unit(rng.normal(size=(4200, 128)))  # no cloud anywhere
    rows = quantize_rows(rng.normal(size=(2000, 128)))
    index, agreement = index_centroids(centroids, rows, 0.999, rng)
    assert (len(index.groups), agreement) == (1, 1.0)


def test_ranks_of_groups__counts_those_that_are_nearer():
    groups = np.array([[100, 0], [80, 60], [0, 100]], np.int8)
    rows = np.array([[100, 10], [100, 10], [0, 127]], np.int8)
    assert ranks_of_groups(rows, groups, np.array([0, 2, 2])).tolist() == [0, 2, 0]
