import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.errors import StorageError
from curation.exchange import Exchange


def table_of(numbers):
    """Rows with columns of fixed and of any size."""
    return pa.table(
        {
            "number": pa.array(numbers, pa.int64()),
            "text": pa.array([str(number) * (number % 5) for number in numbers], pa.string()),
            "list": pa.array([[number] * (number % 3) for number in numbers], pa.list_(pa.int8())),
        }
    )


@settings(max_examples=40, deadline=None)
@given(items=st.lists(st.lists(st.integers(0, 120), max_size=60), min_size=1, max_size=4))
def test_exchange__gives_each_bucket_its_rows_in_order(tmp_path_factory, items):
    exchange = Exchange(str(tmp_path_factory.mktemp("exchange")), 7)
    for number, numbers in enumerate(items):
        exchange.write(number, table_of(numbers), np.array(numbers, np.int64) % 7)
    for bucket in range(7):
        rows = [number for numbers in items for number in numbers if number % 7 == bucket]
        assert exchange.read(bucket, len(items)).equals(table_of(rows))
        parts = list(exchange.parts(bucket, len(items)))
        assert sum(part.num_rows for part in parts) == len(rows)
        assert all(part.num_rows for part in parts)


def test_exchange__an_empty_bucket_takes_eight_bytes(tmp_path):
    sizes = []
    for count in (2, 10_002):
        exchange = Exchange(str(tmp_path / f"{count}"), count)
        exchange.write(0, table_of([1, 2, 3]), np.array([0, 1, 1]))
        sizes.append((tmp_path / f"{count}" / "mapped" / "000000.bin").stat().st_size)
    assert sizes[1] - sizes[0] == 80_000


@pytest.mark.parametrize("kept", [4, 30, -1])
def test_exchange__a_file_that_is_too_short_is_named(tmp_path, kept):
    exchange = Exchange(str(tmp_path), 2)
    exchange.write(0, table_of([1, 2, 3]), np.array([0, 1, 1]))
    path = tmp_path / "mapped" / "000000.bin"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StorageError, match="000000"):
        exchange.read(1, 1)
