import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.neighbors.kernels import identical
from curation.neighbors.kernels.identical import fingerprints, first_among, first_identical


def first_of(rows):
    found = {}
    return [found.setdefault(row.tobytes(), number) for number, row in enumerate(rows)]


@given(
    numbers=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=40),
    dtype=st.sampled_from(["float16", "float32"]),
    width=st.integers(1, 9),
)
def test_first_identical__is_that_of_a_dictionary_of_bytes(numbers, dtype, width):
    rows = np.zeros((len(numbers), width), dtype)
    if numbers:
        rows[:, 0], rows[:, -1] = np.array(numbers).T
    assert first_identical(rows).tolist() == first_of(rows)


def test_first_identical__minus_zero_is_another_row():
    assert first_identical(np.array([[0.0], [-0.0], [0.0]], np.float16)).tolist() == [0, 1, 0]


def test_first_identical__colliding_fingerprints_join_no_rows(monkeypatch):
    rows = np.arange(12, dtype=np.float16).reshape(6, 2)
    monkeypatch.setattr(identical, "fingerprints", lambda v: np.zeros((len(v), 2), np.uint64))
    assert first_identical(rows).tolist() == list(range(6))


def test_fingerprints__differ_where_a_bit_does():
    row = np.random.default_rng(0).integers(0, 256, 66, np.uint8)
    rows = np.repeat(row[None], 1 + 8 * len(row), axis=0)
    for bit in range(8 * len(row)):
        rows[1 + bit, bit // 8] ^= 1 << bit % 8
    prints = fingerprints(rows)
    assert (prints[1:] != prints[0]).any(axis=1).all()


@pytest.mark.parametrize("seed", range(5))
def test_first_among__is_the_first_active_row_with_the_same_bytes(seed):
    rng = np.random.default_rng(seed)
    rows, active = rng.integers(0, 9, (50, 1)).astype(np.float16), rng.random(50) < 0.6
    wanted = [
        next(b for b in range(50) if active[b] and (rows[b] == rows[a]).all()) if active[a] else -1
        for a in range(50)
    ]
    assert first_among(first_identical(rows), active).tolist() == wanted
