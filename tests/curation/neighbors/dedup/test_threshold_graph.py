import numpy as np
import pytest

from curation.errors import StageError
from curation.neighbors.dedup.threshold_graph import ComponentSizes, check_largest, connect
from tests.curation.neighbors.dedup.conftest import crowd


@pytest.mark.parametrize("seed", range(2))
def test_connect__labels_are_those_of_all_pairs(made, tmp_path, seed):
    one = made(crowd(seed))
    graph, sizes = connect(one.graph.joined, str(tmp_path / "labels.bin"))
    parts = range(graph.files.num_partitions)
    labels = np.concatenate([graph.labels(partition) for partition in parts])
    np.testing.assert_array_equal(labels, one.labels())
    counts = np.unique(labels, return_counts=True)[1]
    assert sizes == ComponentSizes(
        int((counts > 1).sum()), int(counts[counts > 1].sum()), int(counts.max())
    )


def test_connect__rows_alone_are_no_component(made, tmp_path):
    sizes = connect(made(np.eye(8)).graph.joined, str(tmp_path / "labels.bin"))[1]
    assert sizes == ComponentSizes(0, 0, 1)


@pytest.mark.parametrize(
    ("largest", "rows", "is_refused"),
    [(1000, 1000, False), (1001, 2000, True), (2000, 200_000, False), (2001, 200_000, True)],
)
def test_check_largest__allows_a_share_and_a_thousand(largest, rows, is_refused):
    sizes = ComponentSizes(1, largest, largest)
    if not is_refused:
        check_largest(sizes, rows, 0.01)
        return
    with pytest.raises(StageError, match=rf"holds {largest} of {rows} rows, allowed are \d+"):
        check_largest(sizes, rows, 0.01)
