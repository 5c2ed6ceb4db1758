import json

import pytest
from small_pictures import picture
from test_cli import fails, succeeds

from curation.ledger import StageRecord
from embedder.images import encode_jpeg
from pipelines.planner import estimate
from pipelines.runner import RunRecord, StageEntry

RECIPE = """
name: small
sets: {}
pool:
  - ingest: {images: "IMAGES"}
  - canonicalize
  - exact_dedup
  - select
  - pack
"""


def run_of(*stages: tuple[int, float]) -> RunRecord:
    entries = [
        StageEntry(
            stage=f"s{n}",
            folder=f"s{n}",
            record=StageRecord(
                stage=f"s{n}",
                version=1,
                key="",
                settings={},
                rows_in=rows,
                rows_out=rows,
                dropped={},
                outputs={},
                seconds=seconds,
            ),
        )
        for n, (rows, seconds) in enumerate(stages)
    ]
    return RunRecord(recipe="x", recipe_file="x", seed=0, pool=tuple(entries))


def test_estimate__tells_what_a_stage_costs_once_from_what_a_row_costs(tmp_path):
    small, large = run_of((100, 5.0), (50, 3.0)), run_of((400, 5.3), (200, 3.0))
    first, second = estimate((small, str(tmp_path)), (large, str(tmp_path)), 1_000_000)
    assert first.rows == 1_000_000
    assert first.core_hours * 3600 == pytest.approx(4.9 + 0.001 * 1_000_000)
    assert second.rows == 500_000  # half of the rows reach it, as in the sample
    assert second.core_hours * 3600 == pytest.approx(3.0, abs=0.1)


def test_plan__measures_a_sample_of_the_users_own_data(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(40):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(encode_jpeg(picture(number)))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace("IMAGES", str(tmp_path / "images")))
    words = ("plan", recipe, "--images", "1e9", "--sample", 24)
    rows = json.loads(succeeds(*words, "--json"))
    assert [row["stage"] for row in rows][:2] == ["ingest", "canonicalize"]
    assert rows[0]["rows"] == 1e9
    assert all(row["core_hours"] > 0 for row in rows)
    packed, images = rows[-1]["disk_bytes"], rows[1]["disk_bytes"]
    assert 0.5 < packed / images < 1.5  # the same images, written once more
    assert "bottleneck" in succeeds(*words, "--cores", 640)
    assert "unknown key 'polo'" in fails(2, *words, "--set", "polo=1")
