"""What a run is doing, or did last, from its event log."""

import time
from dataclasses import dataclass, field

from pydantic import JsonValue

from curation import storage
from curation.errors import DatasetError
from pipelines.operate.events import Event, read_log
from pipelines.operate.forecast import Forecast, share_done

_SILENT_S = 300.0
"""After so long without an event a run is taken for dead, or for busy with one long item."""


@dataclass
class Status:
    """State, stage, progress, time left and the stages that are done."""

    unreadable_events: int = 0
    """Damaged lines that were left out."""
    state: str = "running"
    recipe: str = ""
    began: float | None = None
    stage: str | None = None
    stage_began: float = 0.0
    total: int = 0
    """Shards of the stage."""
    done: int = 0
    done_before: int = 0
    """Shards that an earlier run had finished."""
    rows: int = 0
    rows_per_s: float | None = None
    step: str | None = None
    seconds: float | None = None
    """Of the whole run, once it has finished."""
    error: str | None = None
    silent_s: float = 0.0
    left_s: float | None = None
    times_planned: float | None = None
    stages: list[Event] = field(default_factory=list)
    """Those that are finished."""

    def finished_stages(self) -> list[dict[str, JsonValue]]:
        """What the event log says of each finished stage."""
        return [one.model_dump(exclude={"time", "event"}) for one in self.stages]

    def hear(self, event: Event, forecast: Forecast) -> None:
        """Take in one event."""
        match event.event:
            case "run_started":
                self.recipe, self.began = event.recipe, event.time
            case "stage_started":
                self.stage, self.stage_began, self.step = event.stage, event.time, None
                self.total, self.done, self.done_before = event.total, event.done, event.done
                self.rows = 0
            case "shard":
                self.done += 1
                self.rows += event.rows_in
                seconds = max(event.time - self.stage_began, 1e-3)
                self.rows_per_s = round(self.rows / seconds, 1)
            case "step":
                self.step = f"{event.step} {event.done}/{event.total}"
            case "stage_finished":
                self.stages.append(event)
                self.stage = None
                forecast.finished(event.stage, event.seconds)
            case "stage_reused":
                forecast.finished(event.stage, 0.0, reused=True)
            case "run_finished":
                self.state, self.seconds, self.stage = "finished", event.seconds, None
            case "run_failed":
                self.state, self.error = "failed", event.error


def status_of(work: str, now: float | None = None) -> Status:
    """What the last run in a work folder is doing.

    Raises:
        DatasetError: no run has left events there.
    """
    events, unreadable = read_log(work)
    if not events:
        found = "no run has left events there" if storage.exists(work) else "does not exist"
        found = f"none of the {unreadable} lines of its events can be read" if unreadable else found
        raise DatasetError(f"{work}: {found}; start one with `curate run RECIPE --work {work}`")
    now = time.time() if now is None else now
    status = Status(unreadable, stage_began=events[0].time)
    forecast = Forecast(events[0].planned)
    for event in events:
        status.hear(event, forecast)
    status.silent_s = round(now - events[-1].time, 1)
    if status.state == "running" and status.silent_s > _SILENT_S:
        status.state = "silent"
    if status.state == "running":
        # Of the whole run where it has a plan, else of its stage's shards.
        since_s = now - status.stage_began if status.stage else 0.0
        share = share_done(status.total, status.done_before, status.done) if status.stage else 0.0
        left_s = forecast.left_of_run(status.stage, since_s, share)
        if left_s is None and status.stage:
            left_s = forecast.left_of_step(status.stage, since_s, share)
        status.left_s = None if left_s is None else round(left_s, 1)
    if forecast.pace is not None:
        status.times_planned = round(forecast.pace, 3)
    return status
