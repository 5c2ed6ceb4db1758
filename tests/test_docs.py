"""The documentation as a site: every link leads somewhere, nothing is loaded from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from curation.registry import stage_names

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = ("embedder", "curation", "pretrain", "pipelines", "configs", "docs")
BRITISH = re.compile(
    r"neighbour|normalis|licence|colour|behaviour|favour|centre[ds]?\b|metres?\b|labelled|judgement"
    r"|recognis|generalis|optimis(?!t)|summaris|quantis|minimis|canonicalis|artefact|\bgrey",
    re.IGNORECASE,
)
STILL_READ = ('"licence"', "`licence`", "aria-labelledby", '"--licence"', '"--judgements"')
"""Old names in files and commands, and the one of HTML."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_site__has_every_stage_and_public_name(site):
    stages = (site / "stages" / "index.html").read_text()
    assert all(f'id="{name}"' in stages for name in stage_names())
    names = (site / "api" / "index.html").read_text()
    for name in ("curation.dataset.Dataset.open", "embedder.encoder.load_encoder"):
        assert f'id="{name}"' in names


def test_site__loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        assert not re.search(r"""<(?:script|img)[^>]+src=["']?https?:""", page.read_text()), page
        assert not re.search(r"""<link[^>]+stylesheet[^>]+https?:""", page.read_text()), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page__has_short_lines(page):
    is_code = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        is_code ^= line.startswith("```")
        assert is_code or line.startswith("|") or len(line) < 120, f"{page.name}:{number}"


def test_spelling__is_american():
    files = [file for name in PACKAGES for file in (ROOT / name).rglob("*") if file.is_file()]
    for file in files:
        if file.suffix in {".py", ".md", ".yaml", ".j2"}:
            for number, line in enumerate(file.read_text().splitlines(), 1):
                is_old_name = any(name in line for name in STILL_READ)
                assert is_old_name or not BRITISH.search(line), f"{file}:{number}: {line.strip()}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page__names_files_that_are_there(page):
    named = re.findall(
        r"`((?:curation|configs|embedder|pretrain|pipelines|tests)/[\w/]+\.\w+)`", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).is_file()] == []
