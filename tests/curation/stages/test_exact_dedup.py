import pytest
from small_pictures import image_row, pool_of

from curation.schema import make_id
from curation.stage import StageFolder, StageInputs
from curation.stages.exact_dedup import ExactDedup
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage


def dedup(tmp_path, rows, shards=3, name="out"):
    pool = pool_of(tmp_path / f"rows-{name}", rows, shards)
    folder = StageFolder(str(tmp_path / name), "exact_dedup")
    return run_stage(ExactDedup(), StageInputs(pool), folder, LocalEngine(), Silent())


def rows_with_copies():
    rows = [image_row(n) for n in range(20)]
    rows += [image_row(n, f"mirror-{n}.jpg") for n in (3, 4)]  # the same bytes
    rows += [image_row(n, f"saved-{n}.png", sha256="f" * 64) for n in (4, 5)]  # other bytes
    return rows


def test_exact_dedup__copies_fall_and_name_their_twin(tmp_path):
    record, outputs = dedup(tmp_path, rows_with_copies())
    assert record.dropped == {"duplicate_bytes": 2, "duplicate_pixels": 2}
    assert (record.rows_in, record.rows_out) == (24, 20)
    verdicts = {row["id"]: row for row in outputs["decisions"].read().to_pylist()}
    group = [make_id(name) for name in ("4.jpg", "mirror-4.jpg", "saved-4.png")]
    kept = [one for one in group if verdicts[one]["keep"]]
    assert kept == [min(group)]
    assert all(verdicts[one]["twin"] == kept[0] for one in group if one != kept[0])
    assert verdicts[make_id("7.jpg")]["twin"] is None


def test_exact_dedup__keeps_the_largest_file(tmp_path):
    rows = [image_row(1, f"{n}.jpg", sha256=f"{n:064x}", num_bytes=100 + n) for n in range(9)]
    _, outputs = dedup(tmp_path, rows)
    kept = [row["id"] for row in outputs["decisions"].read().to_pylist() if row["keep"]]
    assert kept == [make_id("8.jpg")]


@pytest.mark.parametrize("shards", [1, 5])
def test_exact_dedup__content_is_free_of_shards(tmp_path, shards):
    first, _ = dedup(tmp_path, rows_with_copies())
    second, _ = dedup(tmp_path, rows_with_copies(), shards, "again")
    assert first.outputs == second.outputs


def test_exact_dedup__ten_thousand_copies_of_one_image(tmp_path):
    row = image_row(1)
    rows = [{**row, "id": make_id(str(n)), "source": str(n)} for n in range(10_000)]
    record, _ = dedup(tmp_path, rows)
    assert record.rows_out == 1


def test_exact_dedup__empty_pool(tmp_path):
    record, _ = dedup(tmp_path, [])
    assert (record.rows_in, record.rows_out) == (0, 0)
