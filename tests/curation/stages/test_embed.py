import numpy as np
import pytest
from small_pictures import image_row, pool_of

from curation.config import parse_settings
from curation.stage import StageFolder, StageInputs
from curation.stages.embed import Embed
from embedder.errors import EncoderError
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage


def embed(tmp_path, rows, shards=2, name="out", workers=1):
    pool = pool_of(tmp_path / f"rows-{name}", rows, shards)
    folder = StageFolder(str(tmp_path / name), "embed")
    return run_stage(Embed(), StageInputs(pool), folder, LocalEngine(workers), Silent())


def test_embed__unit_rows_and_a_named_space_for_each_encoder(tmp_path):
    record, outputs = embed(tmp_path, [image_row(n) for n in range(5)])
    assert record.rows_out == 5
    for name in ("copy", "semantic"):
        assert outputs[name].columns == ["id", "source", "embedding"]
        rows = np.stack(outputs[name].read()["embedding"].to_numpy()).astype(np.float32)
        assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 2e-3
        assert outputs[name].attributes["encoder"] == f"lite-{name}"
    assert outputs["copy"].attributes["space"] != outputs["semantic"].attributes["space"]
    assert 0 < outputs["copy"].attributes["thresholds"]["dedup"] < 1


def test_embed__content_is_free_of_shards_and_workers(tmp_path):
    rows = [image_row(n) for n in range(11)]
    first, _ = embed(tmp_path, rows)
    second, _ = embed(tmp_path, rows, 3, "again", workers=2)
    assert first.outputs == second.outputs


def test_embed__broken_image_is_dropped_and_costs_no_other(tmp_path):
    rows = [image_row(n) for n in range(4)]
    rows[1]["image"] = b"nonsense"
    record, outputs = embed(tmp_path, rows)
    assert record.dropped == {"unreadable": 1}
    assert rows[1]["id"] not in outputs["copy"].read()["id"].to_pylist()


def test_embed__unknown_encoder_is_an_error_before_any_work():
    stage = parse_settings(Embed, {"encoders": {"x": "lite-cpy"}}, "r.yaml")
    with pytest.raises(EncoderError, match="unknown encoder 'lite-cpy'"):
        stage.fingerprint()


def test_embed__asks_for_the_memory_that_its_encoders_take():
    small = Embed(encoders={"x": "lite-copy"}).resources().memory
    large = Embed(encoders={"x": "dinov2:vits14:random"}).resources().memory
    assert 2 << 30 < small < large  # 3 and 22 million weights
    assert large > (2 << 30) + 8 * 21_000_000
