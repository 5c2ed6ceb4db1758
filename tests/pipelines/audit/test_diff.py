import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from curation.errors import DatasetError
from pipelines.audit.diff import diff
from pipelines.cli import audit
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.recipe import load_recipe
from pipelines.run.runner import RecipeRun
from pipelines.run.stage_runner import Silent
from tests.pipelines.audited_run import RECIPE, TinyEncoder, finished_run


@pytest.fixture(scope="module")
def stricter(tmp_path_factory) -> Path:
    """The same images under another recipe: fewer hits a seed, one image gone."""
    work = tmp_path_factory.mktemp("other") / "run"
    work.mkdir()
    for name in ("images", "sets"):
        shutil.copytree(finished_run() / name, work / name)
    (work / "images" / "05.jpg").unlink()
    (work / "recipe.yaml").write_text(RECIPE.replace("k: 6", "k: 3"))
    checked = load_recipe(str(work / "recipe.yaml"), {"work": str(work)})
    with patch("curation.stages.embed._load", lambda *_: TinyEncoder()):
        RecipeRun(checked, str(work), LocalEngine(), Silent()).run()
    return work


def test_diff__run_with_itself_is_the_same():
    found = diff(str(finished_run()), str(finished_run()))
    assert found["same"]
    assert (found["stayed"], found["changed"], found["left"], found["came"]) == (17, 0, [], [])
    assert found["settings"] == found["stages"] == []


def test_diff__says_what_left_and_why(stricter):
    found = diff(str(finished_run()), str(stricter))
    assert not found["same"]
    changed = {(row["stage"], row["setting"]) for row in found["settings"]}
    assert ("retrieve", "seeds") in changed
    why = {(row["stage"], row["reason"]): row["rows"] for row in found["left"]}
    assert why["retrieve", "not_retrieved"] > 0
    left, came = (sum(row["rows"] for row in found[name]) for name in ("left", "came"))
    assert found["stayed"] + left == found["rows"][0]
    assert found["stayed"] + came == found["rows"][1]
    assert all(len(example) == 32 for row in found["left"] for example in row["examples"])


def test_diff__the_other_way_round_mirrors(stricter):
    forth, back = diff(str(finished_run()), str(stricter)), diff(str(stricter), str(finished_run()))
    assert sum(r["rows"] for r in forth["left"]) == sum(r["rows"] for r in back["came"])
    assert forth["stayed"] == back["stayed"]


def test_diff__no_run(tmp_path):
    with pytest.raises(DatasetError, match=r"no run\.json"):
        diff(str(finished_run()), str(tmp_path))


def test_print_diff__tables_and_json(stricter, capsys):
    audit.diff(str(finished_run()), str(stricter))
    assert "not_retrieved" in capsys.readouterr().out
    audit.diff(str(finished_run()), str(finished_run()), json=True)
    assert json.loads(capsys.readouterr().out)["same"]
