import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from curation.neighbors.kernels.grouping import by_group


@given(groups=st.lists(st.integers(-2, 6), max_size=60), more=st.integers(0, 3))
def test_by_group__gives_the_rows_of_each_group_in_order(groups, more):
    count = 7 + more
    order, bounds = by_group(np.array(groups, np.int64), count)
    assert sorted(order.tolist()) == list(range(len(groups)))
    for group in range(count):
        wanted = [row for row, other in enumerate(groups) if other == group]
        assert order[bounds[group] : bounds[group + 1]].tolist() == wanted
