import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.neighbors.rows.packed_rows import id_keys, one_chunk, pack_rows, unpack_rows


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "uint64"])
@pytest.mark.parametrize("shape", [(0, 16), (5, 0), (1, 3), (40, 16)])
def test_unpack_rows__gives_what_was_packed_however_it_was_cut(dtype, shape):
    rows = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    whole = pack_rows(rows)
    for cut in (0, shape[0] // 2):
        column = pa.chunked_array([whole.slice(0, cut), whole.slice(cut)])
        found = unpack_rows(column, dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, rows)
        assert one_chunk(column).equals(whole)


def test_unpack_rows__a_column_without_chunks_has_no_rows():
    assert unpack_rows(pa.chunked_array([], pa.binary(16))).shape == (0, 16)


@given(ids=st.lists(st.binary(min_size=16, max_size=16), max_size=30))
def test_id_keys__sort_as_ids_do(ids):
    first, second = id_keys(np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 16))
    order = np.lexsort((second, first))
    assert [ids[row] for row in order] == sorted(ids)
