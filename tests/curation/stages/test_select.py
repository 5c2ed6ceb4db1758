import numpy as np
import pyarrow as pa
from small_pictures import image_row, pool_of

from curation.dataset import write_dataset
from curation.pool import UnionPool
from curation.schema import embedding_schema, make_id
from curation.stage import StageFolder, StageInputs
from curation.stages.select import MANIFEST_COLUMNS, Select
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage, stage_key


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


def with_vectors(tmp_path, pool, directions):
    """The pool with a side-car `copy`: one of some directions, and a little noise, for each row."""
    tables = []
    for index in range(pool.num_shards):
        ids = pool.read(index, ["source"])
        rng = np.random.default_rng(len(tables) + len(ids))
        rows = np.array([directions[name] for name in ids["source"].to_pylist()]).reshape(-1, 16)
        rows = rows + 0.01 * rng.normal(size=rows.shape)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        flat = pa.array(rows.astype(np.float16).reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(flat, 16)
        tables.append(pa.table({"id": ids["id"], "source": ids["source"], "embedding": vectors}))
    side_car = write_dataset(str(tmp_path / f"{pool.name}-emb"), tables, embedding_schema(16))
    return pool.with_layer("copy", side_car)


def test_select__near_duplicates_across_sets_fall_within_a_set_they_stay(tmp_path):
    directions = dict(enumerate(np.eye(16)))
    curated = [image_row(n, f"seeds/{n}.jpg", source_set="seeds") for n in range(4)]
    web = [image_row(n) for n in range(20, 26)]
    same = {f"seeds/{n}.jpg": directions[min(n, 2)] for n in range(4)}  # 2 and 3 are alike
    same |= {f"{n}.jpg": directions[n - 18] for n in range(20, 26)}  # 20 is like 2 and 3
    parts = (
        with_vectors(tmp_path, pool_of(tmp_path / "s", curated, 2, "seeds"), same),
        with_vectors(tmp_path, pool_of(tmp_path / "w", web, 3), same),
    )
    union = UnionPool("union", {}, None, parts)
    folder = StageFolder(str(tmp_path / "out"), "select")
    stage = Select(as_is=("seeds",), embeddings="copy", threshold=0.8)
    record, outputs = run_stage(stage, StageInputs(union), folder, LocalEngine(), Silent())
    assert record.dropped == {"duplicate_in_union": 1}
    dropped = [row for row in outputs["decisions"].read().to_pylist() if not row["keep"]]
    assert dropped[0]["id"] == make_id("20.jpg")
    assert dropped[0]["twin"] in {make_id("seeds/2.jpg"), make_id("seeds/3.jpg")}


def test_select__key_of_a_union_follows_its_parts(tmp_path):
    parts = (pool_of(tmp_path / "a", [image_row(1)]), pool_of(tmp_path / "b", [image_row(2)]))
    keys = [
        stage_key(Select(), StageInputs(UnionPool("union", {}, None, (part,)))) for part in parts
    ]
    assert keys[0] != keys[1]
