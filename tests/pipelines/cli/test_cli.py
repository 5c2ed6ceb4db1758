"""The command line as users meet it: verbs alone, wrong input, exit codes, no telemetry."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_pictures import picture

from curation.dataset import Dataset, write_dataset
from curation.schema import embedding_schema, make_id
from embedder.images import encode_jpeg
from tests.pipelines.commands import curate, fails, succeeds


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        (folder / f"{number:02d}.jpg").write_bytes(encode_jpeg(picture(number, 128)))
    (folder / "copy.jpg").write_bytes(encode_jpeg(picture(3, 128), 40))
    (folder / "broken.jpg").write_bytes(b"no image at all")
    return folder


@pytest.fixture(scope="module")
def embeddings(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("emb") / "emb"
    succeeds("embed", photos, "--encoder", "lite-copy", "--out", out)
    return out


def vectors(folder, rows: int, width: int, space: str = "s", seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, width))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    table = pa.table(
        {
            "id": [make_id(f"{seed}/{i}") for i in range(rows)],
            "source": [str(i) for i in range(rows)],
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(values.astype(np.float16).reshape(-1)), width
            ),
        }
    )
    attributes = {"space": space, "encoder": "x", "thresholds": {"dedup": 0.6, "leak": 0.5}}
    write_dataset(str(folder), [table], embedding_schema(width), attributes)
    return folder


def test_help__shows_every_verb_with_an_example():
    verbs = json.loads(
        subprocess.run(
            [sys.executable, "-c", _LIST_VERBS], capture_output=True, text=True, check=True
        ).stdout
    )
    assert {"run", "dedup", "retrieve", "embed", "filter", "explain", "verify"} <= set(verbs)
    for verb, text in verbs.items():
        assert f"curate {verb}" in text, f"{verb} has no example"


_LIST_VERBS = (
    "import json; from pipelines.cli.app import app; "
    "print(json.dumps({(c.name or c.callback.__name__): c.callback.__doc__ "
    "for c in app.registered_commands}))"
)


def test_embed__a_folder_of_images(embeddings):
    dataset = Dataset.open(str(embeddings))
    assert dataset.columns == ["id", "source", "embedding"]
    assert dataset.num_rows == 13
    assert len(pq.read_table(embeddings)["id"]) == 13  # plain Parquet readers see only the rows


def test_embed__takes_settings_and_names_those_that_it_does_not_know(photos, tmp_path):
    words = ("embed", photos, "--encoder", "lite-copy", "--out", tmp_path / "e", "--set")
    assert "unknown key 'batch'; did you mean 'batch_size'?" in fails(2, *words, "batch=2")
    line = fails(2, *words, "gpus=2", "--engine", "ray", "--workers", 1)
    assert "embed: a task needs 1 CPUs and 2 GPUs, the largest of 1 nodes" in line
    succeeds(*words, "batch_size=2")


def test_embed__like_takes_the_encoder_of_others(photos, embeddings, tmp_path):
    succeeds("embed", photos, "--like", embeddings, "--out", tmp_path / "e")
    assert Dataset.open(str(tmp_path / "e")).attributes == Dataset.open(str(embeddings)).attributes


def test_dedup__finds_the_copy_and_names_its_twin(photos, embeddings, tmp_path):
    succeeds("dedup", embeddings, "--out", tmp_path / "d", "--threshold", 0.9)
    rows = {row["id"]: row for row in Dataset.open(str(tmp_path / "d")).read().to_pylist()}
    folder = Path(photos).name  # a folder's set has its name
    one, other = (rows[make_id(f"{folder}/{name}.jpg")] for name in ("03", "copy"))
    assert (one["twin"], other["twin"]) == (other["id"], one["id"])
    assert one["similarity"] == other["similarity"] > 0.9
    assert {one["reason"], other["reason"]} >= {"near_duplicate"}
    assert one["component"] == other["component"]


def test_dedup__against_an_evaluation_set(embeddings, tmp_path):
    succeeds("dedup", embeddings, "--against", f"val={embeddings}", "--out", tmp_path / "d")
    rows = Dataset.open(str(tmp_path / "d")).read().to_pylist()
    assert {row["reason"] for row in rows} <= {"leak:val", "near_duplicate"}
    assert all(row["twin_set"] == "val" for row in rows if row["reason"] == "leak:val")


def test_dedup__neighbors_without_a_folder_for_them_are_refused(embeddings, tmp_path):
    line = fails(2, "dedup", embeddings, "--neighbors", 5, "--out", tmp_path / "d")
    assert "--neighbors: goes with --pairs" in line
    assert not (tmp_path / "d").exists()


def test_dedup__an_unknown_component_rule_is_refused_with_those_known(embeddings, tmp_path):
    line = fails(2, "dedup", embeddings, "--linkage", "centroid", "--out", tmp_path / "d")
    assert "'centroid'" in line
    assert "components, representative" in line


def test_dedup__foreign_parquet_with_its_own_ids(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 16)).astype(np.float32)
    rows[7] = 3 * rows[2]  # not of unit length
    table = pa.table({"key": [f"img {i}" for i in range(20)], "vec": list(rows)})
    pq.write_table(table, tmp_path / "e.parquet")
    columns = ("--id-column", "key", "--embedding-column", "vec")
    succeeds("dedup", tmp_path / "e.parquet", "--out", tmp_path / "o", "--threshold", 0.9, *columns)
    decisions = Dataset.open(str(tmp_path / "o")).read().to_pylist()
    dropped = [row for row in decisions if not row["keep"]]
    ids = {make_id("img 2"), make_id("img 7")}
    assert [{row["id"], row["twin"]} for row in dropped] == [ids]
    names = Dataset.open(str(tmp_path / "o" / "_input-pool")).read().to_pydict()
    assert dict(zip(names["id"], names["source"], strict=True))[dropped[0]["id"]].startswith("img ")


def test_retrieve__sample_and_cluster_rules(embeddings, tmp_path):
    succeeds(
        "retrieve", embeddings, "--out", tmp_path / "hits", "--seeds", f"a={embeddings}:sample:3"
    )
    hits = Dataset.open(str(tmp_path / "hits")).read().to_pylist()
    assert len(hits) == 39
    assert {hit["rule"] for hit in hits} == {"sample"}


def test_neighbors__take_recall_memory_and_their_choices(tmp_path):
    rows = vectors(tmp_path / "e", 300, 8)
    how = ("--recall", 0.9, "--memory", "2GB", "--set", "comparison.method=lists")
    said = succeeds("dedup", rows, *how, "--linkage", "representative", "--out", tmp_path / "d")
    assert re.search(r"asked_recall\W+0\.9\b", said)
    settings = json.loads((tmp_path / "d" / "_stage.json").read_text())["settings"]
    assert settings["linkage"] == "representative"
    assert settings["comparison"]["memory_gb"] == 2
    seeds = ("--seeds", f"s={rows}:sample:3", "--on-collision", "next")
    said = succeeds("retrieve", rows, *seeds, *how, "--out", tmp_path / "h")
    hits = Dataset.open(str(tmp_path / "h"))
    assert hits.manifest.content_digest[:20] in said
    assert len(set(hits.read()["id"].to_pylist())) == 300
    succeeds("cluster", rows, "--levels", "12", "--memory", "1.5GB", "--out", tmp_path / "c")
    for memory in ("lots", "-1GB"):
        assert "--memory" in fails(2, "dedup", rows, "--memory", memory, "--out", tmp_path / "x")


def test_cluster__then_balance(tmp_path):
    rows = vectors(tmp_path / "e", 300, 8)
    succeeds("cluster", rows, "--levels", "12,3", "--out", tmp_path / "c")
    clusters = Dataset.open(str(tmp_path / "c")).read().to_pydict()
    assert set(clusters["cluster"]) == set(range(12))
    assert {len(path) for path in clusters["clusters"]} == {2}
    seeds = ("--seeds", f"s={rows}:cluster:10:1:50", "--clusters", tmp_path / "c")
    succeeds("retrieve", rows, *seeds, "--out", tmp_path / "h")
    hits = Dataset.open(str(tmp_path / "h")).read().to_pylist()
    known = dict(zip(clusters["id"], clusters["cluster"], strict=True))
    assert len(hits) == 50
    assert all(hit["cluster"] == known[hit["id"]] for hit in hits)
    succeeds("balance", tmp_path / "c", "--target", 60, "--out", tmp_path / "b")
    verdicts = Dataset.open(str(tmp_path / "b"))
    assert sum(shard.num_kept for shard in verdicts.manifest.shards) == 60
    assert "column" in fails(1, "balance", rows, "--target", 5, "--out", tmp_path / "x")


def test_cluster__wrong_levels_are_named_and_the_folder_stays_free(tmp_path):
    rows = vectors(tmp_path / "e", 30, 8)
    wrong = {
        "x": "numbers that fall",
        "3x": "numbers that fall",
        "4,10": "must be positive and fall",
        "8,8": "must be positive and fall",
        "40,5x2": "only the lowest level",
        "31,4": "ask for fewer clusters than rows",
    }
    for levels, said in wrong.items():
        assert said in fails(2, "cluster", rows, "--levels", levels, "--out", tmp_path / "c")
    succeeds("cluster", rows, "--levels", "10,4", "--out", tmp_path / "c")


def test_filter__and_pack_what_stays(photos, tmp_path):
    succeeds("canonicalize", photos, "--out", tmp_path / "images")
    succeeds("filter", tmp_path / "images", "--out", tmp_path / "v", "--set", "quality.min_side=64")
    verdicts = Dataset.open(str(tmp_path / "v"))
    assert {"id", "keep", "reason", "score", "threshold", "nsfw_score"} <= set(verdicts.columns)
    succeeds("pack", tmp_path / "images", "--keep", tmp_path / "v", "--out", tmp_path / "packed")
    assert Dataset.open(str(tmp_path / "packed")).num_rows == verdicts.manifest.shards[0].num_kept


def test_select__joins_named_sets(photos, tmp_path):
    succeeds("select", f"a={photos}", f"b={photos}", "--out", tmp_path / "m")
    assert Dataset.open(str(tmp_path / "m")).num_rows == 13


def test_encoders__says_what_works_here_and_why_not():
    listed = {row["name"]: row for row in json.loads(succeeds("encoders", "--json"))}
    assert listed["lite-copy"]["works"]
    assert "Apache-2.0" in succeeds("encoders")
    bad, good = json.loads(succeeds("encoders", "sscd:/no/such.pt", "lite-copy", "--json"))
    assert (bad["works"], good["works"]) == (False, True)
    assert "no file /no/such.pt" in bad["note"]


def test_wrong_recipe__misspelled_key(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: x\npool:\n  - ingest: {images: /x}\n  - canonicalize: {max_sde: 3}\n")
    line = fails(2, "run", recipe, "--work", tmp_path / "w")
    assert "unknown key 'max_sde'; did you mean 'max_side'?" in line
    assert not (tmp_path / "w").exists()


def test_wrong_embeddings__missing_column(tmp_path):
    pq.write_table(pa.table({"id": ["a"], "vector": [[1.0]]}), tmp_path / "e.parquet")
    line = fails(1, "dedup", tmp_path / "e.parquet", "--out", tmp_path / "o", "--threshold", 0.5)
    assert "no column 'embedding'; found: id, vector" in line
    assert not (tmp_path / "o").exists()


def test_wrong_encoder__unknown_name(photos, tmp_path):
    line = fails(2, "embed", photos, "--encoder", "clip", "--out", tmp_path / "o")
    assert "unknown encoder 'clip'" in line
    assert not (tmp_path / "o").exists()


def test_wrong_encoder__missing_file(photos, tmp_path):
    line = fails(2, "embed", photos, "--encoder", "sscd:/no/such.pt", "--out", tmp_path / "o")
    assert "/no/such.pt" in line


@pytest.mark.parametrize(("width", "space", "word"), [(8, "t", "space"), (9, "s", "width")])
def test_wrong_embeddings__another_space_or_width(tmp_path, width, space, word):
    one = vectors(tmp_path / "one", 5, 8)
    other = vectors(tmp_path / "other", 5, width, space, seed=1)
    line = fails(1, "dedup", one, "--against", f"v={other}", "--out", tmp_path / "o")
    assert word in line


def test_wrong_input__no_such_data_set(tmp_path):
    assert "does not exist" in fails(1, "dedup", tmp_path / "x", "--out", tmp_path / "o")
    line = fails(1, "explain", "a", "--work", tmp_path)
    assert "no finished run there" in line


def test_wrong_output__other_settings_in_the_same_folder(embeddings, tmp_path):
    succeeds("dedup", embeddings, "--out", tmp_path / "d", "--threshold", 0.9)
    line = fails(1, "dedup", embeddings, "--out", tmp_path / "d", "--threshold", 0.8)
    assert "written with other settings or inputs" in line


def test_wrong_words__usage_is_exit_2(tmp_path):
    assert curate("dedup").returncode == 2
    assert curate("nonsense").returncode == 2
    assert "NAME=EMB:sample:K" in fails(2, "retrieve", "p", "--out", tmp_path, "--seeds", "x")


@contextlib.contextmanager
def tmpfs(folder: Path, options: str):
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_output__unwritable_folder_is_one_line(photos, tmp_path):
    with tmpfs(tmp_path / "ro", "ro,size=1m") as folder:
        assert "Read-only file system" in fails(1, "canonicalize", photos, "--out", folder / "o")


def test_output__full_disk_is_one_line_and_resumable(photos, tmp_path):
    with tmpfs(tmp_path / "small", "size=24k") as folder:
        line = fails(1, "canonicalize", photos, "--out", folder / "o")
        assert "no space left" in line
        assert not Dataset.is_finished(str(folder / "o"))
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        succeeds("canonicalize", photos, "--out", folder / "o")
        assert Dataset.open(str(folder / "o")).num_rows == 13


def test_all_imports__work_without_libgl():
    """Everything but the [faces] extra imports; the headless OpenCV needs no libGL."""
    code = (
        "import cv2, ctypes.util, pkgutil, importlib\n"
        "import embedder, curation, pretrain, pipelines\n"
        "for package in (embedder, curation, pretrain, pipelines):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libGL.so' not in maps\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pip_check__is_clean():
    done = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_download__then_retries_only_what_failed(tmp_path):
    from pipelines.run.demo_site import DemoSite, serve_site

    site, www = DemoSite(port=18751), tmp_path / "www"
    www.mkdir()
    (www / "a.jpg").write_bytes(encode_jpeg(picture(1)))
    urls = [f"http://127.0.0.1:18751/{name}" for name in ("a.jpg", "gone.jpg")]
    urls.append("http://127.0.0.1:18752/late.jpg")
    pq.write_table(pa.table({"url": urls}), tmp_path / "urls.parquet")
    changes = ("--allow-private",)
    with serve_site(site, tmp_path):
        shown = succeeds("download", tmp_path / "urls.parquet", "--out", tmp_path / "raw", *changes)
    assert "127.0.0.1" in shown
    decisions = Dataset.open(str(tmp_path / "raw" / "_decisions")).read().to_pylist()
    reasons = {row["reason"] for row in decisions}
    assert {None, "http_404"} < reasons
    assert len(reasons) == 3
    (www / "late.jpg").write_bytes(encode_jpeg(picture(2)))
    with serve_site(DemoSite(port=18752), tmp_path):
        again = ("--retry-failed", tmp_path / "raw", *changes)
        succeeds("download", tmp_path / "urls.parquet", "--out", tmp_path / "more", *again)
    fetched = Dataset.open(str(tmp_path / "more")).read(["id"])["id"].to_pylist()
    assert fetched == [make_id(urls[2])]


_FRAGILE = """
name: fragile
rows_per_shard: 4
pool:
  - ingest: {images: "PHOTOS"}
  - canonicalize
  - quality
  - select
"""


def test_run__a_shard_that_keeps_failing_is_named_with_the_command_that_retries_it(
    photos, tmp_path
):
    recipe, work = tmp_path / "r.yaml", tmp_path / "work"
    text = _FRAGILE.replace("PHOTOS", str(photos))
    recipe.write_text(text.replace("  - quality\n", ""))
    words = ("run", recipe, "--work", work)
    succeeds(*words)
    shard = next(work.glob("work/pool/02-*/images/shard-00001.parquet"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + bytes(len(whole) // 2) + whole[100 + len(whole) // 2 :])
    recipe.write_text(text)
    line = fails(1, *words)
    assert "quality: 1 of 4 shards failed 3 times (1): StorageError" in line
    command = f"curate run {recipe} --work {work}"
    assert f"retry them with: {command} (--max-failed-shards N accepts some)" in line

    shard.write_bytes(whole)
    assert json.loads(succeeds(*words, "--json"))["funnel"][-1]["rows_out"] == 13
