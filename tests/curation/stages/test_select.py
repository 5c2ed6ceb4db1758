from small_pictures import image_row, pool_of

from curation.pool import UnionPool
from curation.schema import make_id
from curation.stage import StageFolder, StageInputs
from curation.stages.select import MANIFEST_COLUMNS, Select
from pipelines.local_engine import LocalEngine
from pipelines.stage_runner import Silent, run_stage


def select(tmp_path, shards=2, name="out"):
    curated = [image_row(n, f"seeds/{n}.jpg", source_set="seeds") for n in range(5)]
    web = [image_row(n) for n in range(3, 12)]
    parts = (
        pool_of(tmp_path / f"{name}-seeds", curated, shards, "seeds"),
        pool_of(tmp_path / f"{name}-web", web, shards),
    )
    union = UnionPool("union", {}, None, parts)
    folder = StageFolder(str(tmp_path / name), "select")
    return run_stage(Select(as_is=("seeds",)), StageInputs(union), folder, LocalEngine(), Silent())


def test_select__each_image_once_and_curated_sets_first(tmp_path):
    record, outputs = select(tmp_path)
    assert record.dropped == {"duplicate_in_union": 2}
    manifest = outputs["manifest"].read()
    assert manifest.column_names == list(MANIFEST_COLUMNS)
    assert manifest["source_set"].to_pylist() == ["seeds"] * 5 + ["web"] * 7
    assert manifest["seed_set"].null_count == 12
    verdicts = {row["id"]: row for row in outputs["decisions"].read().to_pylist()}
    assert verdicts[make_id("3.jpg")]["twin"] == make_id("seeds/3.jpg")


def test_select__content_is_free_of_shards(tmp_path):
    assert select(tmp_path)[0].outputs == select(tmp_path, 4, "again")[0].outputs
