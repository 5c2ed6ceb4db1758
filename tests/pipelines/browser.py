"""A headless Chromium for tests: Debian's, driven by Playwright, with no profile of its own."""

import contextlib
import shutil
from collections.abc import Iterator
from importlib.resources import files

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium"
)


@contextlib.contextmanager
def opened_browser() -> Iterator[object]:
    """A browser while the block runs."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=list(_ARGUMENTS)
        )
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened_page(browser, **options):
    """A page that must not complain: its errors fail the test at the end of the block."""
    # axe-core is injected, which the pages' own policy would rightly forbid
    context = browser.new_context(**options)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda one: complaints.append(one.text) if one.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    try:
        yield page
        assert complaints == []
    finally:
        context.close()


def serious_barriers(browser, address: str, **options) -> list[list[str]]:
    """What axe-core finds on a page and calls serious or critical."""
    with opened_page(browser, bypass_csp=True, **options) as page:
        page.goto(address)
        page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8"))
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        [one["id"], one["impact"], one["nodes"][0]["html"][:200]]
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
