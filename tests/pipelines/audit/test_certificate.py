import json
from pathlib import Path

import numpy as np
import pytest
import typer

from curation.dataset import Dataset
from curation.errors import ConfigError, DatasetError, SpaceError
from curation.neighbors.rows.vectors import vectors_of
from embedder.encoder import embed_images, load_encoder
from embedder.images import decode
from embedder.rows import unit_rows
from pipelines.audit.certificate import certify, markdown
from pipelines.audit.work_folder import WorkFolder
from pipelines.cli import audit
from pipelines.cli.operate import run
from pipelines.engines.local_engine import LocalEngine
from tests.pipelines.audited_run import copied_run, finished_run
from tests.pipelines.commands import Here


def vectors_by_id(work, flow):
    table = work.making(flow, "copy").output("copy").read(["id", "embedding"])
    rows = unit_rows(vectors_of(table["embedding"], flow)).astype(np.float32)
    return dict(zip(table["id"].to_pylist(), rows, strict=True))


def test_certify__agrees_with_all_pairs():
    work = WorkFolder(str(finished_run()))
    (found,) = certify(str(finished_run()), LocalEngine())["benchmarks"]
    pool = vectors_by_id(work, "pool") | vectors_by_id(work, "taken")
    kept = [pool[one] for one in work.manifest.read(["id"])["id"].to_pylist()]
    bench = np.stack(list(vectors_by_id(work, "bench").values()))
    scores = (bench.astype(np.float64) @ np.stack(kept).astype(np.float64).T).max(axis=1)
    assert found["nearest"] == pytest.approx(scores.max(), abs=1e-6)
    assert found["median"] == pytest.approx(np.median(scores), abs=1e-6)
    assert found["above"] == 0
    assert sum(found["histogram"]["counts"]) == found["images"] == 4


def test_certify__a_lower_threshold_lists_the_nearest():
    found = certify(str(finished_run()), LocalEngine(), threshold=-1.0)
    (one,) = found["benchmarks"]
    assert one["above"] == 4
    manifest = Dataset.open(str(finished_run() / "manifest")).read(["id"])["id"].to_pylist()
    assert {row["kept"] for row in one["list"]} <= set(manifest)
    scores = [row["similarity"] for row in one["list"]]
    assert scores == sorted(scores, reverse=True)
    assert one["list"] == one["scores"]
    assert "4 have an image above cosine -1" in markdown(found)


def test_certify__every_image_has_its_nearest_and_the_digest_covers_all():
    work = WorkFolder(str(finished_run()))
    found = certify(str(finished_run()), LocalEngine())
    (one,) = found["benchmarks"]
    assert {row["image"] for row in one["scores"]} == set(vectors_by_id(work, "bench"))
    assert one["list"] == []
    table = {row["id"]: row for row in Dataset.open(one["table"]).read().to_pylist()}
    assert {row["image"]: row["kept"] for row in one["scores"]} == {
        name: row["kept"] for name, row in table.items()
    }
    assert found["content_digest"] in one["statement"]
    again = certify(str(finished_run()), LocalEngine())["benchmarks"][0]
    assert again["digest"] == one["digest"]
    assert (
        certify(str(finished_run()), LocalEngine(), 0.1)["benchmarks"][0]["digest"] != one["digest"]
    )
    page = markdown(found)
    assert one["digest"] in page
    assert "| 0.3 to 0.4 | " in page


def test_certify__no_run(tmp_path):
    with pytest.raises(DatasetError, match=r"no run\.json"):
        certify(str(tmp_path), LocalEngine())


def test_print_certificate__file_and_verdict(tmp_path, capsys):
    out = tmp_path / "certificate.md"
    audit.certificate(str(finished_run()), str(out), engine=Here())
    assert "none has an image above cosine" in out.read_text()
    assert "bench" in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        audit.certificate(str(finished_run()), threshold=-1.0, engine=Here(), json=True)
    assert json.loads(capsys.readouterr().out)["threshold"] == -1.0


def test_certify__another_encoder_embeds_both_sides_and_says_so(tmp_path):
    work = copied_run(tmp_path)
    with pytest.raises(ConfigError, match="has no threshold of its own; give --threshold"):
        certify(str(work), LocalEngine(), encoder="lite-semantic")
    found = certify(str(work), LocalEngine(), 0.9, "lite-semantic", str(tmp_path / "scratch"))
    (one,) = found["benchmarks"]
    encoder = load_encoder("lite-semantic")
    assert (one["encoder"], one["space"]) == ("lite-semantic", encoder.space)
    assert "(encoder lite-semantic, which the run did not use;" in one["statement"]
    images = {
        flow: WorkFolder(str(work)).making(flow, "images").output("images").read(["id", "image"])
        for flow in ("pool", "taken", "bench")
    }
    kept = set(Dataset.open(str(work / "manifest")).read(["id"])["id"].to_pylist())
    rows = [row for flow in ("pool", "taken") for row in images[flow].to_pylist()]
    chosen = [row for row in rows if row["id"] in kept]
    sides = [
        embed_images([encoder], [decode(row["image"]) for row in side])[0].astype(np.float64)
        for side in (images["bench"].to_pylist(), chosen)
    ]
    units = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides]
    scores = np.sort((units[0] @ units[1].T).max(axis=1))[::-1]
    assert [row["similarity"] for row in one["scores"]] == pytest.approx(scores, abs=1e-6)
    assert not (tmp_path / "scratch" / "embedded").exists()


EMPTY = """
name: empty
sets:
  bench: {images: "IMAGES"}
pool:
  - ingest: {images: "IMAGES"}
  - canonicalize
  - quality: {min_side: 4000}
  - embed: {encoders: {copy: lite-copy}}
  - near_dedup: {embeddings: copy}
  - leaks: {embeddings: copy, against: [bench]}
  - select
"""


def test_certify__a_run_that_ends_with_no_image_says_so(tmp_path, capsys):
    work = tmp_path / "work"
    recipe = tmp_path / "r.yaml"
    recipe.write_text(EMPTY.replace("IMAGES", str(finished_run() / "sets" / "bench")))
    run(str(recipe), str(work), Here())
    assert "no image is left: quality dropped the last of them" in capsys.readouterr().out
    audit.certificate(str(work), str(tmp_path / "c.md"), engine=Here(), json=True)
    (one,) = json.loads(capsys.readouterr().out)["benchmarks"]
    assert (one["nearest"], one["median"], one["scores"]) == (None, None, [])
    words = "Nothing was compared with the 4 images of 'bench': the set holds no image."
    assert one["statement"] == words
    page = (tmp_path / "c.md").read_text()
    assert words in page
    assert "-1.0" not in page
    audit.certificate(str(work), engine=Here())
    assert "-1.0" not in capsys.readouterr().out


def test_certify__embeddings_of_two_spaces_are_not_compared(tmp_path):
    work = copied_run(tmp_path)
    path = WorkFolder(str(work)).making("taken", "copy").output("copy").path
    manifest = Path(path) / "_manifest.json"
    manifest.write_text(manifest.read_text().replace('"space": "tiny"', '"space": "other"'))
    with pytest.raises(SpaceError, match="'taken' was embedded into another space"):
        certify(str(work), LocalEngine())
