import io
import subprocess
import sys
from pathlib import Path

import duckdb
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from starlette.testclient import TestClient

from curation.errors import ConfigError, StorageError
from pipelines.audit.stats import stats_of
from pipelines.web.serving import catalog as catalog_module
from pipelines.web.serving.app import listening, make_app, names_of
from pipelines.web.serving.catalog import Catalog, Filter
from pipelines.web.serving.catalog_file import catalog_of, key_of
from tests.pipelines.audited_run import HOSTILE, copied_run, finished_run
from tests.pipelines.served_run import catalog_with_marks, served

HTML = {"accept": "text/html"}


@pytest.fixture(scope="module")
def catalog():
    with Catalog(catalog_with_marks()[0]) as opened:
        yield opened


@pytest.fixture(scope="module")
def site():
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def client(site):
    with httpx.Client(base_url=site.url) as opened:
        yield opened


def all_rows(catalog, wanted, limit=4):
    """Every row of a filter, page by page."""
    rows, after = [], -1
    while after is not None:
        page = catalog.page(wanted, after, limit)
        assert len(page.rows) <= limit
        rows += page.rows
        after = page.after
    return rows


def test_catalog__counts_what_the_funnel_counts(catalog):
    facts = stats_of(str(finished_run()))
    found = {row["value"]: row["rows"] for row in catalog.values("reason")}
    for row in facts["reasons"]:
        if row["flow"] == "pool":
            assert found[row["reason"]] == row["rows"], row
    kept = len(all_rows(catalog, Filter({"flow": "pool", "stage": "kept"})))
    joined = len(all_rows(catalog, Filter({"flow": "taken", "stage": "kept"})))
    assert kept + joined == facts["rows_out"]


FILTERS = [
    Filter(),
    Filter({"flow": "pool"}),
    Filter({"reason": "near_duplicate"}),
    Filter({"stage": "nothing"}),
    Filter({"host": "a'; drop table images"}),
    Filter(score="quality.sharpness", order="lowest"),
    Filter(score="quality.sharpness", order="highest"),
    Filter(score="quality.sharpness", low=300.0, high=900.0),
    Filter(score="quality.sharpness", low=900.0, high=300.0),
    Filter(score="near_dedup.similarity", low=0.9, order="highest"),
    Filter({"flow": "pool", "stage": "kept"}),
    Filter({"flow": "pool", "source_set": "web"}, score="quality.aspect", order="highest"),
    Filter({"flow": "pool"}, score="quality.sharpness", low=300.0, high=9000.0),
]


@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_page__pages_together_are_what_plain_sql_finds(catalog, wanted):
    rows = all_rows(catalog, wanted)
    terms = [f"{name} = ?" for name in wanted.texts]
    values = list(wanted.texts.values())
    if wanted.score:
        terms.append(f'"{wanted.score}" is not null')
        for sign, bound in ((">=", wanted.low), ("<=", wanted.high)):
            if bound is not None:
                terms.append(f'"{wanted.score}" {sign} ?')
                values.append(bound)
    where = f"where {' and '.join(terms)}" if terms else ""
    expected = catalog.rows(f"select flow, id from images {where} order by rowid", values)
    found = [(row["flow"], row["id"]) for row in rows]
    assert sorted(found) == sorted((row["flow"], row["id"]) for row in expected)
    if wanted.score:
        scores = [row["scores"][wanted.score] for row in rows]
        assert scores == sorted(scores, reverse=wanted.order == "highest")
    else:
        assert found == [(row["flow"], row["id"]) for row in expected]


def test_page__total_is_the_number_of_rows(catalog):
    for wanted in FILTERS:
        total = catalog.page(wanted, -1, 1).total
        assert total is None or total == len(all_rows(catalog, wanted))


def test_page__unknown_score_and_order_without_one(catalog):
    with pytest.raises(ConfigError, match=r"no score 'x'; there are: quality\.short_side"):
        catalog.page(Filter(score="x"))
    with pytest.raises(ConfigError, match="order 'highest' needs a score"):
        catalog.page(Filter(order="highest"))


def test_components__members_are_the_size_that_verdicts_say(catalog):
    groups = catalog.components().rows
    assert groups
    for group in groups:
        members = all_rows(catalog, Filter({"component": group["component"]}))
        assert {row["component_size"] for row in members} == {group["rows"]} == {len(members)}


def test_seeds__hits_are_those_of_the_run(catalog):
    seeds = catalog.seeds("seeds").rows
    assert sum(seed["rows"] for seed in seeds) == 18
    hits = catalog.hits(seeds[0], -1, 4)
    rest = catalog.hits(seeds[0], hits.after, 4)
    assert [row["rank"] for row in hits.rows + rest.rows] == [1, 2, 3, 4, 5, 6]
    assert rest.after is None


def test_catalog__no_query_reads_files_or_writes(catalog, tmp_path):
    (tmp_path / "x.csv").write_text("a\n1\n")
    for query in (
        f"select * from '{tmp_path}/x.csv'",
        "create table x as select 1",
        "set threads=8",
    ):
        with pytest.raises(Exception, match=r"(?i)disabled|read-only|locked"):
            catalog.rows(query)


def test_catalog__query_that_takes_too_long_is_stopped(catalog, monkeypatch):
    monkeypatch.setattr(catalog_module, "_PATIENCE_S", 0.2)
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 s"):
        catalog.rows("select sum(hash(a.range + b.range)) from range(1000000) a, range(100000) b")


def test_catalog_of__is_made_once_and_again_when_the_run_changed(tmp_path):
    work = copied_run(tmp_path)
    file = Path(catalog_of(str(work)))
    made = file.stat().st_mtime_ns
    assert catalog_of(str(work)) == str(file)
    assert file.stat().st_mtime_ns == made
    stale = key_of(str(work))
    with duckdb.connect(str(file)) as connection:
        connection.execute("update facts set json = replace(json, ?, 'old')", [stale])
    catalog_of(str(work))
    with Catalog(str(file)) as again:
        assert again.facts["key"] == stale


def test_catalog_of__file_that_is_no_catalog(tmp_path):
    (tmp_path / "x.duckdb").write_text("rubbish")
    with pytest.raises(ConfigError, match=r"x\.duckdb: is no catalog"):
        catalog_of(str(finished_run()), str(tmp_path / "x.duckdb"))


def test_catalog_of__object_store_needs_a_file():
    with pytest.raises(ConfigError, match="name a file for the catalog"):
        catalog_of("s3://bucket/run")


def test_catalog__plain_data_set(tmp_path):
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "id": [f"{n:032x}" for n in range(1000)],
            "source": [f"https://h{n % 7}.org/{n}" for n in range(1000)],
            "width": rng.integers(1, 900, 1000),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with Catalog(catalog_of(str(tmp_path), str(tmp_path / "c.duckdb"))) as opened:
        assert opened.page(Filter({"host": "h3.org"})).total == 143
        page = opened.page(Filter(score="data.width", low=800, order="highest"))
        assert page.rows[0]["scores"]["data.width"] == table["width"].to_numpy().max()


PAGES = [
    "/",
    "/images",
    "/images?view=table",
    "/components",
    "/leaks",
    "/retrieval",
    "/retrieval/0",
]


@pytest.mark.parametrize("path", PAGES)
def test_pages__show_foreign_text_as_text_under_a_strict_policy(client, path):
    answer = client.get(path, headers=HTML)
    assert answer.status_code == 200
    assert "<img src=x" not in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "<script>" not in answer.text
    assert " style=" not in answer.text


def test_images__hostile_name_is_there_and_escaped(client):
    found = client.get("/api/images", params={"limit": 200}).json()["rows"]
    row = next(one for one in found if one["source"] == HOSTILE)
    for path in ("/images?limit=200", f"/images/pool/{row['id']}"):
        text = client.get(path, headers=HTML).text
        assert "&lt;img src=x onerror=alert(1)&gt;" in text
        assert "<img src=x" not in text


def test_life__tells_every_verdict(client):
    row = client.get("/api/images", params={"reason": "leak:bench"}).json()["rows"][0]
    life = client.get(f"/api/images/pool/{row['id']}").json()
    assert life["fate"] == "dropped by leaks: leak:bench"
    assert [one["stage"] for one in life["verdicts"]][-1] == "leaks"
    page = client.get(f"/images/pool/{row['id']}", headers=HTML).text
    assert "in bench" in page or "most similar" in page


def test_pictures__every_shown_image_is_a_jpeg(client):
    rows = client.get("/api/images", params={"limit": 200}).json()["rows"]
    with_picture = 0
    for row in rows:
        answer = client.get(f"/pictures/{row['flow']}/{row['id']}")
        if answer.status_code == 200:
            with_picture += 1
            assert Image.open(io.BytesIO(answer.content)).format == "JPEG"
    assert with_picture >= 35


def test_pictures__veiled_is_blots_until_revealed_and_hidden_never(client, site):
    veiled = client.get(f"/pictures/pool/{site.veiled}")
    clear = client.get(f"/pictures/pool/{site.veiled}", params={"reveal": True})
    assert max(Image.open(io.BytesIO(veiled.content)).size) <= 8
    assert max(Image.open(io.BytesIO(clear.content)).size) == 96
    for query in ({}, {"reveal": True}, {"size": "full", "reveal": True}):
        assert client.get(f"/pictures/pool/{site.hidden}", params=query).status_code == 404
    page = client.get("/images?limit=200", headers=HTML).text
    assert f"/pictures/pool/{site.hidden}" not in page


BAD = [
    "/api/images?limit=0",
    "/api/images?limit=201",
    "/api/images?after=-2",
    "/api/images?after=99999999999999999999",
    "/api/images?low=nan&score=quality.aspect",
    "/api/images?order=sideways",
    "/api/images?color=red",
    "/api/images?score=aspect",
    "/api/images/pool/xyz",
    "/api/images/..%2f..%2fetc/00000000000000000000000000000000",
    "/pictures/pool/00000000000000000000000000000000?size=huge",
    "/static/app.py",
    "/static/..%2fapp.py",
]


@pytest.mark.parametrize("path", BAD)
def test_parameters__are_refused_in_one_line(client, path):
    answer = client.get(path)
    assert answer.status_code in (404, 422)
    assert answer.json().keys() == {"detail"}
    assert "\n" not in answer.json()["detail"]


def test_problem__is_a_page_for_people(client):
    answer = client.get("/images/pool/00000000000000000000000000000000", headers=HTML)
    assert answer.status_code == 404
    assert "has no image" in answer.text
    assert "Back to the overview" in answer.text


def test_hosts__a_foreign_name_is_refused(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400


def test_methods__nothing_can_be_written(client):
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert client.request(method, "/api/images").status_code == 405


def test_listening__taken_port():
    with listening("127.0.0.1", 0) as one, pytest.raises(ConfigError, match="choose another"):
        listening("127.0.0.1", one.getsockname()[1])


def test_command__serves_until_interrupted(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pipelines.cli.app",
        "serve",
        str(finished_run()),
        "--port",
        "0",
    ]
    code = "from pipelines.cli.app import main; main()"
    command[1:3] = ["-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        url = line.split()[1]
        assert httpx.get(url + "/api/images?limit=1").json()["total"] == 40
        process.terminate()


def test_catalog_of__a_folder_that_takes_no_files(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StorageError, match="name another file for the catalog, --catalog FILE"):
        catalog_of(str(finished_run()), f"{file}/catalog.duckdb")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_names_of__beyond_this_machine_a_name_is_wanted(host):
    with pytest.raises(ConfigError, match="--allow-host NAME"):
        names_of(host)
    assert names_of(host, ["Audit.example.org"]) == (
        *(host, "127.0.0.1", "localhost"),
        "audit.example.org",
    )


def test_names_of__loopback_and_what_is_no_name():
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert names_of(host)[0] == host
    for name in ("*", "a b", "*.example.org", ""):
        with pytest.raises(ConfigError, match="want the name or address of one host"):
            names_of("0.0.0.0", [name])


def test_make_app__other_names_are_refused(tmp_path):
    file = catalog_of(str(finished_run()), str(tmp_path / "catalog"))
    app = make_app(str(finished_run()), file, names_of("0.0.0.0", ["audit.example.org"]))
    with TestClient(app) as client:
        for name, status in (("audit.example.org:8750", 200), ("evil.example.org", 400)):
            assert client.get("/static/style.css", headers={"Host": name}).status_code == status
