"""The whole job on real photos: served, downloaded, curated, packed, trained on and measured."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.dataset import Dataset
from pipelines.audit.funnel import adds_up, funnel
from pipelines.run.run_record import open_manifest, read_run

PORT = 18731
CURATE = [sys.executable, "-c", "from pipelines.cli.app import main; main()"]
CURATION_ONLY = ("pretrain=null", "evaluate=null")


def command(work: Path, *options: str, changes: tuple[str, ...] = ()) -> list[str]:
    sets = [part for change in (f"demo_site.port={PORT}", *changes) for part in ("--set", change)]
    return [*CURATE, "run", "demo", "--work", str(work), "--json", *sets, *options]


def run(work: Path, *options: str, changes: tuple[str, ...] = ()) -> dict:
    done = subprocess.run(
        command(work, *options, changes=changes), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, dict]:
    work = tmp_path_factory.mktemp("demo")
    return work, run(work)


def test_demo__every_stage_accounts_for_every_row(demo):
    work, summary = demo
    record = read_run(str(work))
    rows = funnel(record)
    assert adds_up(rows)
    assert rows[0].rows_in == pq.read_metadata(work / "site" / "urls.parquet").num_rows
    for before, after in zip(rows, rows[1:], strict=False):
        assert after.rows_in == before.rows_out
    manifest = open_manifest(str(work))
    assert manifest.num_rows == rows[-1].rows_out == summary["funnel"][-1]["rows_out"] > 0
    ids = manifest.read(["id"])["id"].to_pylist()
    assert len(set(ids)) == len(ids)


def test_demo__verify_finds_all_as_it_was_written(demo):
    done = subprocess.run(
        [*CURATE, "verify", str(demo[0])], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert not list(demo[0].rglob("_lock"))


def test_demo__planted_troubles_are_caught_and_innocents_are_spared(demo):
    marks = demo[1]["marks"]
    harder = marks.pop("edited copy, harder")
    innocent = marks.pop("innocent")
    assert innocent["caught"] <= 0.01 * innocent["planted"], innocent["missed"]
    for kind, tally in marks.items():
        assert tally["caught"] == tally["planted"] > 0, (kind, tally["missed"])
    assert harder["caught"] >= 0.7 * harder["planted"]


def test_demo__no_image_is_lost_between_manifest_and_packed_shards(demo):
    work, summary = demo
    packed = Dataset.open(summary["packed"])
    manifest = open_manifest(str(work)).read()
    assert sorted(packed.read()["id"].to_pylist()) == sorted(manifest["id"].to_pylist())
    row = packed.read_shard(0).slice(0, 1).to_pylist()[0]
    tar = Path(packed.path) / "shard-00000.tar"
    data = tar.read_bytes()[row["offset"] : row["offset"] + row["num_bytes"]]
    assert data[:2] == b"\xff\xd8"
    assert data[-2:] == b"\xff\xd9"


def test_demo__leaves_report_checkpoint_and_knn(demo):
    work, summary = demo
    page = (work / "report.html").read_text()
    assert "near_dedup" in page
    assert Path(summary["pretrain"]["backbone"]).stat().st_size > 0
    assert summary["pretrain"]["finished"] is True
    assert 0 <= summary["evaluate"]["knn_10"] <= 1


def test_demo__faces_are_found_and_blurred_in_what_is_packed(demo):
    work, _ = demo
    entry = next(entry for entry in read_run(str(work)).pool if entry.stage == "faces")
    boxes = Dataset.open(str(work / entry.folder / "faces")).read()["boxes"].to_pylist()
    assert any(boxes)


def test_demo__run_again_does_no_work_and_says_so(demo):
    work, first = demo
    before = {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.is_file()}
    again = run(work)
    after = {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.is_file()}
    assert again["worked"] is False
    assert again["content_digest"] == first["content_digest"]
    assert after == before


def test_demo__ray_gives_the_same_content(demo, tmp_path):
    options = ("--engine", "ray", "--workers", "2")
    summary = run(tmp_path, *options, changes=CURATION_ONLY)
    assert summary["content_digest"] == demo[1]["content_digest"]


NO_WAY_OUT = """
import socket, sys

def allowed(host):
    return host in (None, "localhost") or str(host).startswith(("127.", "::1"))

def guard(real, host_of):
    def guarded(*words, **more):
        if not allowed(host_of(*words)):
            sys.stderr.write(f"LEFT {words}\\n")
            raise OSError("no way out")
        return real(*words, **more)
    return guarded

socket.socket.connect = guard(
    socket.socket.connect,
    lambda self, address: None if self.family == socket.AF_UNIX else address[0],
)
socket.getaddrinfo = guard(socket.getaddrinfo, lambda host, *rest: host)
from pipelines.cli.app import main
main()
"""


def test_demo__other_shards_give_the_same_content_and_nothing_leaves_loopback(demo, tmp_path):
    """Guarantees 3 and 5: with every socket to the outside refused, no library asks for one."""
    words = command(tmp_path, changes=(*CURATION_ONLY, "rows_per_shard=150"))[len(CURATE) :]
    done = subprocess.run(
        [sys.executable, "-c", NO_WAY_OUT, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "LEFT" not in done.stderr
    assert json.loads(done.stdout)["content_digest"] == demo[1]["content_digest"]


def test_demo__killed_three_times_gives_the_same_content(demo, tmp_path):
    for stage in ("download", "embed", "retrieve"):
        kill_during(tmp_path, stage)
        assert not (tmp_path / "run.json").exists()
        assert not (tmp_path / "manifest").exists()
    summary = run(tmp_path, changes=CURATION_ONLY)
    assert summary["content_digest"] == demo[1]["content_digest"]
    assert not list(tmp_path.rglob("*.partial"))


def kill_during(work: Path, stage: str) -> None:
    """SIGKILL a run, with all its processes, as soon as a stage of the pool has begun."""
    process = subprocess.Popen(
        command(work, changes=CURATION_ONLY),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not list(work.glob(f"work/pool/*-{stage}-*/_key.json")):
        assert process.poll() is None, f"the run ended before {stage}"
        time.sleep(0.01)
    time.sleep(0.05)  # into the stage; the last ones take a few tenths of a second
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
