import csv
import json
import sys
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.errors import ConfigError, DatasetError
from curation.ledger import StageRecord
from pipelines.audit.dataset_stats import balance
from pipelines.audit.run_stats import thresholds
from pipelines.audit.stats import count_by_column, stats_of, write_csv
from pipelines.audit.work_folder import FinishedStage
from pipelines.cli import audit
from pipelines.run.run_record import StageEntry
from tests.pipelines.audited_run import finished_run


def test_stats_of__run_adds_up():
    found = stats_of(str(finished_run()))
    assert (found["kind"], found["rows_in"], found["rows_out"]) == ("run", 30, 17)
    for row in found["funnel"]:
        assert row["rows_in"] + row["added"] == row["rows_out"] + sum(row["dropped"].values())
    dropped = {row["reason"]: row["rows"] for row in found["reasons"] if row["flow"] == "pool"}
    assert dropped["duplicate_bytes"] == dropped["leak:bench"] == dropped["blank"] == 1
    assert sum(row["rows"] for row in found["duplicates"]) == 27
    assert {row["component_size"]: row["components"] for row in found["duplicates"]}[2] == 1
    (seeds,) = found["seed_sets"]
    assert (seeds["hits"], seeds["sources"]) == (18, 3)
    assert seeds["images"] == found["manifest"]["rows"] - 3
    assert found["manifest"]["rows"] == 17


def test_stats_of__scores_have_quantiles_and_limits():
    scores = {(s["stage"], s["score"]): s for s in stats_of(str(finished_run()))["scores"]}
    assert scores["quality", "short_side"]["thresholds"] == [16.0]
    assert scores["near_dedup", "similarity"]["thresholds"] == [0.93]
    assert scores["quality", "contrast"]["quantiles"]["0.5"] > 10


def test_stats_of__data_set_counts_columns():
    found = stats_of(str(finished_run() / "manifest"))
    columns = {row["column"]: row for row in found["columns"]}
    assert found["rows"] == 17
    assert columns["width"]["min"] == columns["width"]["max"] == 96
    assert {v["value"]: v["rows"] for v in columns["source_set"]["values"]} == {
        "web": 14,
        "taken": 3,
    }
    assert "values" not in columns["id"]


def test_stats_of__parts_and_balance_of_the_set():
    found = stats_of(str(finished_run()))
    assert [(row["part"], row["n"]) for row in found["parts"]] == [("seeds", 14), ("taken", 3)]
    assert sum(row["share"] for row in found["parts"]) == pytest.approx(1)
    told = {row["by"]: row for row in found["manifest"]["balance"]}
    assert (told["source_set"]["groups"], told["source_set"]["largest"]) == (2, 14)
    assert told["source_set"]["gini"] == pytest.approx(balance([14, 3])["gini"])
    assert (told["seed_set"]["groups"], told["seed_set"]["entropy"]) == (1, 1.0)
    assert found["failed_shards"] == []


def test_stats_of__foreign_parquet_without_ids(tmp_path):
    pq.write_table(
        pa.table({"url": ["http://a/x", "http://b/y"], "n": [1, 3]}), tmp_path / "a.parquet"
    )
    found = stats_of(str(tmp_path))
    assert found["rows"] == 2
    assert {c["column"]: c.get("mean") for c in found["columns"]}["n"] == 2


def test_stats_of__nothing_there(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        stats_of(str(tmp_path / "absent"))


def test_count_by_column__host_and_column(tmp_path):
    urls = ["http://user@A.org:80/x", "https://b.org/?q=http://c.org/", "https://b.org", None]
    pq.write_table(pa.table({"id": list("wxyz"), "source": urls}), tmp_path / "a.parquet")
    counts = {row["value"]: row["rows"] for row in count_by_column(str(tmp_path), "host")}
    assert counts == {"b.org": 2, "A.org": 1, None: 1}
    by_set = count_by_column(str(finished_run()), "source_set")
    assert by_set[0] == {"value": "web", "rows": 14}


def test_count_by_column__unknown_column():
    with pytest.raises(ConfigError, match="--by color: no such column; there are: host, id"):
        count_by_column(str(finished_run()), "color")


def test_count_by_column__hostile_name_is_no_sql(tmp_path):
    pq.write_table(pa.table({"id": ["a"], 'x"; drop': ["b"]}), tmp_path / "a.parquet")
    assert count_by_column(str(tmp_path), 'x"; drop') == [{"value": "b", "rows": 1}]


def test_stats_of__large_tables_are_sampled_alike(tmp_path, monkeypatch):
    numbers = np.random.default_rng(0).permutation(200_000)
    table = pa.table({"id": [str(n) for n in range(200_000)], "n": numbers})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=8192)
    monkeypatch.setattr("pipelines.audit.dataset_stats.SAMPLED_ROWS", 50_000)
    found = [stats_of(str(tmp_path))["columns"][1] for _ in range(2)]
    assert found[0] == found[1]
    assert (found[0]["min"], found[0]["max"], found[0]["rows"]) == (0, 199_999, 200_000)
    assert found[0]["quantiles"]["0.5"] == pytest.approx(100_000, rel=0.05)


@pytest.mark.parametrize(
    ("counts", "entropy", "gini"), [([5, 5, 5], 1.0, 0.0), ([7], 1.0, 0.0), ([1, 99], 0.0808, 0.49)]
)
def test_balance__known_values(counts, entropy, gini):
    found = balance(counts)
    assert found["entropy"] == pytest.approx(entropy, abs=1e-3)
    assert found["gini"] == pytest.approx(gini, abs=1e-9)


def test_write_csv__one_figure_a_line(tmp_path):
    out = write_csv(stats_of(str(finished_run())), str(tmp_path / "stats.csv"))
    with open(out) as file:  # noqa: PTH123
        figures = dict(row for row in csv.reader(file))
    assert figures["rows_in"] == "30"
    assert figures["funnel.0.stage"] == "ingest"


def test_print_stats__json_and_tables(capsys):
    audit.stats(str(finished_run()), json=True)
    assert json.loads(capsys.readouterr().out)["recipe"] == "audited"
    audit.stats(str(finished_run()))
    shown = capsys.readouterr().out
    assert "near_duplicate" in shown
    assert "similarity" in shown
    audit.stats(str(finished_run()), by="format")
    assert "JPEG" in capsys.readouterr().out


def test_stats_of__languages_of_alternative_texts(tmp_path):
    texts = [
        "a red house at the edge of the forest",
        "ein rotes Haus steht am Rand des Waldes",
        "an old man is walking his dog in the park",
        "IMG 12",
        None,
        "",
    ]
    pq.write_table(pa.table({"id": list("uvwxyz"), "alt": texts}), tmp_path / "a.parquet")
    found = {row["language"]: row["rows_of_sample"] for row in stats_of(str(tmp_path))["languages"]}
    assert found == {"en": 2, "de": 1, "too short to tell": 1}
    assert stats_of(str(finished_run()))["languages"] == []
    with patch.dict(sys.modules, {"py3langid": None}):  # as without the extra
        (row,) = stats_of(str(tmp_path))["languages"]
    assert row["language"] == "not told: pip install 'lvd-curate[languages]'"
    assert (row["rows_of_sample"], row["share"]) == (4, 1.0)


def test_count_by_column__source_is_the_set_and_cluster_a_column():
    assert count_by_column(str(finished_run()), "source")[0] == {"value": "web", "rows": 14}
    assert sum(row["rows"] for row in count_by_column(str(finished_run()), "cluster")) == 17


def test_thresholds__are_those_that_each_score_of_a_stage_is_judged_by(tmp_path):
    settings = {"max_text": 0.12, "seeds": ["s"], "embeddings": "copy", "min_similarity": 0.25}
    record = StageRecord(
        stage="relevance",
        version=1,
        key="",
        settings=settings,
        outputs={},
        rows_in=1,
        rows_out=1,
        dropped={},
        seconds=1,
    )
    entry = StageEntry(stage="relevance", folder="r", record=record)
    stage = FinishedStage("pool", entry, str(tmp_path), {"pool": (0, 1)})
    assert thresholds(stage, "text_share") == [0.12]
    assert thresholds(stage, "seed_similarity") == [0.25]
