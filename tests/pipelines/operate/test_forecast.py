import io

import pytest
from rich.console import Console

from curation.ledger import StageRecord
from pipelines.operate import console
from pipelines.operate.forecast import Forecast


def record(stage: str, seconds: float) -> StageRecord:
    return StageRecord(
        stage=stage,
        version=1,
        key="",
        settings={},
        rows_in=1,
        rows_out=1,
        dropped={},
        outputs={},
        seconds=seconds,
    )


def test_forecast__follows_the_pace_of_what_is_done():
    forecast = Forecast({"val/embed": 5.0, "a": 10.0, "b": 30.0, "c": 20.0})
    assert forecast.left_of_run(None, 0, 0) == 65
    forecast.finished("val/embed", 99.0, reused=True)  # says nothing of the pace
    assert forecast.pace is None
    forecast.finished("a", 20.0)
    assert forecast.pace == 2
    assert forecast.left_of_run("b", 10, 0) == 50 + 40  # b as planned, at this pace
    assert forecast.left_of_run("b", 10, 0.5) == 10 + 40  # by its own shards
    assert forecast.left_of_step("b", 500, 0) == 0
    forecast.finished("unplanned", 7.0)
    assert forecast.pace == 2


def test_forecast__without_a_plan_knows_the_step_alone():
    forecast = Forecast()
    assert forecast.left_of_run("a", 5, 0.5) is None
    assert forecast.left_of_step("a", 5, 0.25) == 15
    assert forecast.left_of_step("a", 5, 0) is None


@pytest.mark.parametrize("terminal", [True, False])
def test_console__compares_the_run_with_its_plan(monkeypatch, terminal):
    out = io.StringIO()

    def on(stderr: bool, **options: bool) -> Console:
        return Console(file=out, force_terminal=terminal, width=150, **options)

    monkeypatch.setattr(console, "Console", on)
    watcher = console.ConsoleWatcher(planned={"a": 10.0, "b": 7200.0})
    watcher.started("a", 0, 0)
    watcher.finished("a", record("a", 20.0), False)
    assert "20.0 s (planned 10.0 s)" in out.getvalue()
    watcher.started("b", 4, 0)
    assert watcher.time_left() == "4:00:00 left, 4:00:00 of the run, 2.00 times the plan"
    if terminal:
        watcher._bars.refresh()
        assert "2.00 times the plan" in out.getvalue()
    watcher.finished("b", record("b", 1.0), False)
    assert watcher.time_left() == ""


def test_console__without_a_plan_says_what_it_did_before(capsys):
    watcher = console.ConsoleWatcher()
    watcher.started("a", 2, 0)
    assert watcher.time_left() == ""
    watcher.finished("a", record("a", 1.0), False)
    assert "planned" not in capsys.readouterr().err
