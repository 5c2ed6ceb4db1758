import numpy as np
import pytest

from curation.neighbors.dedup.row_masks import write_active, write_exempt
from tests.curation.neighbors.dedup.conftest import crowd


@pytest.fixture
def one(made):
    rows = crowd(0)
    return made(rows, rows[:30] + np.float16(0.3), np.concatenate([rows[40:50], rows[3:6] + 1]))


def read(path):
    return np.fromfile(path, bool)


def test_write_active__takes_the_rows_of_sets_less_the_dropped(one, tmp_path):
    files = one.graph.files
    path = write_active(files, str(tmp_path / "a.bin"), [0, 2], [np.array([5]), np.array([7, 9])])
    wanted = np.isin(one.sets, [0, 2])
    wanted[[5, 7, 9]] = False
    assert read(path).tolist() == wanted.tolist()
    assert not read(write_active(files, path, [])).any()


def test_write_exempt__takes_the_base_but_for_rows_that_stand_for_new_ones(one, tmp_path):
    files = one.graph.files
    path = write_exempt(files, str(tmp_path / "e.bin"), 2)
    vectors = np.concatenate([files.vectors(part) for part in range(files.num_partitions)])
    new = {vectors[n].tobytes() for n in np.flatnonzero(one.sets == 0)}
    wanted = [
        group == 2 and row.tobytes() not in new
        for group, row in zip(one.sets, vectors, strict=True)
    ]
    assert read(path).tolist() == wanted
    assert 0 < sum(wanted) < (one.sets == 2).sum()
