import numpy as np
import pytest

from curation.errors import StorageError
from curation.neighbors.rows.row_files import RowFiles, RowReader

SIZES = (700, 0, 1, 299)
WIDTH = 64


@pytest.fixture
def rows():
    return np.random.default_rng(0).random((sum(SIZES), WIDTH)).astype(np.float16)


@pytest.fixture(params=["local", "object store"])
def files(request, rows, tmp_path):
    folder = str(tmp_path) if request.param == "local" else f"memory://{tmp_path}"
    starts = tuple(int(start) for start in np.cumsum([0, *SIZES]))
    made = RowFiles(folder, WIDTH, "float16", starts, tuple(range(len(SIZES) + 1)))
    for partition, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        ids = np.arange(16 * start, 16 * stop).astype(np.uint8).reshape(-1, 16)
        made.write(partition, rows[start:stop], ids, {"row": np.arange(start, stop)})
    return made


@pytest.mark.parametrize(("gap_bytes", "at_once"), [(0, 1), (1000, 1 << 14), (1 << 20, 1 << 28)])
def test_gather__any_rows_in_any_order(files, rows, gap_bytes, at_once, monkeypatch):
    monkeypatch.setattr("curation.neighbors.rows.row_files._GAP_BYTES", gap_bytes)
    monkeypatch.setattr("curation.neighbors.rows.row_files._BYTES_AT_ONCE", at_once)
    reader, rng = RowReader(files), np.random.default_rng(1)
    asked = [rng.integers(0, len(rows), count) for count in (0, 1, 50, 3000)]
    for positions in [*asked, np.arange(len(rows)), np.array([999, 0, 999, 700])]:
        np.testing.assert_array_equal(reader.gather(positions), rows[positions])
    ids = files.gather("ids", np.array([999, 3]))
    np.testing.assert_array_equal(ids[:, 0], np.array([16 * 999, 16 * 3]).astype(np.uint8))


def test_gather__a_file_that_is_too_short_is_named(files, rows):
    files.write(3, rows[-200:], np.zeros((200, 16), np.uint8))
    with pytest.raises(StorageError, match=r"rows-000003\.bin"):
        RowReader(files).gather(np.array([999, 5]))
