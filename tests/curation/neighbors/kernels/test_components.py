import subprocess
import sys

import numpy as np
import pytest

from curation.neighbors.kernels.components import (
    component_sizes,
    connected_components,
    spanning_edges,
)


def smallest_reachable(num_rows, edges):
    labels = list(range(num_rows))
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            low = min(labels[a], labels[b])
            changed |= labels[a] != low or labels[b] != low
            labels[a] = labels[b] = low
    return labels


def test_connected_components__labels_are_the_smallest_rows():
    rng = np.random.default_rng(0)
    for _ in range(30):
        edges = rng.integers(0, 60, (rng.integers(0, 50), 2))
        shards = np.array_split(edges, 4)
        assert connected_components(60, shards).tolist() == smallest_reachable(60, edges)


def test_connected_components__order_of_edges_and_shards_does_not_matter():
    rng = np.random.default_rng(1)
    edges = rng.integers(0, 5000, (4000, 2))
    expected = connected_components(5000, [edges])
    shuffled = rng.permutation(edges)[:, ::-1]
    assert (connected_components(5000, np.array_split(shuffled, 17)) == expected).all()


def test_connected_components__a_chain_of_many_rows():
    rows = np.random.default_rng(2).permutation(100_000)
    edges = np.stack([rows[:-1], rows[1:]], axis=1)
    assert not connected_components(100_000, np.array_split(edges, 9)).any()


def test_connected_components__no_rows_and_no_edges():
    assert connected_components(0, []).tolist() == []
    assert connected_components(3, [np.empty((0, 2), np.int64)]).tolist() == [0, 1, 2]


def test_spanning_edges__connect_the_same_rows_with_fewer_edges():
    pairs = np.array([[5, 3], [3, 9], [9, 5], [5, 5], [7, 8], [3, 5]])
    assert spanning_edges(pairs).tolist() == [[3, 5], [7, 8], [3, 9]]


def test_component_sizes__by_label():
    assert component_sizes(np.array([0, 0, 2, 0, 4])).tolist() == [3, 0, 1, 0, 1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_connected_components__at_most_16_bytes_a_row_at_1e8_rows():
    script = """
import resource, numpy as np
from curation.neighbors.kernels.components import component_sizes, connected_components
n = 100_000_000
rng = np.random.default_rng(0)
shards = (rng.integers(0, n, (1 << 20, 2)) for _ in range(40))
labels = connected_components(1000, [np.array([[0, 1]])])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
labels = connected_components(n, shards)
sizes = component_sizes(labels)
assert int(sizes.sum()) == n
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / n)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) <= 16
