import numpy as np
import pytest
import torch

from curation.neighbors.coarse import Coarse, grown_centroids, highest


@pytest.mark.parametrize("columns", [40, 64, 130, 1000, 1024])
def test_highest__are_the_columns_of_the_highest_scores(columns):
    rng = np.random.default_rng(columns)
    scores = np.stack([rng.permutation(columns) for _ in range(20)]).astype(np.int32) - 500
    found = highest(torch.from_numpy(scores), 4)
    assert found.tolist() == np.argsort(-scores, axis=1)[:, :4].tolist()


def test_grown_centroids__find_clusters_and_do_not_depend_on_threads():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(8, 32))
    rows = (centres[rng.integers(0, 8, 4000)] + 0.05 * rng.normal(size=(4000, 32))).astype("f4")
    found = [grown_centroids(rows, 24, np.random.default_rng(1), threads) for threads in (1, 3)]
    assert (found[0] == found[1]).all()
    unit = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    assert (unit @ found[0].T).max(axis=1).min() > 0.99


def test_trained__lists_of_both_levels_hold_all_rows():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3000, 16)).astype(np.float16)
    coarse = Coarse.trained(rows, 40, rng, 2)
    lists = coarse.route(rows, 5, 2, 2)
    assert lists.shape == (3000, 5)
    assert (lists >= 0).all()
    assert all(len(set(row)) == 5 for row in lists.tolist())
    assert len(np.unique(lists[:, 0])) > 30
