"""The terminal: the one place that configures logging, draws bars and prints tables."""

import json
import logging
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from curation.ledger import Receipt, StageRecord
from pipelines.forecast import Forecast, share_done
from pipelines.funnel import FunnelRow

_SECONDS_BETWEEN_LINES = 60.0


def set_up_logging(verbose: bool) -> None:
    """Send our warnings and progress (or everything) to stderr, one line each."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("curation.progress").setLevel(logging.INFO)


class ConsoleWatcher:
    """Draws the progress of stages: bars on a terminal, else about a line a minute.

    With a plan it compares each stage with it, and tells the time left of the whole run.
    """

    def __init__(self, *, quiet: bool = False, planned: Mapping[str, float] | None = None) -> None:
        """planned: seconds by stage."""
        self._console = Console(stderr=True)
        self._quiet = quiet
        self._forecast = Forecast(planned)
        self._stage = ""
        self._bars: Progress | None = None
        self._bar: Any = None
        self._began = self._spoke = time.monotonic()
        self._total = self._before = self._done = self._rows = self._kept = 0
        self.num_run = 0

    def started(self, stage: str, total: int, done: int) -> None:
        """Begin a bar."""
        self._stage = stage
        self._began = self._spoke = time.monotonic()
        self._total, self._before, self._done = total, done, done
        self._rows = self._kept = 0
        if self._quiet or not self._console.is_terminal:
            return
        self._bars = Progress(
            TextColumn("{task.description:>14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            _TimeLeft(self),
            console=self._console,
            transient=True,
        )
        self._bar = self._bars.add_task(stage, total=total or None, completed=done, rate="")
        self._bars.start()

    def advanced(self, stage: str, receipt: Receipt) -> None:
        """Move the bar, or say a line if a minute has passed."""
        self._done += 1
        self._rows += receipt.rows_in
        self._kept += receipt.rows_out
        if self._bars is not None:
            self._bars.update(self._bar, completed=self._done, rate=self._rate())
        elif not self._quiet and time.monotonic() - self._spoke > _SECONDS_BETWEEN_LINES:
            self._spoke = time.monotonic()
            self._console.print(self._line(stage), highlight=False)

    def finished(self, stage: str, record: StageRecord, reused: bool) -> None:
        """End the bar with one line on what the stage did."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        self.num_run += not reused
        planned_s = self._forecast.planned_s(stage)
        self._forecast.finished(stage, record.seconds, reused=reused)
        if self._quiet:
            return
        state = "done before" if reused else f"{record.seconds:.1f} s"
        if planned_s is not None and not reused:
            state += f" (planned {planned_s:.1f} s)"
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in record.dropped.items())
        kept = f"{record.rows_in:>8,} in {record.rows_out:>8,} out"
        self._console.print(f"{stage:>22}  {kept}  {state:>11}  {dropped}", highlight=False)

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-3)
        kept = self._kept / max(self._rows, 1)
        return f"{self._rows / seconds:,.0f} rows/s, {kept:.1%} kept"

    def _line(self, stage: str) -> str:
        progress = f"{self._done}/{self._total} shards, {self._rate()}"
        return f"{stage}: {progress}, {self.time_left()}".rstrip(", ")

    def time_left(self) -> str:
        """Time left of the stage and, where there is a plan, of the run; empty if unknown."""
        since_s = time.monotonic() - self._began
        share = share_done(self._total, self._before, self._done)
        of_stage = self._forecast.left_of_step(self._stage, since_s, share)
        of_run = self._forecast.left_of_run(self._stage, since_s, share)
        pace = self._forecast.pace
        parts = [
            "" if of_stage is None else f"{_duration(of_stage)} left",
            "" if of_run is None else f"{_duration(of_run)} of the run",
            "" if pace is None or of_run is None else f"{pace:.2f} times the plan",
        ]
        return ", ".join(part for part in parts if part)


class _TimeLeft(ProgressColumn):
    """Shows a watcher's `time_left`, drawn anew as time goes."""

    def __init__(self, watcher: ConsoleWatcher) -> None:
        super().__init__()
        self._watcher = watcher

    def render(self, task: Task) -> Text:
        """Say what is left now."""
        return Text(self._watcher.time_left())


def _duration(seconds: float) -> str:
    """90 s as 0:01:30."""
    return str(timedelta(seconds=round(seconds)))


class TrainingWatcher:
    """Shows the losses of a training run: a bar on a terminal, else about a line a minute."""

    def __init__(self, total_steps: int, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True)
        self._total = total_steps
        self._spoke = float("-inf")
        self._quiet = quiet
        self._bars = Progress(
            TextColumn("{task.description:>14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._bar = self._bars.add_task("pretrain", total=total_steps, losses="")
        if self._console.is_terminal and not quiet:
            self._bars.start()

    def __call__(self, record: dict[str, Any]) -> None:
        """Show one logged step."""
        shown = [
            f"{name} {record[name]:.3f}" for name in ("loss", "dino", "ibot") if name in record
        ]
        losses = ", ".join(shown)
        self._bars.update(self._bar, completed=record["step"], losses=losses)
        if self._quiet or self._console.is_terminal:
            return
        if time.monotonic() - self._spoke > _SECONDS_BETWEEN_LINES:
            self._spoke = time.monotonic()
            line = f"pretrain: step {record['step']}/{self._total}, {losses}"
            self._console.print(line, highlight=False)

    def close(self) -> None:
        """Take the bar away."""
        self._bars.stop()


def print_funnel(rows: list[FunnelRow], *, title: str) -> None:
    """Print the funnel as a table."""
    table = Table(title=title, title_justify="left")
    for name, justify in (("stage", "left"), ("in", "right"), ("added", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("dropped", justify="right")
    table.add_column("out", justify="right")
    table.add_column("reasons")
    for row in rows:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in row.dropped.items())
        added = f"+{row.added:,}" if row.added else ""
        dropped = f"{sum(row.dropped.values()):,}"
        table.add_row(row.stage, f"{row.rows_in:,}", added, dropped, f"{row.rows_out:,}", reasons)
    Console().print(table)


def print_marks(marks: dict[str, dict[str, Any]]) -> None:
    """Print how the demo's planted troubles fared."""
    table = Table(title="planted troubles", title_justify="left")
    for name in ("kind", "planted", "caught", "share"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, tally in marks.items():
        name = "innocent, dropped as copy or leak" if kind == "innocent" else kind
        share = tally["caught"] / max(tally["planted"], 1)
        table.add_row(name, str(tally["planted"]), str(tally["caught"]), f"{share:.1%}")
    Console().print(table)


def print_rows(names: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Print a plain table."""
    columns = (Column(name, overflow="fold") for name in names)
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_shown(value) for value in row))
    Console().print(table)


def _shown(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def print_json(value: Any) -> None:
    """Print JSON for machines."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def print_pairs(pairs: dict[str, Any], *, title: str) -> None:
    """Print names and values in two columns."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)


def print_line(text: str) -> None:
    """Print one line of result."""
    sys.stdout.write(text + "\n")


def print_error(text: str) -> None:
    """Print one line of error."""
    sys.stderr.write(f"curate: {' '.join(text.split())}\n")
