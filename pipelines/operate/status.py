"""What a run is doing, or did last, from its event log."""

import time
from typing import Any

from curation import storage
from curation.errors import DatasetError
from pipelines.operate.events import read_log
from pipelines.operate.forecast import Forecast, share_done

_SILENT_S = 300.0
"""After so long without an event a run is taken for dead, or for busy with one long item."""


def status_of(work: str, now: float | None = None) -> dict[str, Any]:
    """State, stage, progress, time left and the stages that are done.

    Raises:
        DatasetError: no run has left events there.
    """
    events, unreadable = read_log(work)
    if not events:
        found = "no run has left events there" if storage.exists(work) else "does not exist"
        found = f"none of the {unreadable} lines of its events can be read" if unreadable else found
        raise DatasetError(f"{work}: {found}; start one with `curate run RECIPE --work {work}`")
    now = time.time() if now is None else now
    status: dict[str, Any] = {"state": "running", "stages": [], "unreadable_events": unreadable}
    status |= {"total": 0, "done": 0, "done_before": 0, "rows": 0, "stage_began": events[0]["time"]}
    status["forecast"] = forecast = Forecast(events[0].get("planned"))
    for event in events:
        _HANDLERS.get(event["event"], _ignore)(status, event)
    status["silent_s"] = round(now - events[-1]["time"], 1)
    if status["state"] == "running" and status["silent_s"] > _SILENT_S:
        status["state"] = "silent"
    if status["state"] == "running":
        status["left_s"] = _left_s(status, forecast, now)
    if forecast.pace is not None:
        status["times_planned"] = round(forecast.pace, 3)
    del status["forecast"]
    return status


def _run_started(status: dict[str, Any], event: dict[str, Any]) -> None:
    status |= {"recipe": event["recipe"], "began": event["time"]}


def _stage_started(status: dict[str, Any], event: dict[str, Any]) -> None:
    status |= {"stage": event["stage"], "total": event["total"], "done": event["done"]}
    status |= {"step": None, "stage_began": event["time"], "rows": 0, "done_before": event["done"]}


def _shard(status: dict[str, Any], event: dict[str, Any]) -> None:
    status["done"] += 1
    status["rows"] += event["rows_in"]
    seconds = max(event["time"] - status["stage_began"], 1e-3)
    status["rows_per_s"] = round(status["rows"] / seconds, 1)


def _step(status: dict[str, Any], event: dict[str, Any]) -> None:
    status["step"] = f"{event['step']} {event['done']}/{event['total']}"


def _stage_finished(status: dict[str, Any], event: dict[str, Any]) -> None:
    status["stages"].append({k: v for k, v in event.items() if k not in ("time", "event")})
    status["stage"] = None
    status["forecast"].finished(event["stage"], event["seconds"])


def _stage_reused(status: dict[str, Any], event: dict[str, Any]) -> None:
    status["forecast"].finished(event["stage"], 0.0, reused=True)


def _run_finished(status: dict[str, Any], event: dict[str, Any]) -> None:
    status |= {"state": "finished", "seconds": event["seconds"], "stage": None}


def _run_failed(status: dict[str, Any], event: dict[str, Any]) -> None:
    status |= {"state": "failed", "error": event["error"]}


def _ignore(status: dict[str, Any], event: dict[str, Any]) -> None:
    pass


_HANDLERS = {
    "run_started": _run_started,
    "stage_started": _stage_started,
    "shard": _shard,
    "step": _step,
    "stage_finished": _stage_finished,
    "stage_reused": _stage_reused,
    "run_finished": _run_finished,
    "run_failed": _run_failed,
}


def _left_s(status: dict[str, Any], forecast: Forecast, now: float) -> float | None:
    """Seconds left of the whole run where it has a plan, else of its stage's shards."""
    stage = status.get("stage")
    since_s, share = 0.0, 0.0
    if stage:
        since_s = now - status["stage_began"]
        share = share_done(status["total"], status["done_before"], status["done"])
    left_s = forecast.left_of_run(stage, since_s, share)
    if left_s is None and stage:
        left_s = forecast.left_of_step(stage, since_s, share)
    return None if left_s is None else round(left_s, 1)
