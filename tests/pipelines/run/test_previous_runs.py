"""Deliveries one after the other, with real photos: what an earlier run has is not taken again."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from curation import storage
from curation.dataset import Dataset, write_dataset
from curation.errors import ConfigError, DatasetError
from curation.identity import file_source
from curation.schema import embedding_schema, make_id
from embedder.images import Limits, canonicalize, decode, encode_jpeg, resize
from pipelines.audit.explain import explain
from pipelines.audit.verify import verify
from pipelines.audit.work_folder import WorkFolder
from pipelines.cli.app import app
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.previous_runs import PreviousRuns
from pipelines.run.recipe import load_recipe
from pipelines.run.run_record import open_manifest, read_run
from pipelines.run.runner import RecipeRun
from pipelines.run.stage_runner import Silent
from pipelines.run.whole_run import run_recipe
from pipelines.web.report.page import write_page

RECIPE = """
name: deliveries
rows_per_shard: 16
sets:
  bench: {images: "${root}/bench"}
  taken: {images: "${root}/taken"}
pool:
  - ingest: {images: "${work}/images"}
  - canonicalize
  - exact_dedup
  - embed: {encoders: {copy: lite-copy}}
  - near_dedup: {embeddings: copy, max_component_share: 0.5}
  - leaks: {embeddings: copy, against: [bench]}
  - select: {as_is: [taken], embeddings: copy}
"""


def edited(file, side=160):
    """A smaller copy of a photo, as another site would show it."""
    pixels = decode(canonicalize(file.read_bytes(), 512, 95, Limits()).data)
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    return encode_jpeg(resize(pixels, round(width * scale), round(height * scale)), 70)


def deliver(root, name, files):
    """Put the images of one delivery into its work folder."""
    folder = root / name / "images"
    folder.mkdir(parents=True)
    for path, data in files.items():
        (folder / path).write_bytes(data)


def run(root, name, base=None, engine=None):
    variables = {"work": str(root / name), "root": str(root)}
    checked = load_recipe(str(root / "recipe.yaml"), variables)
    earlier = PreviousRuns.open(str(root / base)) if base else None
    work = RecipeRun(checked, str(root / name), engine or LocalEngine(), Silent(), earlier)
    return work.run(), work.published


def dropped(record, stage):
    return next(entry.record.dropped for entry in record.pool if entry.stage == stage)


def id_of(name):
    return make_id(file_source("web", name))


@pytest.fixture(scope="module")
def three(shared_data, tmp_path_factory):
    """Three deliveries, each compared with those before it."""
    root = tmp_path_factory.mktemp("deliveries")
    photos = sorted((shared_data / "imagenette-96").rglob("*.*"))
    photos = [file for file in photos if file.suffix.lower() in (".jpg", ".jpeg")][:40]
    data = [file.read_bytes() for file in photos]
    for name, some in (("bench", photos[36:38]), ("taken", photos[33:36])):
        (root / name).mkdir()
        for file in some:
            shutil.copy(file, root / name / file.name)
    (root / "recipe.yaml").write_text(RECIPE)
    first = {f"{n:02d}.jpg": data[n] for n in range(16)}
    deliver(root, "1", first)
    second = {f"{n:02d}.jpg": data[n] for n in range(12, 28)}  # 12 to 15 once more
    second |= {"same.jpg": data[3], "small.jpg": edited(photos[5])}
    second |= {"leak.jpg": edited(photos[36]), "taken.jpg": edited(photos[33])}
    deliver(root, "2", second)
    third = {f"{n:02d}.jpg": data[n] for n in range(26, 32)}
    third |= {"again.jpg": data[4], "new-small.jpg": edited(photos[20])}
    deliver(root, "3", third)
    records = [run(root, "1")[0], run(root, "2", "1")[0], run(root, "3", "2")[0]]
    return root, records


def test_run_base__no_image_is_twice_in_the_union_of_the_manifests(three):
    root, records = three
    rows = [row for n in "123" for row in open_manifest(str(root / n)).read().to_pylist()]
    for column in ("id", "sha256", "pixel_hash"):
        values = [row[column] for row in rows]
        assert len(values) == len(set(values))
    vectors = {}
    for n in "123":
        work = WorkFolder(str(root / n))
        for flow in ("taken", "pool"):
            table = work.making(flow, "copy").output("copy").read(["id", "embedding"])
            pairs = zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True)
            vectors |= {one: np.array(row, np.float64) for one, row in pairs}
    kept = np.stack([vectors[row["id"]] for row in rows])
    scores = kept @ kept.T
    np.fill_diagonal(scores, -1)
    dedup = next(entry.record for entry in records[0].pool if entry.stage == "near_dedup")
    assert scores.max() <= dedup.figures["threshold"]
    assert {row["source_set"] for row in rows[len(rows) // 2 :]} == {"web"}


def test_run_base__every_stage_says_what_was_there_before(three):
    _, records = three
    assert dropped(records[1], "ingest") == {"in_base": 4}
    assert dropped(records[1], "exact_dedup") == {"duplicate_bytes": 1}
    assert dropped(records[1], "near_dedup")["near_duplicate"] == 1
    assert dropped(records[1], "leaks") == {"leak:bench": 1}
    assert dropped(records[1], "select") == {"in_base": 4}  # three as they were, and a copy of one
    # the third knows the second, and through it the first
    assert dropped(records[2], "ingest") == {"in_base": 2}
    assert dropped(records[2], "exact_dedup") == {"duplicate_bytes": 1}
    assert dropped(records[2], "near_dedup") == {"near_duplicate": 1}


def test_run_base__is_recorded_and_nothing_is_done_twice(three):
    root, records = three
    assert records[1].base == str(root / "1")
    assert records[1].base_digest == PreviousRuns.open(str(root / "1")).digest
    again, published = run(root, "2", "1")
    assert (again, published) == (records[1], False)
    keys = {entry.stage: entry.record.key for entry in records[1].pool}
    alone, _ = run(root, "2")
    changed = {entry.stage for entry in alone.pool if entry.record.key != keys[entry.stage]}
    assert {"ingest", "exact_dedup", "near_dedup", "select"} <= changed
    assert dropped(alone, "ingest") == {}
    assert run(root, "2", "1")[0].manifest == "manifest"


def test_run_base__explain_and_report_find_what_lies_in_the_base(three, tmp_path):
    root, _ = three
    life = explain(id_of("small.jpg"), str(root / "2"))[0]
    assert life["fate"] == "dropped by near_dedup: near_duplicate"
    verdict = life["verdicts"][-1]
    assert (verdict["twin"], verdict["twin_set"]) == (id_of("05.jpg"), "base")
    assert life["sources"][id_of("05.jpg")] == "05.jpg"
    assert explain(id_of("13.jpg"), str(root / "2"))[0]["fate"] == "dropped by ingest: in_base"
    copy = explain(id_of("again.jpg"), str(root / "3"))[0]
    assert copy["sources"][copy["verdicts"][-1]["twin"]] == "04.jpg"
    page = tmp_path / "report.html"
    write_page(str(root / "2"), str(page))
    assert "05.jpg" in page.read_text()
    for one in verify(str(root / "2")):
        assert not [defect for defect in one.defects if "seal" not in one.where]


def test_run_base__a_killed_run_goes_on(three, monkeypatch):
    root, _ = three
    expected = open_manifest(str(root / "3")).manifest.content_digest
    shutil.copytree(root / "3" / "images", root / "4" / "images")
    monkeypatch.setattr("curation.stages.near_dedup.decide_shards", _killed)
    with pytest.raises(KeyboardInterrupt):
        run(root, "4", "2")
    monkeypatch.undo()
    run(root, "4", "2", LocalEngine(2))
    assert open_manifest(str(root / "4")).manifest.content_digest == expected


def _killed(*args, **kwargs):
    raise KeyboardInterrupt


def test_run_base__what_cannot_be_a_base(three, tmp_path):
    root, _ = three
    with pytest.raises(DatasetError, match=r"no finished run there"):
        PreviousRuns.open(str(tmp_path))
    recipe = str(root / "recipe.yaml")
    first, second, change = str(root / "1"), str(root / "2"), f"paths.root={root}"
    with pytest.raises(ConfigError, match="is --work itself, or rests on it"):
        run_recipe(recipe, first, LocalEngine(), changes=[change], base=second, quiet=True)
    other = read_run(str(root / "1"))
    kept = tuple(entry for entry in other.pool if entry.stage != "exact_dedup")
    shutil.copytree(root / "1", tmp_path / "other")
    values = other.replace(pool=[entry.model_dump() for entry in kept]).model_dump(mode="json")
    storage.write_json(str(tmp_path / "other" / "run.json"), values)
    with pytest.raises(ConfigError, match="has no stage 'exact_dedup' to compare with"):
        run(root, "3", str(tmp_path / "other"))


def vectors(folder, rows, start):
    """Embeddings of a data set of ours; ids are numbers from `start` on."""
    rows = np.asarray(rows, np.float16)
    ids = [f"{start + n:032x}" for n in range(len(rows))]
    flat = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    table = pa.table({"id": ids, "source": ids, "embedding": flat})
    attributes = {"space": "s", "thresholds": {"dedup": 0.6, "leak": 0.5}}
    write_dataset(str(folder), [table], embedding_schema(rows.shape[1]), attributes)
    return str(folder)


def dedup(*words):
    done = CliRunner().invoke(app, ["dedup", *map(str, words)], catch_exceptions=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def kept_of(folder):
    rows = Dataset.open(str(folder)).read(["id", "keep"]).to_pylist()
    return [int(row["id"], 16) for row in rows if row["keep"]]


def test_dedup_base__follows_what_earlier_ones_recorded(tmp_path):
    axes = np.eye(6)
    parts = [axes[[0, 0, 1]], axes[[1, 2]], axes[[0, 2, 3]]]
    embeddings = [vectors(tmp_path / f"e{n}", rows, 10 * n) for n, rows in enumerate(parts)]
    outs = [tmp_path / f"d{n}" for n in range(3)]
    dedup(embeddings[0], "--out", outs[0])
    dedup(embeddings[1], "--base", outs[0], "--out", outs[1])
    dedup(embeddings[2], "--base", f"{outs[1]}/", "--out", outs[2])
    assert [kept_of(out) for out in outs] == [[0, 2], [11], [22]]
    found = Dataset.open(str(outs[2])).read().to_pylist()
    assert [row["component"] for row in found[:2]] == [f"{0:032x}", f"{11:032x}"]
    assert [row["twin_set"] for row in found] == ["base", "base", None]


def test_dedup_base__embeddings_that_moved_or_changed(tmp_path):
    old, new = vectors(tmp_path / "a", np.eye(4), 0), vectors(tmp_path / "b", np.eye(4)[2:], 9)
    dedup(old, "--out", tmp_path / "d")
    (tmp_path / "a").rename(tmp_path / "moved")
    with pytest.raises(DatasetError, match="its embeddings are gone from"):
        dedup(new, "--base", tmp_path / "d", "--out", tmp_path / "x")
    moved = ("--base-embeddings", tmp_path / "moved")
    dedup(new, "--base", tmp_path / "d", *moved, "--out", tmp_path / "o")
    assert kept_of(tmp_path / "o") == []
    others = ("--base-embeddings", vectors(tmp_path / "others", np.eye(4)[::-1], 0))
    with pytest.raises(DatasetError, match=r"d: is about other embeddings than .*others"):
        dedup(new, "--base", tmp_path / "d", *others, "--out", tmp_path / "x")
    vectors(tmp_path / "a", np.eye(5), 0)
    with pytest.raises(DatasetError, match="have changed since; give --base-embeddings"):
        dedup(new, "--base", tmp_path / "d", "--out", tmp_path / "x")
    with pytest.raises(DatasetError, match="does not say which embeddings it is about"):
        dedup(new, "--base", new, "--out", tmp_path / "x")
    with pytest.raises(ConfigError, match="goes with --base"):
        dedup(new, *moved, "--out", tmp_path / "x")


def test_dedup_base__foreign_embeddings_under_ids_of_their_own(tmp_path):
    for name, rows in (("a", np.eye(4)), ("b", np.eye(4)[1:3])):
        table = pa.table({"key": [f"{name}{n}" for n in range(len(rows))], "vec": list(rows)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    columns = ("--id-column", "key", "--embedding-column", "vec", "--threshold", 0.9)
    space = "--assume-same-space"
    dedup(tmp_path / "a.parquet", "--out", tmp_path / "one", *columns)
    base = ("--base", tmp_path / "one", "--out", tmp_path / "two")
    dedup(tmp_path / "b.parquet", *base, *columns, space)
    found = Dataset.open(str(tmp_path / "two")).read().to_pylist()
    assert [row["component"] for row in found] == [make_id("a1"), make_id("a2")]
    assert [row["reason"] for row in found] == ["near_duplicate"] * 2
