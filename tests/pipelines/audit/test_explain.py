import json

import pytest

from curation.dataset import Dataset
from curation.errors import DatasetError
from curation.identity import file_source
from curation.schema import make_id
from pipelines.audit.explain import explain, possible_ids
from pipelines.cli import audit
from tests.pipelines.audited_run import HOSTILE, finished_run


def id_of(name, set_name="web"):
    return make_id(file_source(set_name, name))


def life_of(name, set_name="web"):
    (life,) = [
        one for one in explain(id_of(name, set_name), str(finished_run())) if one["flow"] != ""
    ]
    return life


def test_explain__dropped_copy_names_its_twin():
    life = life_of("edited.jpg")
    assert life["fate"] == "dropped by near_dedup: near_duplicate"
    verdict = life["verdicts"][-1]
    assert verdict["twin"] == id_of("01.jpg")
    assert verdict["similarity"] > verdict["threshold"] == pytest.approx(0.93)
    assert life["sources"][id_of("01.jpg")] == "01.jpg"
    assert "manifest" not in life


def test_explain__leak_names_the_benchmark_image():
    verdict = life_of("leak.jpg")["verdicts"][-1]
    assert (verdict["reason"], verdict["twin_set"]) == ("leak:bench", "bench")
    assert verdict["twin"] == id_of("0.jpg", "bench")


def test_explain__kept_image_lies_in_the_packed_shards():
    work = finished_run()
    kept = Dataset.open(str(work / "manifest")).read(["id", "source_set"]).to_pylist()
    for row in kept:
        flow = "pool" if row["source_set"] == "web" else row["source_set"]
        (life,) = [one for one in explain(row["id"], str(work)) if one["flow"] == flow]
        assert life["fate"] == "in the set"
        assert life["manifest"]["id"] == row["id"]
        place = life["packed"]
        with open(place["file"], "rb") as tar:  # noqa: PTH123
            tar.seek(place["offset"])
            data = tar.read(place["num_bytes"])
        assert data[:2] == b"\xff\xd8"
        assert data[-2:] == b"\xff\xd9"


def test_explain__retrieved_image_names_its_seed():
    work = finished_run()
    rows = Dataset.open(str(work / "manifest")).read(["id", "seed_set"]).to_pylist()
    retrieved = next(row["id"] for row in rows if row["seed_set"])
    (life,) = explain(retrieved, str(work))
    assert life["hits"][0]["seed_set"] == "seeds"
    assert life["hits"][0]["seed_id"] in life["sources"]


def test_explain__set_images_and_every_way_to_name_them():
    work = str(finished_run())
    by_path = {life["flow"] for life in explain("0.jpg", work)}
    assert by_path == {"bench", "seeds", "taken"}
    one = id_of("0.jpg", "seeds")
    assert explain(one[:10], work)[0]["id"] == one
    assert explain(one.upper(), work)[0]["hits"][0]["rank"] == 1
    assert explain(HOSTILE, work)[0]["origin"]["source"] == HOSTILE


@pytest.mark.parametrize("text", ["", "f" * 32, "ffffffff", "http://a.org/x.jpg", "../../etc", "é"])
def test_explain__never_seen_is_one_clear_line(text):
    with pytest.raises(DatasetError, match="has never seen it") as error:
        explain(text, str(finished_run()))
    assert "\n" not in str(error.value)


def test_explain__no_run_there(tmp_path):
    with pytest.raises(DatasetError, match=r"no run\.json"):
        explain("f" * 32, str(tmp_path))


def test_possible_ids__urls_are_normalized():
    assert make_id("http://a.org/x") in possible_ids("HTTP://A.org:80/x#y", [])


def test_print_explanation__tables_and_json(capsys):
    audit.explain(id_of("leak.jpg"), str(finished_run()))
    assert "leak:bench" in capsys.readouterr().out
    audit.explain(id_of("leak.jpg"), str(finished_run()), json=True)
    assert json.loads(capsys.readouterr().out)[0]["verdicts"][0]["stage"] == "ingest"
