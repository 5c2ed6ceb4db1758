import numpy as np
import pytest

from curation.neighbors.kernels.selection import columns_near, ranks_within


@pytest.mark.parametrize(("columns", "count"), [(5, 1), (5, 9), (300, 1), (1000, 7), (4097, 64)])
def test_columns_near__hold_the_highest_of_each_row_and_few_more(columns, count):
    scores = np.random.default_rng(0).integers(-(1 << 20), 1 << 20, (20, columns), np.int32)
    places = columns_near(scores, count)
    assert (np.diff(places) > 0).all()
    found = np.zeros(scores.size, bool)
    found[places] = True
    for row, is_found in zip(scores, found.reshape(scores.shape), strict=True):
        highest = np.sort(row)[::-1][:count]
        assert np.sort(row[is_found])[::-1][:count].tolist() == highest.tolist()
    assert len(places) <= 20 * min(columns, 3 * count + 4)


def test_ranks_within__count_inside_each_run():
    groups = np.array([3, 3, 3, 7, 9, 9])
    assert ranks_within(groups).tolist() == [0, 1, 2, 0, 0, 1]
    assert ranks_within(groups[:0]).tolist() == []
