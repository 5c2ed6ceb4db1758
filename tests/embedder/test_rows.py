import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from embedder.rows import leveled, unit_rows

FINITE = {
    np.float32: st.floats(width=32, allow_nan=False, allow_infinity=False),
    np.float64: st.floats(allow_nan=False, allow_infinity=False),
}


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@given(data=st.data())
def test_unit_rows__of_any_finite_length(kind, data):
    rows = data.draw(arrays(kind, (3, 4), elements=FINITE[kind]))
    units = unit_rows(rows)
    lengths = np.linalg.norm(units, axis=1)
    assert np.allclose(lengths[rows.any(axis=1)], 1)
    assert not units[~rows.any(axis=1)].any()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@given(data=st.data())
def test_leveled__keeps_directions_and_their_squares_finite(kind, data):
    rows = data.draw(arrays(kind, (3, 4), elements=FINITE[kind]))
    even = leveled(rows)
    assert even.dtype == kind
    assert np.allclose(unit_rows(even), unit_rows(rows), atol=1e-7)
    nonzero = rows.any(axis=1)
    squares = np.einsum("nd,nd->n", *[even.astype(np.float32)] * 2)
    assert (np.isfinite(squares) & (squares > 0))[nonzero].all()


def test_leveled__leaves_what_has_no_direction_and_what_is_plain():
    rows = np.array([[0, 0], [np.nan, 1e-30], [np.inf, 1], [3, 4], [1e-9, 0]], np.float32)
    assert leveled(rows) is rows
