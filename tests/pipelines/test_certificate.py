import json

import numpy as np
import pytest

from curation.dataset import Dataset
from curation.errors import DatasetError
from pipelines.certificate import certify, markdown, nearest, read_vectors
from pipelines.local_engine import LocalEngine
from pipelines.verbs import audit
from pipelines.work_folder import WorkFolder
from tests.pipelines.audited_run import finished_run


def vectors_by_id(work, flow):
    return dict(zip(*read_vectors(work.making(flow, "copy").output("copy")), strict=True))


def test_certify__agrees_with_all_pairs():
    work = WorkFolder(str(finished_run()))
    (found,) = certify(str(finished_run()), LocalEngine(1))["benchmarks"]
    pool = vectors_by_id(work, "pool") | vectors_by_id(work, "taken")
    kept = [pool[one] for one in work.manifest.read(["id"])["id"].to_pylist()]
    bench = np.stack(list(vectors_by_id(work, "bench").values()))
    scores = (bench.astype(np.float64) @ np.stack(kept).astype(np.float64).T).max(axis=1)
    assert found["nearest"] == pytest.approx(scores.max(), abs=1e-6)
    assert found["median"] == pytest.approx(np.median(scores), abs=1e-6)
    assert found["above"] == 0
    assert sum(found["histogram"]["counts"]) == found["images"] == 4


def test_certify__a_lower_threshold_lists_the_nearest():
    found = certify(str(finished_run()), LocalEngine(1), threshold=-1.0)
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
    found = certify(str(finished_run()), LocalEngine(1))
    (one,) = found["benchmarks"]
    assert {row["image"] for row in one["scores"]} == set(vectors_by_id(work, "bench"))
    assert one["list"] == []
    assert found["content_digest"] in one["statement"]
    again = certify(str(finished_run()), LocalEngine(1))["benchmarks"][0]
    assert again["digest"] == one["digest"]
    assert (
        certify(str(finished_run()), LocalEngine(1), 0.1)["benchmarks"][0]["digest"]
        != one["digest"]
    )
    page = markdown(found)
    assert one["digest"] in page
    assert "| 0.3 to 0.4 | " in page


def test_nearest__ties_and_nothing():
    rows = np.eye(3, dtype=np.float32)[[0, 0, 1]]
    scores, ids = nearest(np.eye(3, dtype=np.float32)[:1], rows, ["a", "b", "c"])
    assert (scores[0], ids) == (1.0, ["a"])
    assert nearest(rows, rows[:0], [])[1] == ["", "", ""]


def test_certify__no_run(tmp_path):
    with pytest.raises(DatasetError, match=r"no run\.json"):
        certify(str(tmp_path), LocalEngine(1))


def test_print_certificate__file_and_verdict(tmp_path, capsys):
    out = tmp_path / "certificate.md"
    assert audit.print_certificate(str(finished_run()), str(out), None, LocalEngine(1), False)
    assert "none has an image above cosine" in out.read_text()
    assert "bench" in capsys.readouterr().out
    assert not audit.print_certificate(str(finished_run()), None, -1.0, LocalEngine(1), True)
    assert json.loads(capsys.readouterr().out)["threshold"] == -1.0
