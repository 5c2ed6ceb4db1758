"""The documentation as a site: every link leads somewhere, nothing is loaded from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from curation.registry import stage_names

ROOT = Path(__file__).resolve().parents[1]


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
