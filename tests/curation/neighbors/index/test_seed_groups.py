import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.neighbors.index.coarse_training import lists_of
from curation.neighbors.index.seed_groups import _neighbors, sample_duplicate_groups
from curation.neighbors.kernels.quantized import quantize_rows
from curation.neighbors.kernels.selection import columns_near
from curation.neighbors.kernels.sketches import least_product, sketches_of


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def around(base: np.ndarray, cosine: float, rng: np.random.Generator) -> np.ndarray:
    """Unit rows at one cosine to unit rows."""
    noise = rng.normal(size=base.shape)
    noise -= (noise * base).sum(axis=1, keepdims=True) * base
    return cosine * base + np.sqrt(1 - cosine**2) * unit(noise)


@pytest.mark.parametrize("width", [100, 384, 512])
@pytest.mark.parametrize("cosine", [0.0, 0.6, 0.9])
def test_sketches__say_the_cosine_up_to_their_error(width, cosine):
    rng = np.random.default_rng(0)
    left = unit(rng.normal(size=(4000, width)))
    right = around(left, cosine, rng)
    a, b = (sketches_of(quantize_rows(side)).astype(np.int64) for side in (left, right))
    products = (a * b).sum(axis=1)
    seen = products / 359**2
    assert abs(seen.mean() - cosine) < 0.01
    assert seen.std() < 1.15 * (1 - cosine**2) / np.sqrt(128) + 0.004
    assert (products > least_product(cosine)).mean() > 0.995


def test_sketches__do_not_depend_on_threads_or_neighbors():
    rows = quantize_rows(np.random.default_rng(1).normal(size=(20_000, 96)))
    whole = sketches_of(rows, 3)
    assert (whole == sketches_of(rows)).all()
    assert (whole[7000:7100] == sketches_of(rows[7000:7100])).all()


@given(
    st.integers(1, 40), st.integers(1, 300), st.integers(1, 60), st.integers(0, 5), st.integers(0)
)
def test_columns_near__hold_the_highest_and_few_more(rows, columns, count, spread, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-(4**spread), 4**spread + 1, (rows, columns)).astype(np.int32)
    flat = columns_near(scores, count)
    assert (np.diff(flat) > 0).all()
    chosen = np.zeros(scores.size, bool)
    chosen[flat] = True
    chosen = chosen.reshape(scores.shape)
    assert (chosen.sum(axis=1) >= min(count, columns)).all()
    lowest = np.where(chosen, scores, np.iinfo(np.int32).max).min(axis=1)
    highest_left = np.where(chosen, np.iinfo(np.int32).min, scores).max(axis=1)
    assert (highest_left < lowest).all()


def grouped_rows(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(6000, 256) rows around 200 centers, 2,000 strangers; and whose they are, -1 of strangers."""
    centers = unit(rng.normal(size=(200, 256)))
    owner = np.concatenate([rng.integers(0, 200, 4000), np.full(2000, -1)])
    rows = unit(rng.normal(size=(6000, 256)))
    rows[:4000] = around(centers[owner[:4000]], 0.85, rng)
    order = rng.permutation(6000)
    return rows[order], owner[order]


@pytest.mark.parametrize("threads", [1, 3])
def test_alike_groups__are_the_planted_ones(threads):
    rows, owner = grouped_rows(np.random.default_rng(2))
    groups = sample_duplicate_groups(quantize_rows(rows), 0.6, np.random.default_rng(0), threads)
    assert (groups[owner < 0] < 0).mean() > 0.99
    inside = owner >= 0
    assert (groups[inside] >= 0).mean() > 0.99
    led = np.flatnonzero(inside & (groups >= 0))
    assert (owner[groups[led]] == owner[led]).mean() > 0.999
    assert 200 <= len(np.unique(groups[led])) < 230
    assert (groups[groups[led]] == groups[led]).all()  # who leads is in the group


def test_alike_groups__do_not_depend_on_threads():
    rows = quantize_rows(grouped_rows(np.random.default_rng(3))[0])
    one, three = (sample_duplicate_groups(rows, 0.6, np.random.default_rng(0), n) for n in (1, 3))
    assert (one == three).all()


def test_alike_groups__identical_rows_follow_their_first_and_crowds_stay_small():
    rng = np.random.default_rng(4)
    strangers = unit(rng.normal(size=(3000, 256)))
    same = np.repeat(unit(rng.normal(size=(1, 256))), 3000, axis=0)
    crowd = around(np.repeat(unit(rng.normal(size=(1, 256))), 3000, axis=0), 0.97, rng)
    rows = quantize_rows(np.concatenate([strangers, same, crowd]))
    order = rng.permutation(len(rows))
    found = np.empty(len(rows), np.int64)
    found[order] = sample_duplicate_groups(rows[order], 0.8, np.random.default_rng(0), 2)
    assert (found[:3000] < 0).all()
    assert len(np.unique(found[3000:6000])) == 1
    assert (found[6000:] >= 0).all()
    assert len(np.unique(found[6000:])) <= 3


def test_neighbors__of_a_crowd_are_few_for_each_row():
    rng = np.random.default_rng(6)
    crowd = quantize_rows(
        around(np.repeat(unit(rng.normal(size=(1, 256))), 8000, axis=0), 0.97, rng)
    )
    left, right = _neighbors(crowd, 0.8, rng, 2)
    assert (left < right).all()
    assert 8000 < len(left) < 64 * 8000


def test_alike_groups__of_few_rows_and_of_none_alike():
    rows = quantize_rows(np.eye(5, 64))
    assert sample_duplicate_groups(rows, 0.5, np.random.default_rng(0)).tolist() == [-1] * 5
    twice = np.concatenate([rows, rows[:1]])
    found = sample_duplicate_groups(twice, 0.5, np.random.default_rng(0))
    assert found.tolist() in ([-1] * 6, [0, -1, -1, -1, -1, 0])


def test_lists_of__groups_are_lists_and_the_rest_is_clustered():
    rows, owner = grouped_rows(np.random.default_rng(5))
    quantized = quantize_rows(rows)
    of_groups, loose = lists_of(quantized, 60, np.random.default_rng(0), 2, groups=owner)
    assert (len(of_groups), len(loose)) == (200, 20)
    lists = np.concatenate([of_groups, loose])
    assert np.allclose(np.linalg.norm(lists, axis=1), 1, atol=1e-5)
    nearest = (rows @ lists.T).argmax(axis=1)
    inside = owner >= 0
    assert len(np.unique(nearest[inside])) == 200
    for one in range(200):
        assert len(np.unique(nearest[owner == one])) <= 2
    assert [len(some) for some in lists_of(quantized, 30, np.random.default_rng(0))] == [0, 30]
