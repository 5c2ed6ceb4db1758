import re
from pathlib import Path

import pyarrow as pa
import pytest

from curation.errors import ConfigError, DatasetError
from pipelines.audit.sql import ask, views_of
from pipelines.cli import audit
from tests.pipelines.audited_run import finished_run

DOCS = Path(__file__).parents[3] / "docs" / "auditing.md"
QUESTIONS = re.findall(r"```sql\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)


def answer(query, limit=1000):
    return ask(str(finished_run()), query, limit).rows


@pytest.mark.parametrize("number", range(len(QUESTIONS)))
def test_ask__every_question_of_the_docs(number):
    has_fetches = "fetches" in views_of(str(finished_run()))
    if "fetches" in QUESTIONS[number] and not has_fetches:
        pytest.skip("these images were not downloaded")
    assert len(QUESTIONS) == 10
    assert answer(QUESTIONS[number])


def test_ask__accounts_add_up():
    assert all(row["missing"] == 0 for row in answer(QUESTIONS[8]))
    shares = answer(QUESTIONS[6])
    assert sum(row["n"] for row in shares) == 17


def test_ask__limit_says_that_there_is_more():
    found = ask(str(finished_run()), "select * from decisions", 3)
    assert len(found.rows) == 3
    assert found.more


@pytest.mark.parametrize(
    "query",
    [
        "",
        "drop view rows",
        "select 1; select 2",
        "copy (select 1) to 'x.csv'",
        "attach 'x.db'",
        "install httpfs",
        "selec 1",
    ],
)
def test_ask__only_one_select(query, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="curate sql"):
        ask(str(finished_run()), query, 10)
    assert not list(tmp_path.iterdir())


def test_ask__duckdb_refusals_are_one_line():
    with pytest.raises(DatasetError, match="query failed") as error:
        answer("select nope from manifest")
    assert "\n" not in str(error.value)


OUTSIDE = [
    "select * from read_text('FILE')",
    "from 'FILE'",
    "from read_csv('FILE')",
    "from sniff_csv('FILE')",
    "from glob('/*')",
    "from read_text('WORK/../outside.csv')",
    "from read_csv('https://127.0.0.1:1/x.csv')",
    "from read_parquet('s3://bucket/x.parquet')",
    "from duckdb_secrets()",
]


@pytest.mark.parametrize("query", OUTSIDE)
def test_ask__reads_nothing_outside_the_work_folder(query, tmp_path):
    outside = tmp_path / "outside.csv"
    outside.write_text("secret\n1\n")
    query = query.replace("FILE", str(outside)).replace("WORK", str(finished_run()))
    with pytest.raises(ConfigError, match="--allow-files lets it read more"):
        answer(query)


def test_ask__sees_no_variable_of_the_program():
    rows_here = pa.table({"a": [1]})
    with pytest.raises(DatasetError, match="rows_here does not exist"):
        ask(str(finished_run()), "from rows_here", rows_here.num_rows)


def test_ask__allow_files_reads_others(tmp_path):
    outside = tmp_path / "outside.csv"
    outside.write_text("n\n7\n")
    query = f"select n, (select count(*) from manifest) as m from '{outside}'"
    assert ask(str(finished_run()), query, 10, allow_files=True).rows == [{"n": 7, "m": 17}]


def test_ask__a_big_sort_spills_all_the_same():
    query = "select count(distinct hash(i)) as n from range(3000000) t(i)"
    assert answer(query) == [{"n": 3_000_000}]


def test_sql__views_and_rows(capsys):
    audit.sql(str(finished_run()))
    assert "decisions" in capsys.readouterr().out
    audit.sql(str(finished_run()), "select image from images", 1)
    assert "bytes" in capsys.readouterr().out
