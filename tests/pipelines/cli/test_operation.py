"""Runs as who operates them meets them: events, status, disk budget, clean, a disk that fills."""

import json
import os
import subprocess
import time
from dataclasses import dataclass

import numpy as np
import pytest
from small_pictures import picture

from curation.errors import ConfigError, StorageError
from curation.stage import Task
from embedder.images import encode_jpeg
from pipelines.engines.local_engine import LocalEngine
from pipelines.engines.metered_engine import MeteredEngine, Usage
from pipelines.operate.disk_budget import DiskBudget, parse_bytes
from pipelines.operate.events import EventLog, read_events
from pipelines.operate.status import status_of
from tests.pipelines.commands import fails, succeeds

RECIPE = """
name: small
rows_per_shard: 4
pool:
  - ingest: {images: "IMAGES"}
  - canonicalize: {max_side: 256}
  - quality
  - select
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(16):
        data = encode_jpeg(picture(number, 512), 100)
        (tmp_path / "images" / f"{number}.jpg").write_bytes(data)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("IMAGES", str(tmp_path / "images")))
    return path


@dataclass(frozen=True)
class Works(Task[int, None, int]):
    """Computes, sleeps, and holds memory."""

    def open(self):
        time.sleep(0.05)

    def __call__(self, item, opened):
        time.sleep(0.1)
        return len(np.ones(item << 17))  # item MiB


@pytest.mark.parametrize("workers", [1, 2])
def test_metered_engine__says_what_items_took(workers):
    heard, usage = [], Usage()
    engine = MeteredEngine(LocalEngine(workers), lambda *words: heard.append(words))
    assert dict(engine.map(Works(), [1, 300], "works")) == {1: 1 << 17, 300: 300 << 17}
    for _, _, one in heard:
        usage.add(one)
    assert (usage.items, usage.retries) == (2, 0)
    assert usage.open_s >= 0.05
    assert usage.item_s >= 0.2
    assert 0.15 < usage.wait_s <= usage.item_s
    assert usage.peak_bytes > 300 << 20
    assert [words[:2] for words in heard] == [("works", 2)] * 2


def test_run__its_events_tell_what_status_shows(recipe, tmp_path):
    work = tmp_path / "work"
    embed = "  - embed: {encoders: {copy: lite-copy}}\n  - select"
    recipe.write_text(recipe.read_text().replace("  - select", embed))
    succeeds("run", recipe, "--work", work)
    status = json.loads(succeeds("status", work, "--json"))
    assert status["state"] == "finished"
    shares = {one["stage"]: one.get("device_busy_share") for one in status["stages"]}
    assert list(shares) == ["ingest", "canonicalize", "quality", "embed", "select"]
    assert 0.05 < shares.pop("embed") <= 1
    assert not any(shares.values())
    canonical = status["stages"][1]
    assert canonical["rows_in"] == 16
    assert canonical["bytes_per_s"] > 0
    assert 0 < canonical["busy_share"] <= 1.05
    assert "finished" in succeeds("status", work)
    assert "no run has left events" in fails(1, "status", tmp_path)


def test_status__of_a_run_at_work_tells_its_stage_and_the_time_left(tmp_path):
    log = EventLog(str(tmp_path))
    log.write("run_started", recipe="x", planned={})
    log.write("stage_started", stage="embed", total=10, done=2)
    for shard in range(2, 6):
        log.write("shard", stage="embed", shard=shard, rows_in=5, rows_out=5, bytes=1)
    began = read_events(str(tmp_path))[1].time
    status = status_of(str(tmp_path), began + 8)
    assert (status.state, status.done, status.total) == ("running", 6, 10)
    assert status.left_s == pytest.approx(8, abs=0.1)  # four shards in 8 s, four to go
    assert status_of(str(tmp_path), began + 4000).state == "silent"


def test_status__with_a_plan_scales_what_is_ahead_by_the_pace_so_far(tmp_path):
    log = EventLog(str(tmp_path))
    log.write("run_started", recipe="x", planned={"a": 10.0, "b": 30.0})
    log.write("stage_started", stage="a", total=1, done=0)
    log.write("stage_finished", stage="a", seconds=20.0)
    log.write("stage_started", stage="b", total=1, done=0)
    began = read_events(str(tmp_path))[-1].time
    assert status_of(str(tmp_path), began + 5).left_s == pytest.approx(55, abs=0.1)


def test_run__stops_within_its_disk_budget_and_goes_on_with_a_larger_one(recipe, tmp_path):
    work = tmp_path / "work"
    words = ("run", recipe, "--work", work)
    line = fails(1, *words, "--max-disk", "5kB")
    assert "more than --max-disk" in line
    assert json.loads(succeeds("status", work, "--json"))["state"] == "failed"
    assert json.loads(succeeds(*words, "--max-disk", "1GB", "--json"))["worked"]
    assert "--max-disk 5x" in fails(2, *words, "--max-disk", "5x")


def test_disk_budget__larger_than_the_free_space_is_refused(tmp_path):
    with pytest.raises(StorageError, match="less than --max-disk"):
        DiskBudget(str(tmp_path), 1 << 60)
    assert parse_bytes("1.5TB") == 1_500_000_000_000
    with pytest.raises(ConfigError, match="above 0"):
        parse_bytes("0")


def test_clean__removes_what_a_finished_run_does_not_name(recipe, tmp_path):
    work = tmp_path / "work"
    words = ("run", recipe, "--work", work)
    succeeds(*words)
    recipe.write_text(recipe.read_text().replace("  - quality\n", ""))
    succeeds(*words)
    stages = {path.name.rpartition("-")[0] for path in (work / "work" / "pool").iterdir()}
    assert "03-quality" in stages
    would = json.loads(succeeds("clean", work, "--dry-run", "--json"))
    assert json.loads(succeeds("clean", work, "--json")) == would
    assert len(would) == 2  # quality, and the select after it
    assert not any((work / name).exists() for name in would)
    assert "ok" in succeeds("verify", work)
    assert not json.loads(succeeds(*words, "--json"))["worked"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_run__a_disk_that_fills_is_one_line_and_the_run_goes_on_afterward(recipe, small_disk):
    work = small_disk / "work"
    words = ("run", recipe, "--work", work)
    assert "no space left on the device" in fails(1, *words)
    grow = ["mount", "-o", "remount,size=100M", str(small_disk)]
    subprocess.run(grow, check=True)
    assert json.loads(succeeds(*words, "--json"))["worked"]
    assert "ok" in succeeds("verify", work)
    assert not list(small_disk.rglob("*.partial"))
