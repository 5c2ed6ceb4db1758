"""Filters that follow each other in a recipe decode each image once, and decide as if alone."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
from small_pictures import picture

from curation.image_filter import DECODED
from embedder.images import encode_jpeg, resize
from pipelines.audit.work_folder import WorkFolder
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.recipe import load_recipe
from pipelines.run.runner import RecipeRun
from pipelines.run.stage_runner import Silent

RECIPE = """
name: filtered
rows_per_shard: 6
pool:
  - ingest: {images: "IMAGES"}
  - canonicalize
  - quality: {min_side: 32, min_sharpness: 500.0}
  - nsfw: {threshold: 0.02}
  - faces
  - relevance
  - exact_dedup
  - relevance
  - select
"""
FILTERS = ("quality", "nsfw", "faces", "relevance")


def write_recipe(folder):
    """A recipe and 24 images: some blurred, some small, one broken."""
    (folder / "images").mkdir()
    for number in range(24):
        pixels = resize(picture(number), 320, 320, "box")
        if number % 5 == 0:
            pixels = resize(resize(pixels, 16, 16), 320, 320)
        side = 20 if number % 7 == 0 else 320
        (folder / "images" / f"{number}.jpg").write_bytes(encode_jpeg(resize(pixels, side, side)))
    (folder / "images" / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    (folder / "recipe.yaml").write_text(RECIPE.replace("IMAGES", str(folder / "images")))
    return folder / "recipe.yaml"


def run(recipe, work, engine) -> WorkFolder:
    checked = load_recipe(str(recipe), {"work": str(work)})
    RecipeRun(checked, str(work), engine, Silent()).run()
    return WorkFolder(str(work))


def run_apart(recipe, work) -> WorkFolder:
    """The same, but no filter knows of another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecipeRun, "_followers", lambda *_: ())
        return run(recipe, work, LocalEngine(0))


def contents(work: WorkFolder) -> list[dict[str, str]]:
    return [stage.entry.record.outputs for stage in work.stages("pool")]


def decoded(work: WorkFolder) -> dict[str, float]:
    counted = {}
    for stage in work.stages("pool"):
        counted.setdefault(stage.name, stage.entry.record.counters.get(DECODED, 0))
    return {name: counted[name] for name in FILTERS}


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apart")
    recipe = write_recipe(folder)
    return recipe, run_apart(recipe, folder / "work")


def engine_of(kind: str):
    if kind == "ray":
        pytest.importorskip("ray")
        from pipelines.engines.ray_engine import RayEngine

        return RayEngine(2)
    return LocalEngine(0 if kind == "inline" else 2)


@pytest.mark.parametrize("kind", ["inline", "local", "ray"])
def test_run__filters_in_a_row_decode_once_and_decide_as_if_alone(apart, kind, tmp_path):
    recipe, alone = apart
    found = run(recipe, tmp_path / "work", engine_of(kind))
    assert contents(found) == contents(alone)
    (dropped, *_) = [s.entry.record for s in found.stages("pool") if s.name == "quality"]
    assert {"too_small", "blurred"} <= set(dropped.dropped)
    looked_at = dropped.rows_in - dropped.dropped["too_small"]
    assert decoded(found) == {"quality": looked_at, "nsfw": 0, "faces": 0, "relevance": 0}
    assert decoded(alone)["quality"] == looked_at
    assert sum(decoded(alone).values()) > 2.5 * looked_at
    assert not list((tmp_path / "work" / "work" / "pool").glob("_scores*"))
    again = [s.entry.record.counters[DECODED] for s in found.stages("pool")[-2:-1]]
    assert again == [found.stages("pool")[-2].entry.record.rows_in]  # behind another stage: itself


class Stopped(Exception):  # noqa: N818
    """Stands for the end of the process."""


class StopsAt(Silent):
    """Ends the run when a stage has finished some shards."""

    def __init__(self, stage: str, shards: int) -> None:
        self.stage, self.left = stage, shards

    def advanced(self, stage, receipt):
        self.left -= stage == self.stage
        if self.left == 0:
            raise Stopped


@pytest.mark.parametrize("stage", FILTERS)
def test_run__stopped_in_a_row_of_filters_goes_on_with_what_was_measured(apart, stage, tmp_path):
    recipe, alone = apart
    work = tmp_path / "work"
    checked = load_recipe(str(recipe), {"work": str(work)})
    with pytest.raises(Stopped):
        RecipeRun(checked, str(work), LocalEngine(0), StopsAt(stage, 2)).run()
    assert list((work / "work" / "pool").glob("_scores*"))
    found = run(recipe, work, LocalEngine(0))
    assert contents(found) == contents(alone)
    assert decoded(found)["quality"] == decoded(alone)["quality"]
    assert sum(decoded(found).values()) == decoded(alone)["quality"]


def test_run__scores_that_are_gone_are_measured_again(apart, tmp_path):
    recipe, alone = apart
    work = tmp_path / "work"
    checked = load_recipe(str(recipe), {"work": str(work)})
    with pytest.raises(Stopped):
        RecipeRun(checked, str(work), LocalEngine(0), StopsAt("nsfw", 1)).run()
    shutil.rmtree(work / "work" / "pool" / "_scores")
    found = run(recipe, work, LocalEngine(0))
    assert contents(found) == contents(alone)
    counted = decoded(found)
    assert counted["nsfw"] > counted["faces"] > 0  # those of the shard that nsfw had finished
    assert counted["relevance"] == 0


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_run__killed_and_restarted_decides_the_same(apart, kind, tmp_path):
    recipe, alone = apart
    work = tmp_path / "work"
    words = (sys.executable, "-m", "pipelines.cli", "run", recipe, "--work", work)
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while driver.poll() is None and not list(work.glob("work/pool/03-quality-*/_receipts/*.json")):
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    found = run(recipe, work, engine_of(kind))
    assert contents(found) == contents(alone)
    assert sum(decoded(found).values()) == decoded(alone)["quality"]
