import numpy as np
import pyarrow as pa
import pytest

from curation.neighbors.rows import arrange as module
from curation.neighbors.rows.arrange import (
    WorkerBudget,
    arrange,
    read_bad_rows,
    rows_per_task,
    shard_runs,
)
from curation.neighbors.rows.routers import HashRouter, IdRouter
from curation.neighbors.rows.vectors import VectorSource
from pipelines.engines.local_engine import LocalEngine

GB = 10**9


def test_rows_per_task__files_that_meet_grow_like_the_rows():
    def reads(num_rows):
        return (num_rows / rows_per_task(num_rows, 1024, 4 * GB)) ** 2

    assert reads(1_200_000_000) < 20e6
    assert reads(1_200_000_000) / 1_200_000_000 < 1.1 * reads(270_000_000) / 270_000_000


def test_rows_per_task__never_more_than_memory_holds():
    for num_rows in (1, 100_000, 10_000_000, 1_200_000_000):
        for memory in (10**6, 4 * GB):
            assert 1 <= rows_per_task(num_rows, 1024, memory) * 6 * 1024 <= max(memory, 6 * 1024)


def test_rows_per_task__a_small_pool_has_work_for_several():
    assert 1_000_000 / rows_per_task(1_000_000, 1024, 4 * GB) >= 15


@pytest.fixture
def sources(embed):
    """A pool with bad and with identical rows, and a set."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 8))
    rows[[4, 250]], rows[100:120] = [[0.0], [np.nan]], rows[:20]
    sizes = {"original_width": pa.array([None, *range(1, 300)]), "original_height": [2] * 300}
    pools = embed(rows, sizes=[120, 0, 1, 179], columns=sizes), embed(rows[:40], "bench")
    return [VectorSource(pool, "copy") for pool in pools]


@pytest.mark.parametrize("task_rows", [(30, 60), (1 << 13, 1 << 16)])
@pytest.mark.parametrize("router", [HashRouter, IdRouter])
def test_arrange__holds_every_good_row_once_by_list_and_id(
    sources, tmp_path, monkeypatch, router, task_rows
):
    monkeypatch.setattr(module, "_TASK_ROWS", task_rows)
    folder, starts = str(tmp_path), [0, 3, 5, 8]
    files = arrange(sources, router(8), starts, folder, LocalEngine(), WorkerBudget(2))
    assert (files.num_rows, files.width, files.dtype) == (336, 8, "float16")
    given = [source.read(shard) for source in sources for shard in range(source.pool.num_shards)]
    places = [
        (number, shard, row)
        for number, source in enumerate(sources)
        for shard, count in enumerate(source.pool.shard_rows())
        for row in range(count)
    ]
    ids, vectors = (np.concatenate(side) for side in zip(*given, strict=True))
    good = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    homes = router(8).route(ids, vectors, None).home
    order = sorted(np.flatnonzero(good), key=lambda n: (homes[n], ids[n].tobytes(), places[n][0]))
    stored = [files.rows(partition) for partition in range(3)]
    assert [stop - start for start, stop in zip(files.starts, files.starts[1:], strict=False)] == [
        int(np.isin(homes[order], range(a, b)).sum()) for a, b in ((0, 3), (3, 5), (5, 8))
    ]
    found = {name: np.concatenate([one[name] for one in stored]) for name in stored[0].columns}
    np.testing.assert_array_equal(found["ids"], ids[order])
    np.testing.assert_array_equal(found["vectors"], vectors[order])
    np.testing.assert_array_equal(found["list"], homes[order])
    where = zip(found["set"], found["shard"], found["row"], strict=True)
    assert [tuple(map(int, one)) for one in where] == [places[n] for n in order]
    for one in stored:  # the first with the same bytes
        rows = one["vectors"]
        same = [next(a for a in range(len(rows)) if (rows[a] == row).all()) for row in rows]
        assert one["first"].tolist() == same
    assert read_bad_rows(folder, 0, 0).tolist() == [4, 104]
    assert read_bad_rows(folder, 0, 3).tolist() == [129]


def test_arrange__sizes_of_originals_go_along_and_are_zero_where_unknown(sources, tmp_path):
    files = arrange(sources, IdRouter(4), range(5), str(tmp_path), LocalEngine())
    numbers = {row: n for n, row in enumerate(sources[0].pool.live_ids(0).to_pylist())}
    for partition in range(4):
        rows = files.rows(partition)
        assert not rows["num_bytes"].any()
        for row_id, of_set, shard, pixels in zip(
            rows["ids"], rows["set"], rows["shard"], rows["pixels"], strict=True
        ):
            if of_set == 0 and shard == 0:
                assert pixels == 2 * numbers[row_id.tobytes().hex()]
            elif of_set == 1:
                assert pixels == 0


def test_arrange__what_was_deleted_is_made_again_and_nothing_else(sources, tmp_path):
    first = arrange(sources, HashRouter(4), range(5), str(tmp_path), LocalEngine())
    rows = first.vectors(2).copy()
    (tmp_path / "arranged" / "rows-000002.bin").unlink()
    stamp = (tmp_path / "arranged" / "rows-000001.bin").stat().st_mtime_ns
    assert arrange(sources, HashRouter(4), range(5), str(tmp_path), LocalEngine()) == first
    np.testing.assert_array_equal(first.vectors(2), rows)
    assert (tmp_path / "arranged" / "rows-000001.bin").stat().st_mtime_ns == stamp
    assert not (tmp_path / "split").exists()


@pytest.mark.parametrize("memory", [1, 1 << 12, 1 << 30])
def test_shard_runs__hold_every_shard_once(sources, memory, monkeypatch):
    monkeypatch.setattr(module, "_TASK_ROWS", (50, 100))
    runs = shard_runs(sources, memory)
    assert [(run.source, shard) for run in runs for shard in range(run.first, run.end)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 0),
    ]
