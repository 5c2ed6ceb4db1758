"""The event log of a run: JSON lines in WORK/events, which `curate status` reads from anywhere.

A file a run: on a file system lines are appended, on an object store the file is written anew now
and then. Nothing leaves the work folder.
"""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from curation import storage
from curation.ledger import Receipt, StageRecord
from curation.stage import DEVICE_BUSY_S, Engine
from pipelines.engines.metered_engine import Usage
from pipelines.operate.disk_budget import DiskBudget
from pipelines.run.stage_runner import Watcher

EVENTS = "events"
_SECONDS_BETWEEN_STEPS = 1.0
_SECONDS_BETWEEN_UPLOADS = 15.0


_IDLE = ("run_started", "stage_reused", "run_finished")
"""Events of a run that finds everything done: it leaves no file."""


class EventLog:
    """Writes events, each a line of JSON with its time, once there is any work."""

    def __init__(self, work: str) -> None:
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}.jsonl"
        self._path = storage.join(work, EVENTS, name)
        self._lines: list[str] = []
        self._uploaded = float("-inf")
        self._idle = True

    def write(self, event: str, **values: Any) -> None:
        """Write one event."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values}) + "\n"
        self._lines.append(line)
        self._idle = self._idle and event in _IDLE
        if self._idle:
            return
        if storage.is_local(self._path):
            storage.make_folder(self._path.rpartition("/")[0])
            file = Path(self._path.removeprefix("file://"))
            with storage.storage_errors(self._path), file.open("a") as log:
                log.write("".join(self._lines))
            self._lines.clear()
            return
        last = event.startswith("run_")
        if last or time.monotonic() - self._uploaded > _SECONDS_BETWEEN_UPLOADS:
            storage.write_bytes(self._path, "".join(self._lines).encode())
            self._uploaded = time.monotonic()


class RunObserver:
    """A watcher that logs what happens, checks the disk, and tells another watcher.

    It is also what a `MeteredEngine` tells of every item (`heard`).
    """

    def __init__(
        self,
        log: EventLog,
        watcher: Watcher,
        engine: Engine,
        planned: dict[str, float],
        budget: DiskBudget | None = None,
    ) -> None:
        """planned: seconds of each stage."""
        self._log, self._watcher, self._engine = log, watcher, engine
        self._planned, self._budget = planned, budget
        self._spoke = time.monotonic()
        self._bytes = 0
        self._device_s = 0.0
        self._usage = Usage()
        self._step, self._step_done = "", 0

    def started(self, stage: str, total: int, done: int) -> None:
        """A stage begins."""
        if self._budget is not None:
            self._budget.check()
        self._bytes = 0
        self._device_s = 0.0
        planned = {"planned_s": self._planned[stage]} if stage in self._planned else {}
        self._log.write("stage_started", stage=stage, total=total, done=done, **planned)
        self._watcher.started(stage, total, done)

    def advanced(self, stage: str, receipt: Receipt) -> None:
        """A shard is finished."""
        num_bytes = sum(info.num_bytes for info in receipt.outputs.values())
        self._bytes += num_bytes
        self._device_s += receipt.counters.get(DEVICE_BUSY_S, 0.0)
        self._log.write(
            "shard",
            stage=stage,
            shard=receipt.index,
            rows_in=receipt.rows_in,
            rows_out=receipt.rows_out,
            bytes=num_bytes,
            **({"failure": receipt.failure} if receipt.failure else {}),
        )
        self._watcher.advanced(stage, receipt)

    def finished(self, stage: str, record: StageRecord, reused: bool) -> None:
        """A stage is committed, or was found so."""
        usage, self._usage = self._usage, Usage()
        if reused:
            self._log.write("stage_reused", stage=stage, rows=record.rows_in)
        else:
            summary = self._summary(record, usage)
            if stage in self._planned:
                summary["planned_s"] = round(self._planned[stage], 3)
            self._log.write("stage_finished", stage=stage, **summary)
        self._watcher.finished(stage, record, reused)

    def _summary(self, record: StageRecord, usage: Usage) -> dict[str, float]:
        seconds = max(record.seconds, 1e-3)
        workers = self._engine.workers if usage.items else 1
        device = {}
        if self._device_s:
            device["device_busy_share"] = _share(self._device_s, usage.item_s)
        return {
            "seconds": record.seconds,
            "rows_in": record.rows_in,
            "rows_out": record.rows_out,
            "rows_per_s": round(record.rows_in / seconds, 1),
            "bytes_per_s": round(self._bytes / seconds),
            "workers": workers,
            "busy_share": _share(usage.item_s, seconds * workers),
            **device,
            **{name: _rounded(value) for name, value in asdict(usage).items()},
        }

    def heard(self, label: str, total: int, usage: Usage) -> None:
        """An item of a step is done: of a stage's shards, or of a step inside a stage."""
        self._usage.add(usage)
        if label != self._step:
            self._step, self._step_done = label, 0
        self._step_done += usage.items
        now = time.monotonic()
        if now - self._spoke < _SECONDS_BETWEEN_STEPS:
            return
        self._spoke = now
        if self._budget is not None:
            self._budget.check()
        self._log.write("step", step=label, done=self._step_done, total=total)


class Event(BaseModel):
    """What readers rely on: of these types where it is there, and so there always."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    time: float
    event: str
    recipe: str = ""
    planned: dict[str, float] = {}
    stage: str = ""
    step: str = ""
    total: int = 0
    done: int = 0
    rows_in: int = 0
    seconds: float = 0.0
    error: str = ""


def read_events(work: str) -> list[Event]:
    """Events of the last run in a work folder, in order; none where there was none."""
    return read_log(work)[0]


def read_log(work: str) -> tuple[list[Event], int]:
    """Events of the last run in a work folder, and how many damaged lines were left out."""
    folder = storage.join(work, EVENTS)
    names = storage.list_files(folder, ".jsonl")
    if not names:
        return [], 0
    *lines, last = storage.read_bytes(storage.join(folder, names[-1])).split(b"\n")
    events = [_parsed(line) for line in lines]
    events += [_parsed(last)] if last else []
    read = [event for event in events if event is not None]
    unfinished = bool(last) and events[-1] is None  # is being written right now
    return read, len(events) - len(read) - unfinished


def _parsed(line: bytes) -> Event | None:
    """One event; None for what is none."""
    try:
        return Event.model_validate_json(line)
    except ValidationError:
        return None


def _share(part: float, whole: float) -> float:
    return round(part / max(whole, 1e-9), 3)


def _rounded(value: float) -> float:
    return round(value, 3) if isinstance(value, float) else value
