"""The report and the server in a real browser: no complaint, and everything does what it says."""

import pytest

from curation.stages.near_dedup import NearDedup
from pipelines.audit.work_folder import WorkFolder
from pipelines.web.report.page import render
from tests.pipelines.audited_run import finished_run
from tests.pipelines.browser import (
    needs_chromium,
    opened_browser,
    opened_page,
    serious_barriers,
)
from tests.pipelines.served_run import served

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser():
    with opened_browser() as one:
        yield one


@pytest.fixture(scope="module")
def site():
    with served() as one:
        yield one


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of the audited run, whose near duplicates pass for what NSFW dropped."""
    work = WorkFolder(str(finished_run()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NearDedup, "shows_dropped", "veiled")
        text = render(work)
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(text)
    return file.as_uri()


def test_report__gallery_opens_walks_and_closes_by_keyboard(browser, report):
    with opened_page(browser) as page:
        page.goto(report)
        page.locator(".look:not(.veiled)").first.focus()
        page.keyboard.press("Enter")
        viewer = page.locator("#viewer")
        assert viewer.is_visible()
        first = viewer.locator("dd").first.inner_text()
        assert len(first) == 32
        page.keyboard.press("ArrowRight")
        assert viewer.locator("dd").first.inner_text() != first
        page.keyboard.press("ArrowLeft")
        assert viewer.locator("dd").first.inner_text() == first
        page.keyboard.press("Escape")
        assert not viewer.is_visible()


def test_report__search_and_filter(browser, report):
    with opened_page(browser) as page:
        page.goto(report)
        page.keyboard.press("/")
        page.keyboard.type("dropped leak.jpg")
        assert page.locator("#found").inner_text() == "2 images"
        shown = page.locator(".group:visible")
        assert shown.count() == 1
        page.locator("#search").fill("")
        page.locator("#part").select_option("copies")
        assert not page.locator("#leaks").is_visible()
        assert page.locator("#copies").is_visible()


def test_report__nsfw_stays_blurred_until_clicked(browser, report):
    with opened_page(browser) as page:
        page.goto(report)
        veiled = page.locator(".look.veiled").first
        blur = "one => getComputedStyle(one.querySelector('img')).filter"
        assert "blur(22px)" in veiled.evaluate(blur)
        page.locator(".look:not(.veiled)").first.click()
        for _ in range(5):  # walking through the viewer never shows one
            page.keyboard.press("ArrowRight")
            source = page.locator("#viewer img").get_attribute("src")
            assert page.locator(f'.look.veiled img[src="{source}"]').count() == 0
        page.keyboard.press("Escape")
        handle = veiled.element_handle()
        handle.click()
        assert handle.evaluate(blur) == "none"


def test_report__map_shows_a_picture_under_the_pointer(browser, report):
    with opened_page(browser, viewport={"width": 1200, "height": 900}) as page:
        page.goto(report)
        page.locator("#map").scroll_into_view_if_needed()
        known = page.locator("#map-pictures img").first.get_attribute("data-id")
        dot = page.locator(f'.map .dot[data-id="{known}"] > :not(title)')
        dot.dispatch_event("pointermove")
        assert page.locator("#hover img").is_visible()
        page.locator(".map-card").dispatch_event("pointerleave")
        assert not page.locator("#hover").is_visible()


def test_report__themes_and_a_phone(browser, report):
    with opened_page(browser, viewport={"width": 375, "height": 700}) as page:
        page.goto(report)
        ground = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(ground)
        page.locator("#theme").click()
        assert page.evaluate(ground) != light
        assert page.evaluate("document.documentElement.scrollWidth") <= 375


PAGES = (
    "/",
    "/images",
    "/images?view=table",
    "/components",
    "/leaks",
    "/retrieval",
    "/retrieval/0",
)


def test_server__pages_open_without_complaint_and_fit_a_phone(browser, site):
    with opened_page(browser, viewport={"width": 375, "height": 700}) as page:
        for path in PAGES:
            page.goto(site.url + path)
            assert page.evaluate("document.documentElement.scrollWidth") <= 375, path


def test_server__filters_lead_to_rows_and_rows_to_lives(browser, site):
    with opened_page(browser) as page:
        page.goto(site.url + "/images")
        page.locator("select[name=reason]").select_option("leak:bench")
        page.locator("button.go").click()
        assert page.locator("#total").inner_text() == "1 rows"
        page.locator(".why a").click()
        assert page.locator("h1").inner_text().lower() == "dropped by leaks: leak:bench"
        assert page.locator(".role", has_text="in bench").count() == 0
        assert page.locator("table").first.locator("tr").count() == 8


def test_server__pages_follow_each_other(browser, site):
    with opened_page(browser) as page:
        page.goto(site.url + "/images?limit=15&score=quality.sharpness&order=highest")
        total = page.locator("#total").inner_text()
        seen = []
        while True:
            seen += page.locator(".wall code").all_inner_texts()
            if not page.locator("a[rel=next]").count():
                break
            with page.expect_navigation():
                page.locator("a[rel=next]").click()
        assert len(seen) == len(set(seen)) == int(total.split()[0]) > 15


def test_server__viewer_and_veil(browser, site):
    with opened_page(browser) as page:
        page.goto(site.url + "/images?limit=200")
        veiled = page.locator(f'.look[data-id="{site.veiled}"]')
        blots = "one => one.querySelector('img').naturalWidth"
        veiled.scroll_into_view_if_needed()
        page.wait_for_load_state("networkidle")
        assert veiled.evaluate(blots) <= 8
        veiled.click()
        page.wait_for_function(
            "id => document.querySelector(`.look[data-id='${id}'] img`).naturalWidth === 96",
            arg=site.veiled,
        )
        assert not page.locator("#viewer").is_visible()
        veiled.click()
        assert page.locator("#viewer .life a").is_visible()
        assert page.locator(f'[data-id="{site.hidden}"]').count() == 0
        assert "never shown" in page.locator(".wall").inner_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_report__has_no_serious_barrier(browser, report, theme):
    assert serious_barriers(browser, report, color_scheme=theme) == []


@pytest.mark.parametrize("theme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_server__has_no_serious_barrier(browser, site, theme):
    life = f"/images/pool/{site.veiled}"
    for path in (*PAGES, life):
        assert serious_barriers(browser, site.url + path, color_scheme=theme) == [], path
