"""What a run is doing, or did last, from its event log."""

import time
from typing import Any

from curation import storage
from curation.errors import DatasetError
from pipelines.events import read_events

_SILENT_S = 300.0
"""After so long without an event a run is taken for dead, or for busy with one long item."""


def status_of(work: str, now: float | None = None) -> dict[str, Any]:
    """State, stage, progress, time left and the stages that are done.

    Raises:
        DatasetError: no run has left events there.
    """
    events = read_events(work)
    if not events:
        found = "no run has left events there" if storage.exists(work) else "does not exist"
        raise DatasetError(f"{work}: {found}; start one with `curate run RECIPE --work {work}`")
    now = time.time() if now is None else now
    status: dict[str, Any] = {"state": "running", "stages": []}
    for event in events:
        _HANDLERS.get(event["event"], _ignore)(status, event)
    status["silent_s"] = round(now - events[-1]["time"], 1)
    if status["state"] == "running" and status["silent_s"] > _SILENT_S:
        status["state"] = "silent"
    if status["state"] == "running":
        status["left_s"] = _left_s(status, now)
    status.pop("planned", None)
    return status


def _run_started(status: dict[str, Any], event: dict[str, Any]) -> None:
    status |= {"recipe": event["recipe"], "began": event["time"]}
    status["planned"] = event.get("planned") or {}


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
    "run_finished": _run_finished,
    "run_failed": _run_failed,
}


def _left_s(status: dict[str, Any], now: float) -> float | None:
    """Seconds left: of the whole run by its plan, at the pace so far; else of this stage's shards.

    None where nothing is known.
    """
    planned: dict[str, float] = status.get("planned") or {}
    in_stage = now - status["stage_began"] if status.get("stage") else 0.0
    if planned:
        over = [stage for stage in status["stages"] if stage["stage"] in planned]
        expected = sum(planned[stage["stage"]] for stage in over)
        pace = sum(stage["seconds"] for stage in over) / expected if expected else 1.0
        behind = {stage["stage"] for stage in over}
        ahead = sum(seconds for stage, seconds in planned.items() if stage not in behind)
        return round(max(0.0, ahead * pace - in_stage), 1)
    done: int = status.get("done", 0) - status.get("done_before", 0)
    if not status.get("stage") or not status["total"] or not done:
        return None
    remaining: int = status["total"] - status["done"]
    return round(in_stage / done * remaining, 1)
