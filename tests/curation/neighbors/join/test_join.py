import numpy as np
import pytest

from curation.neighbors.join.join import Join, best_of_each, join_exhaustively
from curation.neighbors.kernels.components import connected_components
from curation.neighbors.kernels.products import Products
from curation.neighbors.rows.arrange import arrange
from curation.neighbors.rows.routers import HashRouter
from curation.neighbors.rows.vectors import VectorSource
from pipelines.engines.local_engine import LocalEngine

THRESHOLD = 0.7


@pytest.mark.parametrize("products", [Products(), Products("bfloat16")], ids=lambda p: p.precision)
def test_join_exhaustively__finds_all_components_and_twins(embed, tmp_path, products):
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(40, 8))
    rows = centers[rng.integers(0, 40, 160)] + 0.35 * rng.normal(size=(160, 8))
    rows[80:90] = rows[:10]
    source = VectorSource(embed(rows), "copy")
    files = arrange([source], HashRouter(4), range(5), str(tmp_path / "rows"), LocalEngine())
    join = Join(files, THRESHOLD, str(tmp_path / "join"), products)
    joined = join_exhaustively(join, LocalEngine())
    parts = range(files.num_partitions)
    unit = np.concatenate([files.vectors(part) for part in parts]).astype(np.float64)
    ids = [row.tobytes() for part in parts for row in files.ids(part)]
    unit /= np.linalg.norm(unit, axis=1)[:, None]
    cosines = (unit @ unit.T).astype(np.float32)
    np.fill_diagonal(cosines, -2)
    labels = connected_components(160, joined.edges())
    np.testing.assert_array_equal(labels, connected_components(160, [np.argwhere(cosines > 0.7)]))
    twins, similarities = (np.concatenate(side) for side in zip(*map(joined.best, parts)))  # noqa: B905
    for row, twin in enumerate(twins):
        top = cosines[row].max()
        if top <= np.float32(THRESHOLD):
            assert twin == -1
            assert np.isnan(similarities[row])
            continue
        assert similarities[row] == pytest.approx(top, rel=1e-6)
        nearest = np.flatnonzero(cosines[row] >= top - 1e-6)
        assert twin in nearest
        same = [other for other in nearest if (unit[other] == unit[twin]).all()]
        assert ids[twin] == min(ids[other] for other in same)


def test_best_of_each__of_equal_cosines_the_smallest_id(embed, tmp_path):
    source = VectorSource(embed(np.eye(6)), "copy")
    files = arrange([source], HashRouter(1), [0, 1], str(tmp_path), LocalEngine())
    rows, twins = np.array([0, 0, 0, 2, 2]), np.array([5, 3, 4, 1, 0])
    exact = np.array([0.5, 0.9, 0.9, 0.1, 0.2], np.float32)
    best, cosines = best_of_each(files, 4, rows, twins, exact)
    ids = [row.tobytes() for row in files.ids(0)]
    assert best.tolist() == [min((3, 4), key=lambda one: ids[one]), -1, 0, -1]
    np.testing.assert_array_equal(cosines, np.array([0.9, np.nan, 0.2, np.nan], np.float32))
