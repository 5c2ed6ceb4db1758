"""Embeddings of other tools, through the verbs that compare them."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from curation.dataset import Dataset
from curation.errors import ConfigError, CurateError, DatasetError, SchemaError, SpaceError
from curation.schema import make_id
from pipelines.cli.app import app

VECTORS = np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32)
NAMES = [f"img{n}" for n in range(60)]


def write(path, ids, vectors, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    column = vectors if isinstance(vectors, pa.Array) else list(vectors)
    pq.write_table(pa.table({"id": ids, "embedding": column, **more}), path)


def dedup(*words):
    words = ("dedup", *words, "--threshold", 0.6, "--max-component-share", 1)
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def verdicts(out):
    names = Dataset.open(str(out / "_input-pool")).read().to_pylist()
    sources = {row["id"]: row["source"] for row in names}
    return {sources[row["id"]]: row for row in Dataset.open(str(out)).read().to_pylist()}


def test_dedup__a_shard_without_one_vector_is_bad_rows(tmp_path):
    write(tmp_path / "e" / "0.parquet", NAMES[:50], VECTORS[:50])
    write(tmp_path / "e" / "1.parquet", ["x1", "x2"], pa.nulls(2, pa.list_(pa.float32())))
    dedup(tmp_path / "e", "--out", tmp_path / "o")
    found = verdicts(tmp_path / "o")
    assert {name for name, row in found.items() if row["reason"] == "bad_vector"} == {"x1", "x2"}
    assert len(found) == 52


def test_dedup__rows_without_direction_are_bad(tmp_path):
    vectors = VECTORS[:6].copy()
    vectors[0], vectors[1, 3], vectors[2, 5] = 0, np.nan, -np.inf
    write(tmp_path / "e.parquet", NAMES[:6], vectors)
    dedup(tmp_path / "e.parquet", "--out", tmp_path / "o")
    reasons = [verdicts(tmp_path / "o")[name]["reason"] for name in NAMES[:6]]
    assert reasons == ["bad_vector"] * 3 + [None] * 3


@pytest.mark.parametrize("files", [1, 2])
def test_dedup__an_id_twice_is_named_as_its_owner_knows_it(tmp_path, files):
    write(tmp_path / "e" / "0.parquet", NAMES[:50], VECTORS[:50])
    again = [NAMES[7], "other"] if files == 2 else ["other", "other"]
    write(tmp_path / "e" / "1.parquet", again, VECTORS[50:52])
    name = again[0]
    with pytest.raises(DatasetError, match=rf"id '{name}' \({make_id(name)}\) occurs twice"):
        dedup(tmp_path / "e", "--out", tmp_path / "o")


def test_dedup__a_null_id_is_refused(tmp_path):
    write(tmp_path / "e" / "0.parquet", pa.array([*NAMES[:5], None]), VECTORS[:6])
    with pytest.raises(SchemaError, match=r"0.parquet: row 5 has no id \('id' is null\)"):
        dedup(tmp_path / "e", "--out", tmp_path / "o")
    ours = [make_id(name) for name in NAMES[:5]]
    write(tmp_path / "f" / "0.parquet", pa.array([*ours, None]), VECTORS[:6])
    with pytest.raises(CurateError, match=r"0.parquet: id None is not 32 hex characters \(row 5\)"):
        dedup(tmp_path / "f", "--out", tmp_path / "p")


def test_dedup__folders_are_walked_as_ingest_does(tmp_path, caplog):
    for number, place in enumerate(("a/0", "a/b/1", "c/2")):
        some = slice(20 * number, 20 * number + 20)
        write(tmp_path / "e" / f"{place}.parquet", NAMES[some], VECTORS[some])
    write(tmp_path / "e" / ".tmp" / "x.parquet", ["hidden"], VECTORS[:1])
    write(tmp_path / "e" / "a" / ".x.parquet", ["hidden"], VECTORS[:1])
    write(tmp_path / "elsewhere" / "_x.PARQUET", ["linked"], np.ones((1, 16), np.float32))
    (tmp_path / "e" / "link").symlink_to(tmp_path / "elsewhere")
    dedup(tmp_path / "e", "--out", tmp_path / "o")
    assert set(verdicts(tmp_path / "o")) == {*NAMES, "linked"}
    assert "left out: 2 hidden or our own output" in caplog.text


def test_dedup__numpy_files_are_named_as_unsupported(tmp_path):
    (tmp_path / "e" / "img_emb").mkdir(parents=True)
    np.save(tmp_path / "e" / "img_emb" / "img_emb_0.npy", VECTORS[:9])
    metadata = tmp_path / "e" / "metadata"
    metadata.mkdir()
    pq.write_table(pa.table({"image_path": NAMES[:9]}), metadata / "metadata_0.parquet")
    said = "holds NumPy arrays (img_emb/img_emb_0.npy), which are not read"
    with pytest.raises(DatasetError, match=re.escape(said)):
        dedup(tmp_path / "e", "--out", tmp_path / "o")


@pytest.mark.parametrize("lengths", [(16, 12), (16, 12, 16)])
def test_dedup__mixed_widths_are_refused_by_name(tmp_path, lengths):
    for number, width in enumerate(lengths):
        some = slice(5 * number, 5 * number + 5)
        write(tmp_path / "e" / f"{number}.parquet", NAMES[some], VECTORS[some, :width])
    with pytest.raises(CurateError, match=r"1.parquet: vectors of width 12, but .*0.parquet"):
        dedup(tmp_path / "e", "--out", tmp_path / "o")


def test_dedup__mixed_widths_of_pool_and_set_are_refused_by_name(tmp_path):
    write(tmp_path / "e.parquet", NAMES[:9], VECTORS[:9])
    write(tmp_path / "v.parquet", NAMES[9:18], VECTORS[9:18, :12])
    words = ("--against", f"v={tmp_path / 'v.parquet'}", "--against-threshold", 0.5)
    with pytest.raises(SpaceError, match="width 12"):
        dedup(tmp_path / "e.parquet", *words, "--assume-same-space", "--out", tmp_path / "o")


def test_dedup__sizes_of_foreign_rows_choose_representatives(tmp_path):
    vectors = np.repeat(VECTORS[:1], 2, axis=0)
    sizes = {"original_width": [10, 20], "original_height": [10, 20]}
    for first in (0, 1):
        order = [first, 1 - first]
        more = {name: [values[n] for n in order] for name, values in sizes.items()}
        write(tmp_path / f"{first}.parquet", [NAMES[n] for n in order], vectors, **more)
        dedup(tmp_path / f"{first}.parquet", "--out", tmp_path / f"o{first}")
        kept = [name for name, row in verdicts(tmp_path / f"o{first}").items() if row["keep"]]
        assert kept == ["img1"]


@pytest.mark.parametrize(
    "count", ["-4", "0", "3.5", "x", "", "²", "1e3", "100000000", "9" * 5000, "1_0", "+3"]
)
def test_retrieve__a_count_that_cannot_be_is_refused_at_once(tmp_path, count):
    words = ("retrieve", tmp_path / "none", "--seeds", f"s={tmp_path / 'none'}:sample:{count}")
    result = CliRunner().invoke(app, [str(word) for word in (*words, "--out", tmp_path / "o")])
    assert isinstance(result.exception, ConfigError), result.exception
    assert "\n" not in str(result.exception)
