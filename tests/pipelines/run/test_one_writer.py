"""Two who want to write in one folder, as users meet them: the second is refused in one line."""

import http.server
import json
import subprocess
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from small_pictures import picture

from curation.lock import locked
from embedder.images import encode_jpeg
from tests.pipelines.commands import CURATE, fails, succeeds

RECIPE = """
name: two
rows_per_shard: 10
pool:
  - ingest: {urls: "URLS"}
  - download: {allow_private: true, threads: 1, per_host: 1, robots: false}
  - canonicalize
  - exact_dedup
  - select
"""
NUM_URLS = 80
HITS_BEFORE_GATE = 40
"""After so many the server waits until its gate opens: nothing here depends on time."""


@pytest.fixture
def site():
    """URL of a server, how often each path was asked for, and its gate."""
    hits, gate = Counter(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            hits[self.path] += 1
            if sum(hits.values()) > HITS_BEFORE_GATE:
                gate.wait()
            body = encode_jpeg(picture(int(self.path[1:-4]), 48))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", hits, gate
    gate.set()
    server.shutdown()
    server.server_close()


@contextmanager
def started(*words):
    """A verb at work; it is killed if it has not ended."""
    command = [*CURATE, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(folder: Path, pattern: str):
    while not list(folder.glob(pattern)):
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [1, 2])
def test_run__a_second_one_is_refused_and_a_killed_one_is_taken_over(workers, site, tmp_path):
    address, hits, gate = site
    urls, recipe, work = tmp_path / "urls.txt", tmp_path / "r.yaml", tmp_path / "work"
    urls.write_text("".join(f"{address}/{n}.jpg\n" for n in range(NUM_URLS)))
    recipe.write_text(RECIPE.replace("URLS", str(urls)))
    words = ("run", recipe, "--work", work, "--json", "--workers", workers)
    with started(*words) as process:
        wait_for(work, "work/pool/*-download-*/_receipts/*.json")
        line = fails(1, *words)
        assert f"{work}: is in use by process {process.pid} on" in line
        assert "in use by" in fails(1, "report", work)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate(timeout=10)
        assert not psutil.wait_procs(children, timeout=10)[1]
        gate.set()
        assert sum(hits.values()) < NUM_URLS
    assert json.loads(succeeds(*words))["funnel"][0]["rows_in"] == NUM_URLS
    assert set(Counter(hits.values())) <= {1, 2}
    assert sum(hits.values()) <= NUM_URLS + 10 * workers  # the shards that were at work
    assert "ok" in succeeds("verify", work)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(encode_jpeg(picture(number, 64)))
    return folder


def test_verbs__what_writes_in_a_folder_in_use_is_refused(photos, tmp_path):
    recipe, work, out = tmp_path / "r.yaml", tmp_path / "work", tmp_path / "out"
    text = 'name: x\npool:\n  - ingest: {images: "IMAGES"}\n  - canonicalize\n  - select\n'
    recipe.write_text(text.replace("IMAGES", str(photos)))
    succeeds("run", recipe, "--work", work)
    with locked(str(work)):
        for words in (
            ("run", recipe, "--work", work),
            ("clean", work),
            ("forget", work, "--urls", recipe),
            ("report", work),
        ):
            assert f"{work}: is in use by process" in fails(1, *words)
    with locked(str(out)):
        for words in (
            ("ingest", "--images", photos, "--out", out),
            ("canonicalize", photos, "--out", out),
            ("pretrain", "tiny", "--data", photos, "--out", out),
        ):
            assert f"{out}: is in use by process" in fails(1, *words)
    succeeds("clean", work)
    assert not list(tmp_path.rglob("_lock"))
