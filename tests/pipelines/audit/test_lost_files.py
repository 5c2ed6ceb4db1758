"""Files that vanish from a finished or half-finished run: just their shards are made again."""

import json
from pathlib import Path

import pytest
from small_pictures import picture

from embedder.images import encode_jpeg
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.recipe import load_recipe
from pipelines.run.runner import RecipeRun
from pipelines.run.stage_runner import Silent
from tests.pipelines.commands import fails, succeeds

RECIPE = """
name: small
rows_per_shard: 4
pool:
  - ingest: {images: "IMAGES"}
  - canonicalize: {max_side: 64}
  - quality
  - exact_dedup
  - select
  - pack: {rows_per_tar: 5}
"""


class Counts(Silent):
    """Notes which shards were made."""

    def __init__(self):
        self.made = []

    def advanced(self, stage, receipt):
        self.made.append((stage, receipt.index))


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(16):
        data = encode_jpeg(picture(number, 96), 95)
        (tmp_path / "images" / f"{number}.jpg").write_bytes(data)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("IMAGES", str(tmp_path / "images")))
    return path


def run(recipe, work: Path):
    """The digest of the run and the shards that were made."""
    work.mkdir(exist_ok=True)
    watcher = Counts()
    engine = LocalEngine(first_pause_s=0.01)
    record = RecipeRun(load_recipe(str(recipe), {"work": str(work)}), str(work), engine, watcher)
    entries = record.run().pool
    return [entry.record.outputs for entry in entries], watcher.made


def file_of(work: Path, pattern: str) -> Path:
    (found,) = work.glob(pattern)
    return found


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [Path.unlink, cut])
@pytest.mark.parametrize(
    ("pattern", "made"),
    [
        ("work/pool/*-canonicalize-*/images/shard-00001.parquet", [("canonicalize", 1)]),
        ("work/pool/*-quality-*/decisions/shard-00002.parquet", [("quality", 2)]),
        ("work/pool/*-exact_dedup-*/decisions/shard-00000.parquet", []),
        ("work/pool/*-pack-*/packed/shard-00001.tar", []),
        ("work/pool/*-pack-*/packed/shard-00000.parquet", []),
        ("work/pool/*-ingest-*/rows/shard-00003.parquet", []),
        ("manifest/shard-00000.parquet", []),
        ("work/pool/*-quality-*/decisions/_manifest.json", []),
    ],
)
def test_run__a_lost_file_is_made_again_and_no_other(pattern, made, damage, recipe, tmp_path):
    work = tmp_path / "work"
    first, _ = run(recipe, work)
    path = file_of(work, pattern)
    if damage is cut and path.suffix in (".json", ".tar"):
        pytest.skip("verify sees these")
    before, kept = path.read_bytes(), file_of(work, "work/pool/*-pack-*/packed/shard-00002.tar")
    stamp = kept.stat().st_mtime_ns
    damage(path)
    assert run(recipe, work) == (first, made)
    assert path.read_bytes() == before
    assert kept.stat().st_mtime_ns == stamp
    assert "ok" in succeeds("verify", work)
    assert run(recipe, work) == (first, [])


def test_run__names_what_was_lost(recipe, tmp_path, caplog):
    work = tmp_path / "work"
    run(recipe, work)
    path = file_of(work, "work/pool/*-canonicalize-*/images/shard-00001.parquet")
    path.unlink()
    run(recipe, work)
    assert f"canonicalize: {path}: gone or cut short; made again" in caplog.text
    assert "raw bytes of 1 of 4 shards were deleted after use" in caplog.text


def test_run__a_lost_shard_is_not_dropped_with_max_failed_shards(recipe, tmp_path):
    work = tmp_path / "work"
    words = ("run", recipe, "--work", work, "--max-failed-shards", "2", "--json")
    succeeds(*words)
    file_of(work, "work/pool/*-canonicalize-*/images/shard-00001.parquet").unlink()
    recipe.write_text(recipe.read_text().replace("quality", "quality: {min_entropy: 0.1}"))
    found = json.loads(succeeds(*words))
    assert not any("shard_failed" in row["dropped"] for row in found["funnel"])
    assert "ok" in succeeds("verify", work)


class Dies(Silent):
    """Ends a run once a shard of a stage is finished."""

    def advanced(self, stage, receipt):
        if stage == "quality" and receipt.index == 2:
            raise KeyboardInterrupt


def test_run__a_receipt_whose_file_is_lost_does_not_count(recipe, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    checked = load_recipe(str(recipe), {"work": str(work)})
    with pytest.raises(KeyboardInterrupt):
        RecipeRun(checked, str(work), LocalEngine(), Dies()).run()
    file_of(work, "work/pool/*-quality-*/decisions/shard-00001.parquet").unlink()
    outputs, made = run(recipe, work)
    assert sorted(number for stage, number in made if stage == "quality") == [1, 3]
    assert outputs == run(recipe, tmp_path / "other")[0]


def test_verb__an_input_that_lost_a_file_says_which_and_what_to_do(recipe, tmp_path):
    rows, verdicts = tmp_path / "rows", tmp_path / "verdicts"
    ingest = ("canonicalize", tmp_path / "images", "--out", rows, "--set", "max_side=64")
    succeeds(*ingest)
    path = file_of(rows, "shard-*.parquet")
    before = path.read_bytes()
    path.unlink()
    words = ("filter", rows, "--out", verdicts, "--max-failed-shards", "3")
    line = fails(1, *words)
    assert f"{path}: gone or cut short; run the command that wrote {rows} again" in line
    succeeds(*ingest)
    assert path.read_bytes() == before
    succeeds(*words)
