import shutil
import socket
import ssl
import subprocess
import time
import urllib.request

import pyarrow as pa
import pytest
from hostile_server import HostileServer, jpeg, serving
from raw_server import answer
from raw_server import serving as answering

from curation.config import parse_settings
from curation.dataset import write_dataset
from curation.errors import ConfigError
from curation.fetching.addresses import is_public
from curation.fetching.client import Client
from curation.fetching.resolver import Resolver
from curation.pool import Pool
from curation.schema import make_id, schema_of
from curation.stage import Shard, StageFolder, StageInputs
from curation.stages.canonicalize import Canonicalize
from curation.stages.download import Download
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage

QUICK = {
    "allow_private": True,
    "back_off_s": 0.05,
    "connect_timeout_s": 1.0,
    "read_timeout_s": 1.0,
    "total_timeout_s": 2.0,
    "retries": 1,
}

BEHAVIORS = {
    "/ok/1.jpg": None,
    "/moved": None,
    "/gzipped": None,
    "/chunked": None,
    "/disallowed/but/allowed.jpg": None,
    "/busy-then-ok": None,
    "/slow-down-then-ok": None,
    "/noai-for-others": None,
    "/cut.jpg": None,  # only a full decode can tell
    "/nowhere": "http_404",
    "/gone": "http_410",
    "/odd-status": "http_4xx",
    "/always-busy": "http_503",
    "/hang-before": "timeout",
    "/hang-in-body": "timeout",
    "/drip-body": "timeout",
    "/drip-head": "timeout",
    "/endless-continue": "timeout",
    "/large": "too_large",
    "/large-announced": "too_large",
    "/endless-chunks": "too_large",
    "/gzip-bomb": "too_large",
    "/false-length": "truncated",
    "/broken-chunks": "truncated",
    "/redirect-loop": "too_many_redirects",
    "/to-file": "bad_scheme",
    "/to-nonsense": "bad_url",
    "/not-gzip": "bad_encoding",
    "/brotli": "truncated",
    "/bomb.png": "too_many_pixels",
    "/page.jpg": "not_an_image",
    "/empty": "empty",
    "/noai": "opted_out:noai",
    "/tdm": "opted_out:tdm",
    "/disallowed/1.jpg": "opted_out:robots",
    "/close": "connection",
    "/garbage": "bad_response",
    "/header-flood": "bad_response",
    "/long-line": "bad_response",
}


def shard_of(urls: list[str | None]) -> Shard:
    ids = [make_id(f"{i} {url}") for i, url in enumerate(urls)]
    return Shard(pa.table({"id": ids, "source": pa.array(urls, pa.string())}), 0)


def downloaded(stage: Download, *urls: str | None, client: Client | None = None) -> Shard:
    shard = shard_of(list(urls))
    opened = client or stage.open()
    try:
        stage.process(shard, opened)
    finally:
        opened.close()
    return shard


def test_download__each_behavior_has_its_reason_within_its_deadline(hostile_server):
    stage = Download(**QUICK)
    began = time.monotonic()
    urls = [hostile_server.url + path for path in BEHAVIORS]
    shard = downloaded(stage, *urls)
    seconds = time.monotonic() - began
    assert dict(zip(BEHAVIORS, shard.reasons, strict=True)) == BEHAVIORS
    assert seconds < 12  # two attempts of 2 s, one after the other, and some room
    fetches = shard.emitted["fetches"]
    by_path = dict(zip(BEHAVIORS, zip(*fetches.values(), strict=True), strict=True))
    columns = list(fetches)
    busy = dict(zip(columns, by_path["/busy-then-ok"], strict=True))
    assert (busy["status"], busy["attempts"], busy["http_status"]) == ("arrived", 2, 200)
    moved = dict(zip(columns, by_path["/moved"], strict=True))
    assert moved["final_url"] == hostile_server.url + "/ok/7.jpg"
    assert moved["content_type"] == "image/jpeg"
    assert dict(zip(columns, by_path["/noai"], strict=True))["status"] == "opted_out"
    # Once, and again where the others have made its connection doubtful.
    assert dict(zip(columns, by_path["/nowhere"], strict=True))["attempts"] <= 2
    assert shard.emitted["raw"]["raw"][0].as_py() == jpeg(1)
    assert hostile_server.hits["/robots.txt"] == 1


def guarded_client(stage: Download, names: dict[str, list[str]]) -> Client:
    """A client for which the test server alone is public."""

    def lookup(host: str) -> list[str]:
        return names.get(host, [host])

    def public(address: str) -> bool:
        return address == "127.0.0.1" or is_public(address)

    resolver = Resolver(allow_private=False, lookup=lookup, is_public=public)
    return Client(stage.policy, resolver)


def test_download__private_addresses_are_refused_on_every_hop(hostile_server):
    stage = Download(**{**QUICK, "allow_private": False}, user_agent="testbot/1.0")
    port = hostile_server.server_port
    names = {"inside.test": ["127.0.0.2", "::1"], "mixed.test": ["10.0.0.1", "127.0.0.1"]}
    urls = {
        f"{hostile_server.url}/ok/1.jpg": None,
        f"http://mixed.test:{port}/ok/1.jpg": None,
        f"http://inside.test:{port}/ok/1.jpg": "private_address",
        f"http://127.0.0.2:{port}/ok/1.jpg": "private_address",
        "http://10.1.2.3/": "private_address",
        f"http://[::1]:{port}/ok/1.jpg": "private_address",
        f"http://[::ffff:127.0.0.2]:{port}/": "private_address",
        f"{hostile_server.url}/to-private": "private_address",
        f"{hostile_server.url}/to-loopback-name": "private_address",
        "file:///etc/passwd": "bad_scheme",
        "ftp://127.0.0.1/x.jpg": "bad_scheme",
        "no url": "bad_url",
        "http://": "bad_url",
        "http://user:secret@127.0.0.1/": "bad_url",
        "": "bad_url",
    }
    shard = downloaded(stage, *urls, client=guarded_client(stage, names))
    assert dict(zip(urls, shard.reasons, strict=True)) == urls


def test_download__the_checked_address_is_the_one_connected_to(hostile_server):
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])  # a rebinding server's second answer
    stage = Download(**{**QUICK, "allow_private": False}, user_agent="testbot/1.0", robots=False)
    resolver = Resolver(
        allow_private=False,
        lookup=lambda _: next(answers),
        is_public=lambda address: address == "127.0.0.1",
    )
    url = f"http://rebind.test:{hostile_server.server_port}/ok/1.jpg"
    shard = downloaded(stage, url, client=Client(stage.policy, resolver))
    assert shard.reasons.tolist() == [None]


def test_download__same_url_twice_and_null(hostile_server):
    url = f"{hostile_server.url}/ok/2.jpg"
    shard = downloaded(Download(**QUICK), url, url, None)
    assert shard.reasons.tolist() == [None, None, "bad_url"]


def test_download__answers_that_come_twice_go_to_no_other_url():
    seen = []

    def twice(connection: socket.socket, path: str) -> bool:
        """Each answer comes again after a while, when the next request may have been sent."""
        seen.append(path)
        body = jpeg(int(path.rpartition("/")[2]))
        connection.sendall(answer(body))
        time.sleep(0.03)
        connection.sendall(answer(body))
        return True

    with answering(twice) as address:
        stage = Download(**QUICK, robots=False, per_host=1, threads=1)
        shard = downloaded(stage, *(f"{address}/{number}" for number in range(20)))
    assert shard.reasons.tolist() == [None] * 20
    assert shard.emitted["raw"]["raw"].to_pylist() == [jpeg(number) for number in range(20)]
    assert len(seen) > 20  # some were asked for again


def test_download__puts_the_global_opener_back(hostile_server, monkeypatch):
    before = urllib.request.build_opener()
    monkeypatch.setattr(urllib.request, "_opener", before)
    downloaded(Download(**QUICK), f"{hostile_server.url}/ok/2.jpg")
    assert urllib.request._opener is before


def test_download__a_public_crawl_names_its_crawler(hostile_server):
    with pytest.raises(ConfigError, match="user_agent is missing"):
        parse_settings(Download, {}, "download")
    downloaded(Download(**QUICK, user_agent="testbot/2.0"), f"{hostile_server.url}/ok/3.jpg")
    assert "testbot/2.0" in hostile_server.agents


def test_download__without_a_user_agent_only_private_addresses(hostile_server):
    shard = downloaded(Download(**QUICK), "http://8.8.8.8/x.jpg", f"{hostile_server.url}/ok/1.jpg")
    assert shard.reasons.tolist() == ["public_address", None]


@pytest.mark.parametrize(
    ("status", "expected"),
    [(404, None), (403, None), (503, "robots_unreachable"), (200, "opted_out:robots")],
)
def test_download__robots_txt_that_is_missing_or_down(status, expected):
    with serving(HostileServer()) as server:
        server.robots = status
        shard = downloaded(Download(**QUICK), f"{server.url}/disallowed/1.jpg")
        ignoring = downloaded(Download(**QUICK, robots=False), f"{server.url}/disallowed/1.jpg")
    assert shard.reasons.tolist() == [expected]
    assert ignoring.reasons.tolist() == [None]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_download__certificates_are_verified(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(key), "-out", str(certificate), "-subj", "/CN=test"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with serving(HostileServer(tls)) as server:
        url = server.url.replace("http:", "https:") + "/ok/1.jpg"
        refused = downloaded(Download(**QUICK), url)
        trusted = downloaded(Download(**QUICK, ca_file=str(certificate)), url)
    assert refused.reasons.tolist() == ["tls"]
    assert trusted.reasons.tolist() == [None]


def test_download__runs_on_into_canonicalize(hostile_server: HostileServer, tmp_path):
    schema = schema_of(["id", "source"])
    names = [f"/ok/{i}.jpg" for i in range(8)] + ["/cut.jpg", "/nowhere", "/noai", "/bomb.png"]
    urls = [hostile_server.url + name for name in names]
    tables = [
        pa.table([[make_id(url) for url in part], part], schema=schema)
        for part in (urls[:5], urls[5:], [])
    ]
    pool = Pool.of(write_dataset(str(tmp_path / "urls"), tables, schema))
    engine = LocalEngine()
    for name, stage in (("download", Download(**QUICK)), ("canonicalize", Canonicalize())):
        folder = StageFolder(str(tmp_path / name), name)
        record, outputs = run_stage(stage, StageInputs(pool), folder, engine, Silent())
        assert record.rows_in == record.rows_out + sum(record.dropped.values())
        fetches = outputs.pop("fetches", None)
        assert fetches is None or fetches.num_rows == len(urls)
        pool = pool.with_stage(outputs, outputs.pop("decisions"))
    assert pool.num_rows == 8


def test_download__a_host_is_spared_by_all_workers_together(hostile_server, tmp_path):
    urls = [f"{hostile_server.url}/slow/{i}.jpg" for i in range(36)]
    schema = schema_of(["id", "source"])
    parts = [urls[i::3] for i in range(3)]
    tables = [pa.table([[make_id(url) for url in part], part], schema=schema) for part in parts]
    pool = Pool.of(write_dataset(str(tmp_path / "urls"), tables, schema))
    stage = Download(**{**QUICK, "total_timeout_s": 20.0}, per_host=2)
    folder = StageFolder(str(tmp_path / "out"), "download")
    record, _ = run_stage(stage, StageInputs(pool), folder, LocalEngine(3), Silent())
    assert record.rows_out == 36
    assert 1 <= hostile_server.most_at_once <= 2
