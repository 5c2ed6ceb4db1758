import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_server import HostileServer

from curation.dataset import Dataset, write_dataset
from curation.schema import make_id, schema_of

JOB = Path(__file__).with_name("download_job.py")
QUICK = {
    "allow_private": True,
    "retries": 0,
    "total_timeout_s": 20.0,
    "per_host": 16,
    "threads": 16,
}


def write_urls(folder: Path, urls: list[str], rows_per_shard: int) -> Path:
    schema = schema_of(["id", "source"])
    parts = [urls[i : i + rows_per_shard] for i in range(0, len(urls), rows_per_shard)]
    tables = [pa.table([[make_id(url) for url in part], part], schema=schema) for part in parts]
    write_dataset(str(folder), tables, schema)
    return folder


def start(urls: Path, out: Path, **settings: object) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    arguments = [sys.executable, str(JOB), str(urls), str(out), json.dumps({**QUICK, **settings})]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)


def finish(job: subprocess.Popen[str]) -> dict:
    text, _ = job.communicate(timeout=3000)
    assert job.returncode == 0
    return json.loads(text)


def kill_after(job: subprocess.Popen[str], out: Path, receipts: int, rng: random.Random) -> None:
    """Kill a job a random moment after it has committed some shards."""
    folder = out / "download" / "_receipts"
    while job.poll() is None and len(list(folder.glob("*.json"))) < receipts:
        time.sleep(0.01)
    time.sleep(rng.random() * 0.2)
    job.kill()
    job.communicate()
    assert job.returncode == -9


def killed_like_calm(
    server: HostileServer, folder: Path, rows: int, shard: int, kills: int
) -> None:
    """Half of the rows fail; a run killed again and again ends like one that never was."""
    names = [f"/ok/{i % 50}.jpg?{i}" if i % 2 else f"/nowhere/{i}" for i in range(rows)]
    urls = write_urls(folder / "urls", [server.url + name for name in names], shard)
    calm = finish(start(urls, folder / "calm"))
    assert calm["digests"]["download dropped"] == {"http_404": rows // 2}
    rng = random.Random(0)
    num_shards = -(-rows // shard)
    for kill in range(1, kills + 1):
        job = start(urls, folder / "killed")
        kill_after(job, folder / "killed", kill * num_shards // (kills + 2), rng)
        for path in (folder / "killed").rglob("shard-*.parquet"):
            pq.ParquetFile(path).close()  # whatever has its final name is whole
    assert finish(start(urls, folder / "killed"))["digests"] == calm["digests"]
    decisions = Dataset.open(str(folder / "killed" / "download" / "decisions")).read(["id"])
    assert len(set(decisions["id"].to_pylist())) == decisions.num_rows == rows


def test_download__killed_and_rerun_equals_never_killed(hostile_server, tmp_path):
    killed_like_calm(hostile_server, tmp_path, rows=5000, shard=250, kills=3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_download__killed_five_times_at_full_length(hostile_server, tmp_path):
    killed_like_calm(hostile_server, tmp_path, rows=200_000, shard=2000, kills=5)


def test_download__hostile_bodies_do_not_fill_the_memory(hostile_server, tmp_path):
    names = ("/bomb.png", "/large", "/gzip-bomb", "/endless-chunks", "/header-flood", "/ok/1.jpg")
    urls = [f"{hostile_server.url}{name}?{i}" for i in range(4) for name in names]
    report = finish(start(write_urls(tmp_path / "urls", urls, 100), tmp_path / "out"))
    assert report["digests"]["download dropped"] == {
        "bad_response": 4,
        "too_large": 12,
        "too_many_pixels": 4,
    }
    assert report["peak"] - report["before"] < 500e6
