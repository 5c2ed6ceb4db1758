import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from small_pictures import image_row, pool_of

from curation.dataset import Dataset, write_dataset
from curation.schema import make_id, schema_of
from curation.stage import StageFolder, StageInputs
from curation.stages.pack import Pack
from embedder.images import decode
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage


def pack(tmp_path, pool, name="out", **settings):
    folder = StageFolder(str(tmp_path / name), "pack")
    record, _ = run_stage(Pack(**settings), StageInputs(pool), folder, LocalEngine(), Silent())
    return record, Dataset.open(folder.output("packed"))


def test_pack__index_points_at_each_image(tmp_path):
    pool = pool_of(tmp_path / "rows", [image_row(n) for n in range(17)], shards=5)
    record, packed = pack(tmp_path, pool, rows_per_tar=6)
    assert record.rows_out == packed.num_rows == 17
    assert packed.num_shards > 1
    for index in range(packed.num_shards):
        tar_path = Path(packed.path) / f"shard-{index:05d}.tar"
        data = tar_path.read_bytes()
        rows = packed.read_shard(index).to_pylist()
        with tarfile.open(tar_path) as tar:
            names = [member.name for member in tar]
            assert names == [f"{row['id']}.{kind}" for row in rows for kind in ("jpg", "json")]
            meta = json.loads(tar.extractfile(names[1]).read())
            assert meta["id"] == rows[0]["id"]
        for row in rows:
            image = decode(data[row["offset"] : row["offset"] + row["num_bytes"]])
            assert image.shape == (row["height"], row["width"], 3)


def test_pack__bytes_are_the_same_every_time(tmp_path):
    pool = pool_of(tmp_path / "rows", [image_row(n) for n in range(7)])
    _, first = pack(tmp_path, pool)
    _, second = pack(tmp_path, pool, "again")
    assert first.manifest.files_digest == second.manifest.files_digest
    assert set(first.manifest.shards[0].companion) == {"shard-00000.tar"}


def test_pack__broken_image_is_dropped_with_its_reason(tmp_path):
    rows = [image_row(n) for n in range(4)]
    boxes = [{"id": row["id"], "boxes": [[0, 0, 9, 9]]} for row in rows]
    rows[2]["image"] = b"nonsense"
    pool = pool_of(tmp_path / "rows", rows, shards=1)
    record, packed = pack(tmp_path, with_boxes(tmp_path, pool, boxes))
    assert record.dropped == {"unreadable": 1}
    assert packed.num_rows == 3
    assert rows[2]["id"] not in packed.read()["id"].to_pylist()


def test_pack__faces_are_burned_in(tmp_path):
    row = image_row(1)
    pool = pool_of(tmp_path / "rows", [row], shards=1)
    boxed = with_boxes(tmp_path, pool, [{"id": row["id"], "boxes": [[0, 0, 32, 32]]}])
    _, packed = pack(tmp_path, boxed)
    where = packed.read().to_pylist()[0]
    data = (Path(packed.path) / "shard-00000.tar").read_bytes()
    image = decode(data[where["offset"] : where["offset"] + where["num_bytes"]]).astype(int)
    change = np.abs(image - decode(row["image"])).mean(axis=2)
    assert change[:24, :24].mean() > 20
    assert change[44:, 44:].mean() < 5


def with_boxes(tmp_path, pool, boxes):
    import pyarrow as pa

    schema = schema_of(["id", "boxes"])
    ids = pool.read(0, [])["id"].to_pylist()
    ordered = sorted(boxes, key=lambda row: ids.index(row["id"]))
    faces = write_dataset(str(tmp_path / "faces"), [pa.Table.from_pylist(ordered, schema)], schema)
    return type(pool)(pool.name, {**pool.layers, "faces": faces})


def test_pack__killed_between_tars_goes_on(tmp_path, monkeypatch):
    from curation.stages import pack as module

    pool = pool_of(tmp_path / "rows", [image_row(n) for n in range(12)], shards=4)
    _, calm = pack(tmp_path, pool, "calm", rows_per_tar=3)
    calls = []
    real = module._pack_rows

    def dying(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_pack_rows", dying)
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path, pool, rows_per_tar=3)
    _, resumed = pack(tmp_path, pool, rows_per_tar=3)
    assert len(calls) == 5
    assert resumed.manifest.files_digest == calm.manifest.files_digest
    assert make_id("3.jpg") in resumed.read()["id"].to_pylist()
