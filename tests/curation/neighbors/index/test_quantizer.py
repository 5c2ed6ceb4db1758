import numpy as np
import pytest

from curation.neighbors.index import quantizer as coarse_module
from curation.neighbors.index.coarse_training import grown_centroids, lists_of
from curation.neighbors.index.quantizer import CoarseQuantizer
from curation.neighbors.kernels.quantized import quantize_rows
from curation.neighbors.kernels.sketches import least_product, sketches_of
from curation.neighbors.rows.routes import ProbeLimits, Routes


def test_grown_centroids__find_clusters_and_do_not_depend_on_threads():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(8, 32))
    rows = centers[rng.integers(0, 8, 4000)] + 0.05 * rng.normal(size=(4000, 32))
    rows = quantize_rows(rows)
    found = [grown_centroids(rows, 24, np.random.default_rng(1), threads) for threads in (1, 3)]
    assert (found[0] == found[1]).all()
    unit = centers / np.linalg.norm(centers, axis=1, keepdims=True)
    assert (unit @ found[0].T).max(axis=1).min() > 0.99


def trained(rows: np.ndarray, num_lists: int, rng: np.random.Generator) -> CoarseQuantizer:
    return CoarseQuantizer.of(*lists_of(quantize_rows(rows), num_lists, rng), rng)


def test_route__all_lists_hold_rows_and_rows_visit_as_many_as_they_may():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3000, 16)).astype(np.float16)
    coarse = trained(rows, 40, rng)
    routes = coarse.route(rows, ProbeLimits(np.inf, 4, 2), 2)
    assert len(routes) == 3000
    assert len(np.unique(routes.home)) > 30
    assert (np.diff(routes.bounds) >= 4).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_route__gives_the_nearest_list_and_those_within_the_gap(threads):
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(9000, 24)).astype(np.float32)
    coarse = trained(rows, 30, rng)
    assert len(coarse.groups) == 1
    routes = coarse.route(rows, ProbeLimits(0.2, 6, 1), threads)
    cosines = quantize_rows(rows).astype(np.float64) @ coarse.lists.T.astype(np.float64)
    below = (cosines.max(axis=1, keepdims=True) - cosines) / coarse.length
    below /= np.linalg.norm(quantize_rows(rows).astype(np.float64), axis=1, keepdims=True)
    assert routes.home.tolist() == cosines.argmax(axis=1).tolist()
    sixth = np.sort(below, axis=1)[:, 6:7]
    near = below.astype(np.float16) <= np.float16(0.2)
    wanted = near & (below <= sixth) & (np.arange(30) != routes.home[:, None])
    assert np.diff(routes.bounds).tolist() == wanted.sum(axis=1).tolist()
    assert routes.probes.tolist() == np.nonzero(wanted)[1].tolist()
    assert np.allclose(routes.margins, below[wanted], atol=1e-3)


def grouped_lists(monkeypatch, width: int = 256) -> tuple[CoarseQuantizer, np.ndarray]:
    """2,000 lists in 31 groups, and 3,000 rows at cosine 0.6 to one of them."""
    monkeypatch.setattr("curation.neighbors.index.quantizer._UNGROUPED", 1000)
    rng = np.random.default_rng(6)
    lists = rng.normal(size=(2000, width))
    lists /= np.linalg.norm(lists, axis=1, keepdims=True)
    noise = rng.normal(size=(3000, width)) / np.sqrt(width)
    rows = 0.6 * lists[rng.integers(0, 2000, 3000)] + 0.8 * noise
    return CoarseQuantizer.of(
        lists.astype(np.float32), np.empty((0, width), np.float32), rng
    ), rows.astype(np.float32)


def ungrouped(coarse: CoarseQuantizer) -> CoarseQuantizer:
    return CoarseQuantizer(coarse.lists[:1], coarse.lists, np.array([0, coarse.num_lists]))


@pytest.mark.parametrize("limits", [(0.2, 6), (0.02, 100), (np.inf, 4), (np.inf, 1999)])
def test_route__through_all_groups_it_is_what_all_lists_give(monkeypatch, limits):
    coarse, rows = grouped_lists(monkeypatch)
    assert 20 < len(coarse.groups) <= 32
    found = coarse.route(rows, ProbeLimits(*limits, len(coarse.groups)), 2)
    wanted = ungrouped(coarse).route(rows, ProbeLimits(*limits))
    for name in ("home", "bounds", "probes", "margins"):
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist()


def test_route__through_few_groups_most_rows_find_the_nearest_list(monkeypatch):
    coarse, rows = grouped_lists(monkeypatch)
    nearest = ungrouped(coarse).route(rows, ProbeLimits(0, 0)).home[1000:]
    met = coarse.groups_to_meet(rows[:1000], 0.9)
    assert 1 < met < len(coarse.groups)
    found = coarse.route(rows[1000:], ProbeLimits(0, 0, met), 2)
    assert 0.85 < (found.home == nearest).mean() < 1
    alone = coarse.route(rows[1234:1235], ProbeLimits(0, 0, met))
    assert alone.home[0] == found.home[234]  # whoever it is asked with


@pytest.mark.parametrize(("first_groups", "share"), [(1, 0), (8, 0), (1, 0.5)])
def test_route__rows_find_a_near_list_anywhere_and_others_a_loose_one(
    monkeypatch, first_groups, share
):
    monkeypatch.setattr(coarse_module, "_SHARE_OF_GROUPS", share)
    monkeypatch.setattr(coarse_module, "_VISITS_AT_ONCE", 1 << 10)  # in many runs
    grouped, rows = grouped_lists(monkeypatch)
    rng = np.random.default_rng(7)
    strangers = rng.normal(size=(500, 256)).astype(np.float32)
    lists = grouped.lists / np.linalg.norm(grouped.lists.astype(np.float32), axis=1, keepdims=True)
    loose = rng.normal(size=(40, 256)).astype(np.float32)
    loose /= np.linalg.norm(loose, axis=1, keepdims=True)
    coarse = CoarseQuantizer.of(lists, loose, rng)
    assert coarse.has_loose
    assert not grouped.has_loose
    limits = ProbeLimits(0.1, 5, first_groups, near=0.5)
    near, far = coarse.route(rows, limits, 2), coarse.route(strangers, limits, 2)
    exact = ungrouped(coarse).route(rows, limits)
    assert (near.home == exact.home).mean() > 0.95
    assert near.home.max() < 2000
    assert (far.home >= 2000).mean() > 0.7
    loose_alone = CoarseQuantizer(coarse.lists[:1], coarse.lists[2000:], np.array([0, 40]))
    home = loose_alone.route(strangers, ProbeLimits(0, 0)).home + 2000
    assert (home == far.home)[far.home >= 2000].all()
    keys = near.probing_rows * coarse.num_lists + near.probes
    assert len(np.unique(keys)) == len(keys)  # what was met twice is visited once
    assert not (near.probes == near.home[near.probing_rows]).any()


def test_least_of_sketches__lets_few_lists_look_near(monkeypatch):
    coarse, rows = grouped_lists(monkeypatch)
    common = np.ones(256, np.float32) / 16  # all cosines are above a half
    lists = coarse.lists / np.linalg.norm(coarse.lists.astype(np.float32), axis=1, keepdims=True)
    leaning = lists + common
    leaning /= np.linalg.norm(leaning, axis=1, keepdims=True)
    coarse = CoarseQuantizer.of(leaning, leaning[:20], np.random.default_rng(0))
    some = rows + common
    least = coarse.least_of_sketches(some)
    sketches = sketches_of(quantize_rows(some)).astype(np.int64)
    looking = (sketches @ coarse.sketches.T.astype(np.int64) > least).sum(axis=1)
    assert 30 < looking.mean() < 130
    assert least > least_product(0.5)
    found = coarse.route(some, ProbeLimits(0.1, 5, 8, near=0.5, least=least), 2)
    exact = ungrouped(coarse).route(some, ProbeLimits(0.1, 5))
    assert (found.home == exact.home).mean() > 0.8


def test_gap_of_visits__is_that_of_so_many_visits_on_average():
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(3000, 24)).astype(np.float32)
    coarse, asked = trained(rows[:1000], 40, rng), rows[1000:]
    margin = coarse.margin_of_probes(asked, 5, ProbeLimits(np.inf, 39, 1))
    assert 4.7 < len(coarse.route(asked, ProbeLimits(margin, 39, 1)).probes) / 2000 < 5.3
    assert coarse.margin_of_probes(asked, 500, ProbeLimits(np.inf, 39, 1)) < 2


def test_routes__are_taken_joined_written_and_asked(tmp_path):
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(500, 16)).astype(np.float32)
    routes = trained(rows, 20, rng).route(rows, ProbeLimits(0.1, 19, 1))
    order = rng.permutation(500)
    taken = routes.take(order)
    parts = Routes.joined([routes.take(order[:90]), routes.take(order[90:])])
    parts.write(str(tmp_path / "routes.bin"))
    read = Routes.read(str(tmp_path / "routes.bin"), 500)
    for name in ("home", "bounds", "probes", "margins"):
        assert getattr(read, name).tolist() == getattr(taken, name).tolist()
    who, lists = read.within(0.05)
    margins = read.margins_to(who, lists)
    assert 0 < len(who) < len(routes.probes)
    assert (margins <= np.float16(0.05)).all()
    assert read.margins_to(np.arange(500), read.home).max() == 0
    pairs = zip(read.probing_rows, read.probes, strict=True)
    visited = {(int(row), int(one)) for row, one in pairs}
    stranger = next(one for one in range(20) if one != read.home[7] and (7, one) not in visited)
    assert np.isinf(read.margins_to(np.array([7]), np.array([stranger]))).all()
