"""The tail of unrelated cosines against what was counted, and what it implies for a pool."""

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from curation.neighbors.dedup.unrelated_tail import (
    SAMPLE_ROWS,
    Tail,
    fit_unrelated_tail,
    largest_random_component,
)

WIDTH = 64


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pool_with_copies(num_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows in random order, a tenth of them copies at a cosine of 0.75 to 0.95; whose copies."""
    rng = np.random.default_rng(seed)
    rows = unit(rng.standard_normal((num_rows, WIDTH)))
    owner = np.arange(num_rows)
    copies = np.arange(num_rows - num_rows // 10, num_rows)
    owner[copies] = rng.integers(0, copies[0], len(copies))
    cosine = rng.uniform(0.75, 0.95, (len(copies), 1))
    noise = rng.standard_normal((len(copies), WIDTH))
    noise -= (noise * rows[owner[copies]]).sum(1, keepdims=True) * rows[owner[copies]]
    rows[copies] = cosine * rows[owner[copies]] + np.sqrt(1 - cosine**2) * unit(noise)
    order = rng.permutation(num_rows)
    return rows[order], owner[order]


def unrelated_per_row(rows: np.ndarray, owner: np.ndarray, threshold: float) -> float:
    """Counted for the first 2,000 rows."""
    above = rows[:2000] @ rows.T > threshold
    return int((above & (owner[:2000, None] != owner)).sum()) / len(above)


@pytest.mark.parametrize("num_rows", [1000, 5000, 20_000, 50_000])
def test_fit_unrelated_tail__proposes_a_threshold_that_suits_the_pool(num_rows: int) -> None:
    rows, owner = pool_with_copies(num_rows)
    tail = fit_unrelated_tail(rows[:SAMPLE_ROWS], 0.6)
    assert tail is not None
    threshold = tail.threshold_for(0.001, num_rows)
    assert 0.5 < threshold < 0.7  # all copies are above it
    assert unrelated_per_row(rows, owner, threshold) <= 0.005
    assert unrelated_per_row(rows, owner, threshold - 0.1) >= 0.004


def test_fit_unrelated_tail__agrees_with_what_is_counted() -> None:
    rows, owner = pool_with_copies(6000, seed=1)
    tail = fit_unrelated_tail(rows, 0.6)
    assert tail is not None
    for threshold in (0.45, 0.5, 0.55):
        counted = unrelated_per_row(rows, owner, threshold)
        assert 0.4 * counted < tail.expected(threshold, 6000) < 2.5 * counted
        assert tail.share_above(threshold) <= tail.upper_share_above(threshold)
    assert tail.tail.cosine_at(1e-7) <= tail.upper_cosine_at(1e-7) <= 1


def test_fit_unrelated_tail__a_crowd_of_copies_counts_once() -> None:
    rows, _ = pool_with_copies(2000)
    crowd = unit(rows[:1] + 0.02 * np.random.default_rng(1).standard_normal((500, WIDTH)))
    order = np.random.default_rng(2).permutation(2500)
    with_crowd = fit_unrelated_tail(np.concatenate([rows, crowd])[order], 0.6)
    without = fit_unrelated_tail(rows, 0.6)
    assert with_crowd is not None
    assert without is not None
    assert abs(with_crowd.threshold_for(0.001, 2500) - without.threshold_for(0.001, 2500)) < 0.03


def test_fit_unrelated_tail__too_few_rows_say_nothing() -> None:
    rows, _ = pool_with_copies(299)
    assert fit_unrelated_tail(rows, 0.6) is None
    assert fit_unrelated_tail(np.repeat(rows[:1], 5000, axis=0), 0.6) is None


def test_tail__share_and_cosine_are_inverse() -> None:
    tail = Tail(start=0.3, share=1e-2, slope=20.0, curvature=30.0)
    for share in (1e-3, 1e-6, 1e-9):
        assert tail.share_above(tail.cosine_at(share)) == pytest.approx(share, rel=1e-6)
    assert tail.share_above(0.1) == tail.share
    assert tail.cosine_at(0.5) == tail.start
    assert Tail(0.3, 1e-2, 20.0, 0.0).cosine_at(1e-4) == pytest.approx(0.3 + np.log(100) / 20)
    assert Tail(0.9, 1e-2, 1.0, 0.0).cosine_at(1e-9) == 1


@pytest.mark.parametrize("degree", [0.01, 0.1, 0.5, 0.9, 1.2, 2.0, 5.0])
def test_largest_random_component__as_in_random_graphs(degree: float) -> None:
    num_rows, rng, found = 5000, np.random.default_rng(0), []
    for _ in range(9):
        edges = rng.integers(0, num_rows, (2, rng.poisson(num_rows * degree / 2)))
        graph = coo_array((np.ones(edges.shape[1]), edges), shape=(num_rows, num_rows))
        found.append(np.bincount(connected_components(graph, directed=False)[1]).max())
    assert min(found) - 1 <= largest_random_component(num_rows, degree) <= max(found) + 1


def test_largest_random_component__ends() -> None:
    assert largest_random_component(0, 1.0) == 0
    assert largest_random_component(5, 0.0) == 1
    assert largest_random_component(10**9, 1e-12) == 1
    assert largest_random_component(10**9, 50.0) == 10**9
