import numpy as np
import pytest

from curation.neighbors.coarse import Coarse, grown_centroids
from curation.neighbors.quantized import quantize_rows
from curation.neighbors.routes import Reach, Routes


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
    routes = coarse.route(rows, Reach(np.inf, 4, 2), 2)
    assert len(routes) == 3000
    assert len(np.unique(routes.own)) > 30
    assert (np.diff(routes.bounds) >= 4).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_route__gives_the_nearest_list_and_those_within_the_gap(threads):
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(9000, 24)).astype(np.float32)
    coarse = Coarse.trained(rows, 30, rng)
    assert len(coarse.groups) == 1
    routes = coarse.route(rows, Reach(0.2, 6, 1), threads)
    cosines = quantize_rows(rows).astype(np.float64) @ coarse.lists.T.astype(np.float64)
    below = (cosines.max(axis=1, keepdims=True) - cosines) / coarse.length
    below /= np.linalg.norm(quantize_rows(rows).astype(np.float64), axis=1, keepdims=True)
    assert routes.own.tolist() == cosines.argmax(axis=1).tolist()
    sixth = np.sort(below, axis=1)[:, 6:7]
    near = below.astype(np.float16) <= np.float16(0.2)
    wanted = near & (below <= sixth) & (np.arange(30) != routes.own[:, None])
    assert np.diff(routes.bounds).tolist() == wanted.sum(axis=1).tolist()
    assert routes.lists.tolist() == np.nonzero(wanted)[1].tolist()
    assert np.allclose(routes.gaps, below[wanted], atol=1e-3)


def test_gap_of_visits__is_that_of_so_many_visits_on_average():
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(2000, 24)).astype(np.float32)
    coarse = Coarse.trained(rows, 40, rng)
    gap = coarse.gap_of_visits(rows, 5, Reach(np.inf, 39, 1))
    assert 4.9 < len(coarse.route(rows, Reach(gap, 39, 1)).lists) / 2000 < 5.2
    assert coarse.gap_of_visits(rows, 500, Reach(np.inf, 39, 1)) < 2


def test_routes__are_taken_joined_written_and_asked(tmp_path):
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(500, 16)).astype(np.float32)
    routes = Coarse.trained(rows, 20, rng).route(rows, Reach(0.1, 19, 1))
    order = rng.permutation(500)
    taken = routes.take(order)
    parts = Routes.joined([routes.take(order[:90]), routes.take(order[90:])])
    parts.write(str(tmp_path / "routes.bin"))
    read = Routes.read(str(tmp_path / "routes.bin"), 500)
    for name in ("own", "bounds", "lists", "gaps"):
        assert getattr(read, name).tolist() == getattr(taken, name).tolist()
    who, lists = read.within(0.05)
    gaps = read.gaps_to(who, lists)
    assert 0 < len(who) < len(routes.lists)
    assert (gaps <= np.float16(0.05)).all()
    assert read.gaps_to(np.arange(500), read.own).max() == 0
    visited = {(int(row), int(one)) for row, one in zip(read.visitors, read.lists, strict=True)}
    stranger = next(one for one in range(20) if one != read.own[7] and (7, one) not in visited)
    assert np.isinf(read.gaps_to(np.array([7]), np.array([stranger]))).all()
