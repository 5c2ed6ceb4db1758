import json

import pytest

from curation.errors import ConfigError
from pipelines.cli.pages import Calibrated, calibrate
from tests.pipelines.audited_run import finished_run


def test_print_truth__nsfw_has_none():
    with pytest.raises(ConfigError, match="judge a sample"):
        calibrate(Calibrated.nsfw, str(finished_run()), truth=5, json=True)


def test_print_figures__are_json(tmp_path, capsys):
    answers = str(tmp_path / "none.parquet")
    calibrate(Calibrated.dedup, str(finished_run()), 4, 5, answers, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["answered"] == 0
    assert found["curve"] == []
    assert found["removals"][-1]["removed"] == 0
