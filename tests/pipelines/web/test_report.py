import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from curation.errors import DatasetError
from curation.stages.blocklist import Blocklist
from curation.stages.leaks import Leaks
from curation.stages.near_dedup import NearDedup
from curation.stages.nsfw import Nsfw
from pipelines.audit.funnel import FunnelRow
from pipelines.audit.work_folder import WorkFolder
from pipelines.web import charts
from pipelines.web.pictures import MAX_SIDE, Pictures, thumbnail
from pipelines.web.rendering import percent, size
from pipelines.web.report.embedding_map import groups_of
from pipelines.web.report.page import planned_seconds, render, write_page
from tests.pipelines.audited_run import HOSTILE, copied_run, finished_run


class Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page():
    return render(WorkFolder(str(finished_run())))


def test_write_page__one_file_without_network(page, tmp_path):
    out = write_page(str(finished_run()), str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").stat().st_size < 15e6
    assert out.endswith("report.html")
    for tag, attributes in Tags(page).tags:
        for name in ("src", "href"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("data:image/jpeg;base64,", "#")), (tag, value)
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_render__is_the_same_every_time(page):
    assert render(WorkFolder(str(finished_run()))) == page


def test_render__foreign_text_is_shown_as_text(page):
    tags = Tags(page).tags
    assert not any("onerror" in attributes for _, attributes in tags)
    shown = [attributes["data-source"] for _, attributes in tags if "data-source" in attributes]
    assert HOSTILE in shown


def test_render__sections_and_reasons(page):
    ids = {attributes.get("id") for tag, attributes in Tags(page).tags if tag == "section"}
    assert ids >= {"funnel", "copies", "leaks", "retrieval", "filtered", "final", "scores", "map"}
    text = " ".join(Tags(page).text)
    for word in ("duplicate_bytes", "near_duplicate", "leak:bench", "truncated", "not_retrieved"):
        assert word in text
    assert "17" in text


def test_render__every_image_is_labeled_and_every_label_unique_target(page):
    tags = Tags(page).tags
    assert all("alt" in attributes for tag, attributes in tags if tag == "img")
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for tag, a in tags if tag == "a"}
    assert targets <= set(ids)


def test_render__facts_survive_the_attribute(page):
    facts = [json.loads(a["data-facts"]) for _, a in Tags(page).tags if "data-facts" in a]
    assert any("similarity" in one for one in facts)


def test_write_page__no_run(tmp_path):
    with pytest.raises(DatasetError, match=r"no run\.json"):
        write_page(str(tmp_path), str(tmp_path / "x.html"))


def test_render__losses_and_evaluation(tmp_path):
    work = copied_run(tmp_path)
    (work / "pretrain").mkdir()
    lines = [json.dumps({"step": n, "loss": 9 - n / 100, "ibot_loss": 2}) for n in range(900)]
    (work / "pretrain" / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 9')
    (work / "evaluate").mkdir()
    (work / "evaluate" / "_step.json").write_text('{"result": {"text": "k=10: <b>61 %</b>"}}')
    found = render(WorkFolder(str(work)))
    assert "k=10: &lt;b&gt;61 %&lt;/b&gt;" in found
    points = re.search(r'polyline class="line line-0" points="([^"]*)"', found)
    assert points is not None
    assert len(points.group(1).split()) == 400


def test_pictures__stages_say_what_is_veiled_and_what_hidden(monkeypatch):
    work = WorkFolder(str(finished_run()))
    pictures = Pictures(work)
    assert (Nsfw.shows_dropped, Blocklist.shows_dropped) == ("veiled", "hidden")
    stages = {"veiled": work.stage("pool", "near_dedup"), "hidden": work.stage("pool", "leaks")}
    monkeypatch.setattr(NearDedup, "shows_dropped", "veiled")
    monkeypatch.setattr(Leaks, "shows_dropped", "hidden")
    verdicts = {
        name: stage.decisions.read(["id", "keep"]).to_pylist() for name, stage in stages.items()
    }
    fallen = {name: next(r["id"] for r in rows if not r["keep"]) for name, rows in verdicts.items()}
    keys = {name: pictures.want("pool", one) for name, one in fallen.items()}
    pictures.load()
    assert pictures.get(keys["veiled"]).veiled
    assert pictures.get(keys["veiled"]).data
    assert pictures.get(keys["hidden"]).hidden
    assert not pictures.get(keys["hidden"]).data


def test_thumbnail__is_small_and_survives_rubbish():
    assert thumbnail(b"rubbish", []) == ("", 0, 0)
    work = WorkFolder(str(finished_run()))
    image = work.making("pool", "images").output("images").read(["image"])["image"][0].as_py()
    data, width, _ = thumbnail(image, [[0, 0, 40, 40]])
    assert width == 96 <= MAX_SIDE
    assert data.startswith("data:image/jpeg;base64,")
    assert data != thumbnail(image, [])[0]


def test_funnel_chart__tiny_shares_and_hostile_reasons():
    rows = [FunnelRow("pool", "<b>", 10**9, 0, {"<i>": 10**9 - 1}, 1)]
    chart = charts.funnel_chart(rows, 900)
    assert "<b>" not in chart
    assert "&lt;i&gt;" in chart
    assert charts.funnel_chart([], 900)


def test_histogram_chart__one_value_and_no_counts():
    chart = charts.histogram_chart(1.0, 1.0, [0, 0], [0, 0], [1.0], "x")
    assert "nan" not in chart


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0.0%"), (0.5, "50.0%"), (0.00012, "0.012%"), (1, "100.0%")]
)
def test_percent__small_shares_keep_digits(value, text):
    assert percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2e15, "2000.0 TB")]
)
def test_size__units(value, text):
    assert size(value) == text


def test_pictures__row_of_the_union_is_found_in_its_set():
    work = WorkFolder(str(finished_run()))
    pictures = Pictures(work)
    taken = next(r["id"] for r in work.manifest.read().to_pylist() if r["source_set"] == "taken")
    key = pictures.want("pool", taken)
    unknown = pictures.want("pool", "f" * 32)
    pictures.load()
    assert pictures.get(key).data
    assert pictures.get(key).flow == "taken"
    assert not pictures.get(unknown).data


def test_groups_of__numbers_the_fullest_first_and_counts_what_is_kept():
    rng = np.random.default_rng(0)
    centers = np.eye(3, 8)
    labels = np.repeat([0, 1, 2], [30, 60, 10])
    vectors = centers[labels] + rng.normal(0, 0.01, (100, 8))
    kept = labels != 1
    groups = groups_of(vectors.astype(np.float32), kept)
    assert sum(groups.before) == 100
    assert sum(groups.after) == 40
    assert groups.before == sorted(groups.before, reverse=True)
    fullest = groups.labels == 0
    assert len(set(labels[fullest])) == 1
    assert groups_of(vectors[:3], kept[:3]) is None


def test_planned_seconds__scale_with_the_rows_that_came(tmp_path):
    work = copied_run(tmp_path)
    plan = {"stages": [{"stage": "embed", "rows": 280, "wall_s": 10.0}]}
    (work / "plan.json").write_text(json.dumps(plan))
    folder = WorkFolder(str(work))
    rows = next(e.record.rows_in for e in folder.record.pool if e.stage == "embed")
    assert planned_seconds(folder) == {"embed": pytest.approx(10 * rows / 280)}
    text = render(folder)
    assert "planned</th>" in text


def test_render__failed_shards_are_shown_with_their_cause(monkeypatch):
    cause = "OSError: <b>disk</b>"
    failed = [{"flow": "pool", "stage": "embed", "shard": 7, "cause": cause}]
    monkeypatch.setattr("pipelines.audit.run_stats.failed_shards", lambda work: failed)
    text = render(WorkFolder(str(finished_run())))
    assert "Shards that failed, and were let go" in text
    assert "OSError: &lt;b&gt;disk&lt;/b&gt;" in text
    assert cause not in text
