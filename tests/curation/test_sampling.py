import numpy as np
import pytest

from curation.sampling import (
    Tree,
    balanced_cut,
    draw_counts,
    leaf_targets,
    level_summary,
    share_out,
)


def brute_cut(available, target):
    return max(x for x in range(max(available) + 1) if np.minimum(x, available).sum() <= target)


def test_balanced_cut__the_published_example():
    assert balanced_cut(np.array([1, 5, 10, 100]), 20) == 7


def test_balanced_cut__is_the_largest_that_fits():
    rng = np.random.default_rng(0)
    for _ in range(300):
        available = rng.integers(0, 30, rng.integers(1, 8))
        target = int(rng.integers(0, 120))
        assert balanced_cut(available, target) == brute_cut(available, target)


def test_share_out__adds_up_and_never_exceeds():
    rng = np.random.default_rng(0)
    for _ in range(200):
        available = rng.integers(0, 50, rng.integers(1, 12))
        target = int(rng.integers(0, 300))
        shares = share_out(available, target, rng)
        assert shares.sum() == min(target, available.sum())
        assert (shares <= available).all()
        cut = shares[shares < available]
        assert len(cut) == 0 or shares.max() - cut.min() <= 1


def test_share_out__equal_shares_where_all_can_give():
    rng = np.random.default_rng(0)
    shares = share_out(np.array([2000, 20, 100, 50, 800]), 100, rng)
    assert shares.tolist() == [20] * 5


def tree():
    sizes = np.array([1000, 10, 10, 10, 500, 500])
    return Tree(sizes, (np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 1])))


def test_leaf_targets__every_level_is_balanced():
    targets = leaf_targets(tree(), 400, np.random.default_rng(0))
    assert [level.sum() for level in targets] == [400, 400, 400]
    assert targets[2].tolist() == [200, 200]
    assert targets[1].tolist() == [180, 20, 200]
    assert targets[0].tolist() == [170, 10, 10, 10, 100, 100]


def test_leaf_targets__a_tree_that_is_too_small_gives_all_it_has():
    targets = leaf_targets(tree(), 10_000, np.random.default_rng(0), multiplier=2)
    assert targets[0].tolist() == [2000, 20, 20, 20, 1000, 1000]


def test_draw_counts__whole_copies_then_the_smallest_lots():
    clusters = np.array([0, 1, 0, 0, 1])
    lots = np.array([0.9, 0.1, 0.2, 0.5, 0.7])
    assert draw_counts(lots, clusters, np.array([2, 3])).tolist() == [0, 2, 1, 1, 1]


def test_draw_counts__order_of_rows_does_not_matter():
    rng = np.random.default_rng(0)
    clusters, lots = rng.integers(0, 5, 100), rng.random(100)
    order = rng.permutation(100)
    targets = np.array([3, 50, 0, 7, 20])
    counts = draw_counts(lots, clusters, targets)
    assert (draw_counts(lots[order], clusters[order], targets) == counts[order]).all()
    assert counts.sum() == pytest.approx(80)


def test_level_summary__counts_a_level():
    summary = level_summary(tree(), leaf_targets(tree(), 400, np.random.default_rng(0)))
    assert [level["clusters"] for level in summary] == [6, 3, 2]
    assert [level["drawn"] for level in summary] == [400, 400, 400]
