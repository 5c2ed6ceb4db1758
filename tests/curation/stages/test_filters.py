import numpy as np
import pytest
from small_pictures import image_row, pool_of

from curation.config import parse_settings
from curation.errors import ConfigError
from curation.stage import StageFolder, StageInputs
from curation.stages.filters import Filters
from embedder.images import encode_jpeg
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage


def test_filters__one_table_with_a_column_a_score(tmp_path):
    rows = [image_row(n) for n in range(3)]
    blank = encode_jpeg(np.full((64, 64, 3), 200, np.uint8))
    rows[1] = image_row(1, image=blank)
    rows[2] = image_row(2, width=20, height=20, original_width=20, original_height=20)
    stage = parse_settings(Filters, {"filters": [{"quality": {"min_side": 32}}, {"nsfw": {}}]}, "x")
    folder = StageFolder(str(tmp_path / "out"), "filters", "decisions")
    inputs = StageInputs(pool_of(tmp_path / "rows", rows))
    record, outputs = run_stage(stage, inputs, folder, LocalEngine(), Silent())
    assert record.dropped == {"blank": 1, "too_small": 1}
    table = outputs["decisions"].read().to_pylist()
    assert outputs["decisions"].path == str(tmp_path / "out")
    kept = next(row for row in table if row["keep"])
    assert kept["threshold"] == pytest.approx(0.8)
    assert kept["nsfw_score"] == kept["score"]


def test_filters__a_stage_that_judges_no_rows_is_refused():
    with pytest.raises(ConfigError, match="'near_dedup' is no filter"):
        parse_settings(Filters, {"filters": [{"near_dedup": {"embeddings": "x"}}]}, "here")
    with pytest.raises(ConfigError, match="no stage 'qualty'; did you mean 'quality'"):
        parse_settings(Filters, {"filters": [{"qualty": {}}]}, "here")


def test_filters__relevance_is_one_where_it_needs_no_seeds():
    stage = parse_settings(Filters, {"filters": [{"quality": {}}, {"relevance": {}}]}, "here")
    assert stage.required_columns() == ("image", "original_width", "original_height")
    assert "text_share" in stage.decision_columns().names
    seeds = {"seeds": ["pets"], "embeddings": "copy"}
    with pytest.raises(ConfigError, match="'relevance' compares with the sets pets, which only a"):
        parse_settings(Filters, {"filters": [{"relevance": seeds}]}, "here")
    with pytest.raises(ConfigError, match="'embed' is no filter: it does not judge single images"):
        parse_settings(Filters, {"filters": [{"embed": {}}]}, "here")
