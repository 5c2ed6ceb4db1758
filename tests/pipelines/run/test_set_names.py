"""Whose row is it: folders, sets and verdicts that meet through the single verbs."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_pictures import image_row, picture
from typer.testing import CliRunner

from curation.dataset import Dataset, write_dataset
from curation.errors import ConfigError, DatasetError, SchemaError, SpaceError
from curation.identity import file_source
from curation.schema import IMAGE_COLUMNS, embedding_schema, make_id, schema_of
from embedder.images import encode_jpeg
from pipelines.audit.verify import verify
from pipelines.cli.app import app


def curate(*words):
    """Run a verb in this process; its errors are raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def photos(folder, numbers):
    """Photos of equal names, whatever they show."""
    folder.mkdir(parents=True)
    for place, number in enumerate(numbers):
        (folder / f"{place}.jpg").write_bytes(encode_jpeg(picture(number)))
    return folder


def sources(path):
    return sorted(Dataset.open(str(path)).read(["source"])["source"].to_pylist())


def ids(path):
    return Dataset.open(str(path)).read(["id"])["id"].to_pylist()


def defects(path):
    return [defect for one in verify(str(path)) for defect in one.defects]


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """val/tench, val/church and train/tench, four photos each, and their images."""
    root = tmp_path_factory.mktemp("data")
    for split, name, first in (("val", "tench", 0), ("val", "church", 10), ("train", "tench", 20)):
        folder = photos(root / split / name, range(first, first + 4))
        curate("canonicalize", folder, "--out", root / f"{split}-{name}")
    return root


def decisions_on(path, folder, drop=(), reason="nsfw", **attributes):
    """Decisions on all rows of a data set of images that drop some of its sources."""
    dataset = Dataset.open(str(path))
    schema = pa.schema([("id", pa.string()), ("keep", pa.bool_()), ("reason", pa.string())])
    tables = []
    for shard in range(dataset.num_shards):
        rows = dataset.read_shard(shard, ["id", "source"])
        keep = [source not in drop for source in rows["source"].to_pylist()]
        reasons = [None if stays else reason for stays in keep]
        tables.append(pa.table({"id": rows["id"], "keep": keep, "reason": reasons}))
    write_dataset(str(folder), tables, schema, attributes)
    return folder


def test_canonicalize__ids_hold_the_folder(classes, tmp_path):
    one, other = ids(classes / "val-tench"), ids(classes / "val-church")
    assert sorted(one) == sorted(make_id(file_source("tench", f"{n}.jpg")) for n in range(4))
    assert not set(one) & set(other)
    curate(
        "select",
        f"a={classes / 'val-tench'}",
        f"b={classes / 'val-church'}",
        *("--out", tmp_path / "m"),
    )
    assert len(set(ids(tmp_path / "m"))) == 8
    assert Dataset.open(str(tmp_path / "m")).num_rows == 8
    assert defects(tmp_path / "m") == []


@pytest.mark.parametrize("how", ["/", "//", "/.", "/../tench"])
def test_canonicalize__ids_are_those_of_the_folder_however_it_is_written(classes, tmp_path, how):
    curate("canonicalize", f"{classes / 'val' / 'tench'}{how}", "--out", tmp_path / "out")
    assert ids(tmp_path / "out") == ids(classes / "val-tench")


def test_canonicalize__a_link_is_the_folder_that_it_leads_to(classes, tmp_path):
    (tmp_path / "link").symlink_to(classes / "val" / "tench")
    curate("canonicalize", tmp_path / "link", "--out", tmp_path / "out")
    assert ids(tmp_path / "out") == ids(classes / "val-tench")


@pytest.mark.parametrize("option", ["--set-name", "--source-set"])
def test_canonicalize__the_set_can_be_named(classes, tmp_path, option):
    words = ("canonicalize", classes / "val" / "tench", option, "fish")
    curate(*words, "--out", tmp_path / "out")
    dataset = Dataset.open(str(tmp_path / "out"))
    assert set(dataset.read()["source_set"].to_pylist()) == {"fish"}
    assert make_id("fish/0.jpg") in ids(tmp_path / "out")
    with pytest.raises(ConfigError, match="'a/b' cannot name a set"):
        curate("canonicalize", classes / "val" / "tench", option, "a/b", "--out", tmp_path / "x")


def test_select__equal_ids_of_different_images_are_refused(classes, tmp_path):
    words = ("select", f"a={classes / 'val-tench'}", f"b={classes / 'train-tench'}")
    said = r"val-tench and .*train-tench: both hold id [0-9a-f]{32} \([0-3].jpg\).*--set-name"
    with pytest.raises(DatasetError, match=said):
        curate(*words, "--out", tmp_path / "m")
    assert not Dataset.is_finished(str(tmp_path / "m"))
    named = ("canonicalize", classes / "train" / "tench", "--set-name", "train-tench")
    curate(*named, "--out", tmp_path / "renamed")
    curate("select", words[1], f"b={tmp_path / 'renamed'}", "--out", tmp_path / "m2")
    assert len(set(ids(tmp_path / "m2"))) == 8


def test_select__the_same_images_again_are_duplicates(classes, tmp_path):
    words = (f"a={classes / 'val-tench'}", f"b={classes / 'val-tench'}")
    curate("select", *words, "--out", tmp_path / "m")
    assert sources(tmp_path / "m") == [f"{n}.jpg" for n in range(4)]
    verdicts = Dataset.open(str(tmp_path / "m" / "_decisions")).read().to_pylist()
    assert [row["twin"] for row in verdicts if not row["keep"]] == [
        row["id"] for row in verdicts if not row["keep"]
    ]


def image_set(folder, rows):
    schema = schema_of(IMAGE_COLUMNS)
    rows = sorted(rows, key=lambda row: row["id"])
    write_dataset(str(folder), [pa.Table.from_pylist(rows, schema)], schema)
    return folder


def test_select__a_url_that_changed_is_one_row(tmp_path):
    urls = [f"http://a.example/{n}.jpg" for n in range(3)]
    one = image_set(tmp_path / "one", [image_row(n, urls[n]) for n in range(3)])
    other = image_set(tmp_path / "two", [image_row(n + 9, urls[n]) for n in range(3)])
    curate("select", f"a={one}", f"b={other}", "--out", tmp_path / "m")
    manifest = Dataset.open(str(tmp_path / "m")).read().to_pylist()
    assert sorted(row["sha256"] for row in manifest) == [f"{n:064x}" for n in range(3)]
    record = Dataset.open(str(tmp_path / "m" / "_decisions")).read(["reason"])["reason"]
    assert record.to_pylist().count("duplicate_in_union") == 3


def test_pack__an_id_twice_in_one_set_is_refused_and_verify_names_it(tmp_path):
    rows = [image_row(n) for n in range(3)]
    twice = image_set(tmp_path / "twice", [*rows, image_row(7, "1.jpg")])
    with pytest.raises(DatasetError, match=r"twice: id [0-9a-f]+ \(1.jpg\) occurs twice"):
        curate("pack", twice, "--out", tmp_path / "p")
    assert defects(twice) == [f"id {make_id('1.jpg')} stands there 2 times"]


def test_pack__verdicts_on_other_images_are_refused(classes, tmp_path):
    curate("filter", classes / "val-tench", "--filters", "quality", "--out", tmp_path / "v")
    curate("pack", classes / "val-tench", "--keep", tmp_path / "v", "--out", tmp_path / "p")
    assert Dataset.open(str(tmp_path / "p")).num_rows == 4
    for other in ("val-church", "train-tench"):  # other ids; the same ids of other images
        words = ("pack", classes / other, "--keep", tmp_path / "v")
        with pytest.raises(SchemaError, match=f"v: is about other rows than .*{other}"):
            curate(*words, "--out", tmp_path / "x")


def test_pack__verdicts_of_a_folder_hold_for_its_images_made_otherwise(classes, tmp_path):
    folder = classes / "val" / "tench"
    curate("filter", folder, "--filters", "quality", "--out", tmp_path / "v")
    curate("canonicalize", folder, "--set", "max_side=32", "--out", tmp_path / "small")
    curate("pack", tmp_path / "small", "--keep", tmp_path / "v", "--out", tmp_path / "p")
    assert Dataset.open(str(tmp_path / "p")).num_rows == 4


def test_pack__verdicts_that_say_not_what_they_are_about_are_held_against_ids(classes, tmp_path):
    verdicts = decisions_on(classes / "val-church", tmp_path / "v")
    with pytest.raises(SchemaError, match=r"v: keeps [0-9a-f]{32}, which is none of .*val-tench"):
        curate("pack", classes / "val-tench", "--keep", verdicts, "--out", tmp_path / "x")
    with pytest.raises(SchemaError, match="val-church: no column 'keep'"):
        words = ("pack", classes / "val-tench", "--keep", classes / "val-church")
        curate(*words, "--out", tmp_path / "x")


def test_pack__every_verdict_must_keep(classes, tmp_path):
    images = classes / "val-tench"
    one = decisions_on(images, tmp_path / "nsfw", drop=["0.jpg"])
    other = decisions_on(images, tmp_path / "dup", drop=["2.jpg"], reason="near_duplicate")
    for number, keep in enumerate([(one, other), (other, one)]):
        out = tmp_path / f"p{number}"
        words = [word for path in keep for word in ("--keep", path)]
        said = curate("pack", images, *words, "--out", out)
        assert "dropped: nsfw" in said
        kept = {make_id("tench/1.jpg"), make_id("tench/3.jpg")}
        assert set(ids(out)) == kept
        judged = Dataset.open(str(out / "_keep-pool")).read().to_pylist()
        assert {row["reason"] for row in judged} == {None, "nsfw", "near_duplicate"}


def test_pack__an_image_without_a_verdict_is_counted(classes, tmp_path):
    images = classes / "val-tench"
    dataset = Dataset.open(str(images))
    table = dataset.read_shard(0, ["id"]).slice(1)
    verdicts = table.append_column("keep", pa.array([True] * 3))
    write_dataset(str(tmp_path / "v"), [verdicts], verdicts.schema)
    said = curate("pack", images, "--keep", tmp_path / "v", "--out", tmp_path / "p")
    assert "dropped: no_verdict" in said
    assert Dataset.open(str(tmp_path / "p")).num_rows == 3


def test_select__every_verdict_of_a_name_must_keep(classes, tmp_path):
    images = classes / "val-tench"
    one = decisions_on(images, tmp_path / "one", drop=["0.jpg"])
    other = decisions_on(images, tmp_path / "two", drop=["2.jpg"])
    keep = ("--keep", f"a={one}", "--keep", f"a={other}")
    words = ("select", f"a={images}", f"b={classes / 'val-church'}")
    curate(*words, *keep, "--out", tmp_path / "m")
    manifest = Dataset.open(str(tmp_path / "m")).read(["source", "source_set"]).to_pylist()
    assert [row["source"] for row in manifest if row["source_set"] == "tench"] != []
    assert {row["source"] for row in manifest if row["source_set"] == "tench"} == {"1.jpg", "3.jpg"}
    assert len(manifest) == 6


def embeddings(folder, directions, names, **attributes):
    """Embeddings of ours, one direction a name."""
    rows = np.eye(8)[list(directions)].astype(np.float16)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), 8)
    table = pa.table({"id": [make_id(n) for n in names], "source": names, "embedding": flat})
    known = {"space": "s", "thresholds": {"dedup": 0.6, "leak": 0.5}, **attributes}
    table = table.sort_by("id")
    write_dataset(str(folder), [table], embedding_schema(8), known)
    return folder


@pytest.mark.parametrize("verb", ["dedup", "retrieve"])
def test_neighbors__equal_ids_of_different_images_are_refused(tmp_path, verb):
    pool = embeddings(tmp_path / "train", [0, 1, 2], ["0.jpg", "1.jpg", "2.jpg"])
    same = embeddings(tmp_path / "same", [0, 1, 3], ["0.jpg", "1.jpg", "3.jpg"])
    other = embeddings(tmp_path / "val", [0, 4, 3], ["0.jpg", "1.jpg", "3.jpg"])

    def words(path):
        if verb == "dedup":
            return ("dedup", pool, "--against", f"v={path}", "--max-component-share", 1)
        return ("retrieve", pool, "--seeds", f"v={path}:sample:1")

    curate(*words(same), "--out", tmp_path / "a")
    with pytest.raises(DatasetError, match=r"train and .*val: both hold id \w+ \(1.jpg\)"):
        curate(*words(other), "--out", tmp_path / "b")


def test_neighbors__a_url_in_pool_and_seeds_may_have_changed(tmp_path):
    names = ["http://a.example/0.jpg", "http://a.example/1.jpg"]
    pool = embeddings(tmp_path / "pool", [0, 1], names)
    seeds = embeddings(tmp_path / "seeds", [0, 5], names)
    curate("retrieve", pool, "--seeds", f"s={seeds}:sample:1", "--out", tmp_path / "h")


def test_neighbors__ids_of_foreign_files_are_each_files_own(tmp_path):
    for number, name in enumerate(("pool", "val")):
        rows = np.random.default_rng(number).normal(size=(5, 8)).astype(np.float32)
        table = pa.table({"id": [str(n) for n in range(5)], "embedding": list(rows)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    words = ("dedup", tmp_path / "pool.parquet", "--against", f"v={tmp_path / 'val.parquet'}")
    limits = ("--threshold", 0.99, "--against-threshold", 0.99, "--assume-same-space")
    curate(*words, *limits, "--out", tmp_path / "d")
    assert Dataset.open(str(tmp_path / "d")).num_rows == 5


def test_dedup__its_verdicts_know_the_images_of_the_embeddings(classes, tmp_path):
    curate("embed", classes / "val-tench", "--encoder", "lite-copy", "--out", tmp_path / "e")
    curate("dedup", tmp_path / "e", "--max-component-share", 1, "--out", tmp_path / "d")
    curate("pack", classes / "val-tench", "--keep", tmp_path / "d", "--out", tmp_path / "p")
    with pytest.raises(SchemaError, match="d: is about other rows than"):
        curate("pack", classes / "train-tench", "--keep", tmp_path / "d", "--out", tmp_path / "x")


def test_pack__burns_in_the_faces_that_its_verdicts_found(classes, tmp_path):
    images = classes / "val-tench"
    verdicts = decisions_on(images, tmp_path / "v")
    dataset = Dataset.open(str(images))
    schema = schema_of(["id", "boxes"])
    boxes = [[[8, 8, 40, 40]]] * 4
    faces = pa.table([dataset.read_shard(0, ["id"])["id"], pa.array(boxes, schema[1].type)], schema)
    curate("pack", images, "--keep", verdicts, "--out", tmp_path / "plain")
    write_dataset(str(verdicts / "_faces"), [faces], schema)
    curate("pack", images, "--keep", verdicts, "--out", tmp_path / "blurred")
    plain, blurred = (tmp_path / name / "shard-00000.tar" for name in ("plain", "blurred"))
    assert plain.read_bytes() != blurred.read_bytes()


def test_select__takes_the_hits_of_verdicts_into_the_manifest(classes, tmp_path):
    images = classes / "val-tench"
    curate("embed", images, "--encoder", "lite-copy", "--out", tmp_path / "e")
    curate(
        "retrieve",
        tmp_path / "e",
        "--seeds",
        f"s={tmp_path / 'e'}:sample:1",
        "--out",
        tmp_path / "h",
    )
    curate(
        "select",
        f"a={images}",
        "--keep",
        f"a={tmp_path / 'h' / '_decisions'}",
        "--out",
        tmp_path / "m",
    )
    assert set(Dataset.open(str(tmp_path / "m")).read()["seed_set"].to_pylist()) == {"s"}


@pytest.mark.parametrize(
    ("verb", "more"), [("canonicalize", ()), ("filter", ("--filters", "quality")), ("pack", ())]
)
def test_ingest__its_output_goes_into_every_verb_that_takes_images(classes, tmp_path, verb, more):
    curate("ingest", "--images", classes / "val" / "tench", "--out", tmp_path / "rows")
    curate(verb, tmp_path / "rows", *more, "--out", tmp_path / "out")
    assert set(ids(tmp_path / "out")) == set(ids(classes / "val-tench"))
    with pytest.raises(SchemaError, match="holds images, not URLs"):
        curate("download", tmp_path / "rows", "--allow-private", "--out", tmp_path / "x")


def test_pack__packed_shards_are_images_too(classes, tmp_path):
    curate("pack", classes / "val-tench", "--out", tmp_path / "packed")
    curate("canonicalize", tmp_path / "packed", "--out", tmp_path / "again")
    rows = Dataset.open(str(tmp_path / "again")).read().to_pylist()
    known = Dataset.open(str(classes / "val-tench")).read().to_pylist()
    assert {row["source"] for row in rows} == {row["id"] for row in known}
    assert {row["pixel_hash"] for row in rows} == {row["pixel_hash"] for row in known}


def test_verbs__a_data_set_without_images_is_one_line(classes, tmp_path):
    verdicts = decisions_on(classes / "val-tench", tmp_path / "v")
    for verb in ("canonicalize", "pack"):
        with pytest.raises(SchemaError, match="v: holds no images as they were fetched"):
            curate(verb, verdicts, "--out", tmp_path / "x")


def test_download__retries_only_the_rows_that_it_is_about(tmp_path):
    for name, url in (("one", "http://a.invalid/1.jpg"), ("two", "http://a.invalid/2.jpg")):
        (tmp_path / f"{name}.txt").write_text(url)
        curate("ingest", "--urls", tmp_path / f"{name}.txt", "--out", tmp_path / name)
        shutil.rmtree(tmp_path / name / "_receipts")
    decisions_on(tmp_path / "one", tmp_path / "raw" / "_decisions", about="another digest")
    words = ("download", tmp_path / "two", "--allow-private", "--retry-failed", tmp_path / "raw")
    with pytest.raises(SchemaError, match="is about other rows than"):
        curate(*words, "--out", tmp_path / "x")


def test_retrieve__centroids_of_another_space_are_refused(tmp_path):
    names = [f"{n}.jpg" for n in range(8)]
    pool = embeddings(tmp_path / "pool", range(8), names)
    other = embeddings(tmp_path / "other", range(8), names, space="t")
    curate("cluster", other, "--levels", "4", "--out", tmp_path / "c")
    words = ("--seeds", f"s={pool}:cluster:5:1:50", "--clusters", tmp_path / "c")
    with pytest.raises(SpaceError, match=r"centroids of embedding space t, but .*pool has s"):
        curate("retrieve", pool, *words, "--out", tmp_path / "h")
