"""Storage on a real S3 server: whole or nothing, ranges, and errors of one line."""

import gc
import os

import httpx
import numpy as np
import pyarrow as pa
import pytest
from object_store import become_owner, become_reader, served_bucket
from small_pictures import picture

from curation import storage
from curation.dataset import Dataset, open_foreign, write_dataset
from curation.errors import ConfigError, StorageError
from curation.pool import Pool
from curation.sources.shards import images_below
from curation.stage import StageFolder, StageInputs
from curation.stages.ingest import Ingest
from embedder.images import encode_jpeg
from pipelines.audit.work_folder import WorkFolder
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.recipe import load_recipe
from pipelines.run.runner import RecipeRun
from pipelines.run.stage_runner import Silent, run_stage
from pipelines.web.calibration.app import add_lab
from pipelines.web.calibration.lab import Lab
from pipelines.web.calibration.questions import Kind, draw
from pipelines.web.calibration.ratings import Ratings
from pipelines.web.serving.app import make_app
from pipelines.web.serving.catalog_file import catalog_of
from tests.curation.sources.test_tars import tar_of
from tests.pipelines.audited_run import finished_run
from tests.pipelines.commands import fails, succeeds
from tests.pipelines.served_run import serving

pytest.importorskip("moto")
pytest.importorskip("s3fs")

RECIPE = """
name: small
rows_per_shard: 4
pool:
  - ingest: {images: "ROOT/images"}
  - canonicalize
  - quality
  - exact_dedup
  - embed: {encoders: {copy: lite-copy}}
  - near_dedup: {embeddings: copy, max_component_share: 1.0}
  - select: {embeddings: copy}
  - pack
"""


@pytest.fixture(scope="module")
def bucket():
    with pytest.MonkeyPatch.context() as patch, served_bucket(patch) as url:
        yield url


def test_open_whole__what_failed_halfway_never_appears(bucket):
    with pytest.raises(KeyError), storage.open_whole(f"{bucket}/half/a") as file:
        file.write(b"x" * (6 << 20))
        raise KeyError
    gc.collect()
    assert storage.list_files(f"{bucket}/half") == []
    assert not storage.exists(f"{bucket}/half/a")


def test_exists__sees_what_another_process_wrote_a_moment_ago(bucket):
    import boto3

    assert not storage.exists(f"{bucket}/late/a")
    assert storage.list_files(f"{bucket}/late") == []
    boto3.client("s3").put_object(Bucket="bucket", Key="late/a", Body=b"1")
    assert storage.exists(f"{bucket}/late/a")
    assert storage.list_files(f"{bucket}/late") == ["a"]


def test_ingest__images_of_every_kind_lie_in_a_bucket(bucket, tmp_path):
    root, data = f"{bucket}/kinds", [encode_jpeg(picture(i)) for i in range(5)]
    storage.write_bytes(f"{root}/_1.JPG", data[0])
    storage.write_bytes(f"{root}/b/photo", data[1])
    storage.write_bytes(f"{root}/b/note", b"no image")
    storage.write_bytes(f"{root}/.hid/2.jpg", data[2])
    storage.write_bytes(f"{root}/out/_key.json", b"{}")
    storage.write_bytes(f"{root}/out/3.jpg", data[3])
    storage.write_bytes(f"{root}/0.TAR", tar_of(("a.jpg", data[2]), ("b.jpg", "a.jpg")))
    storage.write_parquet(f"{root}/t.parquet", pa.table({"image": data[3:]}))
    found = {image.name: image.load() for image in images_below(root)}
    stage = Ingest(images=f"{root}//")
    folder = StageFolder(f"{bucket}/kinds-out", "ingest")
    record, outputs = run_stage(
        stage, StageInputs(Pool("pool", {})), folder, LocalEngine(), Silent()
    )
    rows = outputs["raw"].read()
    assert dict(zip(rows["source"].to_pylist(), rows["raw"].to_pylist(), strict=True)) == found
    assert found == {
        "_1.JPG": data[0],
        "b/photo": data[1],
        "0.TAR/a.jpg": data[2],
        "0.TAR/b.jpg": data[2],
        "t.parquet#0": data[3],
        "t.parquet#1": data[4],
    }
    assert record.figures["left_out"] == {"hidden": 1, "own_output": 1, "no_suffix": 1}


def test_walk_files__folders_are_listed_side_by_side(bucket, tmp_path, monkeypatch):
    import boto3

    names = [f"{n % 40:02d}/{n % 3}/{n}.jpg" for n in range(120)] + ["top.txt", "07/deep.txt"]
    for root in (f"{bucket}/walk", str(tmp_path / "walk")):
        for name in names:
            storage.write_bytes(f"{root}/{name}", b"1")
        storage.write_bytes(f"{root}-not/other", b"1")
    for mark in ("walk/", "walk/07/", "walk/07/1/"):  # as consoles of object stores leave them
        boto3.client("s3").put_object(Bucket="bucket", Key=mark, Body=b"")
    side_by_side = []
    gather = storage.gather

    def counting(function, items, path):
        side_by_side.append(len(items))
        return gather(function, items, path)

    monkeypatch.setattr(storage, "gather", counting)
    assert storage.walk_files(f"{bucket}/walk") == sorted(names)
    assert side_by_side == [1, 40]
    assert storage.walk_files(str(tmp_path / "walk")) == sorted(names)
    for nothing in ("walk/top.txt", "none"):
        assert storage.walk_files(f"{bucket}/{nothing}") == []
        assert storage.walk_files(str(tmp_path / nothing)) == []


@pytest.fixture
def fetched(monkeypatch):
    """Bytes fetched from the server, one entry a request."""
    import s3fs

    sizes = []
    fetch = s3fs.core.S3File._fetch_range

    def counting(self, start, end):
        sizes.append(end - start)
        return fetch(self, start, end)

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counting)
    return sizes


def test_read_parquet__fetches_the_footer_and_the_columns_asked_for(bucket, fetched):
    rng = np.random.default_rng(0)
    table = pa.table({"id": rng.integers(0, 1 << 60, 100), "heavy": list(rng.bytes(400_000))[:100]})
    heavy = pa.array([rng.bytes(40_000) for _ in range(100)], pa.large_binary())
    path = f"{bucket}/t/shard.parquet"
    num_bytes, *_ = storage.write_parquet(path, table.set_column(1, "heavy", heavy))
    with storage.open_parquet(path) as file:
        assert file.metadata.num_rows == 100
    assert sum(fetched) < num_bytes / 20
    fetched.clear()
    assert storage.read_parquet(path, ["id"])["id"].equals(table["id"])
    assert sum(fetched) < num_bytes / 20


def test_open_foreign__reads_footers_only(bucket, fetched):
    tables = [
        pa.table({"id": [str(n)], "heavy": pa.array([os.urandom(300_000)], pa.large_binary())})
        for n in range(8)
    ]
    for number, table in enumerate(tables):
        storage.write_parquet(f"{bucket}/foreign/{number}.parquet", table)
    assert open_foreign(f"{bucket}/foreign").num_rows == 8
    assert sum(fetched) < 8 * 300_000 / 3


def test_errors__are_one_line_each(bucket):
    with pytest.raises(StorageError, match="s3://no-such-bucket/a: no such file or folder"):
        storage.write_bytes("s3://no-such-bucket/a", b"1")
    with pytest.raises(StorageError, match="nonsense"):
        storage.exists("nonsense://a/b")


def test_run_stages__on_an_object_store_they_make_what_they_make_on_a_disk(bucket, tmp_path):
    import boto3

    photos = [encode_jpeg(picture(n, 96), 90) for n in range(11)] + [b"broken"]
    (tmp_path / "images").mkdir()
    for number, data in enumerate(photos):
        boto3.client("s3").put_object(Bucket="bucket", Key=f"images/{number}.jpg", Body=data)
        (tmp_path / "images" / f"{number}.jpg").write_bytes(data)
    recipe = tmp_path / "r.yaml"
    digests = []
    for root in (f"{bucket}/", f"{tmp_path}/"):
        recipe.write_text(RECIPE.replace("ROOT/", root))
        work = f"{root}work"
        checked = load_recipe(str(recipe), {"work": work})
        for _ in range(2):  # the second time everything is found finished
            record = RecipeRun(checked, work, LocalEngine(), Silent()).run()
        digests.append(Dataset.open(f"{work}/{record.manifest}").manifest.content_digest)
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_serve_and_calibrate__a_run_in_a_bucket(bucket, tmp_path):
    """Rows, lives, pictures and answers, with the sorted lists in a local file."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(bucket)
    fs.put(str(finished_run()), f"{root}/run", recursive=True)
    work = WorkFolder(f"{bucket}/run")
    with pytest.raises(ConfigError, match="is no local folder: name a file for the catalog"):
        catalog_of(work.path)
    app = make_app(work.path, catalog_of(work.path, str(tmp_path / "catalog.duckdb")))
    catalog = app.state.site.catalog
    sample = draw(catalog, work, Kind.dedup, 2, 3, np.random.default_rng(0))
    answers = Ratings(f"{bucket}/answers.parquet")
    add_lab(app, Lab(work, catalog, sample, answers, 0))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        row = client.get("/api/images?stage=kept&flow=pool").json()["rows"][0]
        life = client.get(f"/images/pool/{row['id']}")
        assert "in the set" in life.text
        assert client.get(f"/pictures/pool/{row['id']}").content[:2] == b"\xff\xd8"
        assert client.get("/calibrate").status_code == 200
        assert client.post("/calibrate/0/yes").status_code == 303
    assert list(answers.read().values()) == [True]
    assert not storage.exists(f"{bucket}/run/_catalog.duckdb")


def test_write__a_bucket_without_write_permission_is_one_line_and_goes_on_with_it(
    bucket, monkeypatch, tmp_path
):
    (tmp_path / "1.jpg").write_bytes(encode_jpeg(picture(1, 64)))
    words = ("ingest", "--images", tmp_path, "--out", f"{bucket}/ingested")
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    table = pa.table({"id": ["a"]})
    write_dataset(f"{bucket}/readable", [table], table.schema)
    become_reader(monkeypatch, endpoint)
    assert storage.exists(f"{bucket}/readable/_manifest.json")
    with pytest.raises(StorageError, match=r"readable/new.parquet: .*Access ?Denied"):
        storage.write_parquet(f"{bucket}/readable/new.parquet", table)
    assert "Access Denied" in fails(1, *words)
    become_owner(monkeypatch, endpoint)
    succeeds(*words)
    assert storage.exists(f"{bucket}/ingested/_manifest.json")
