"""The terminal: the one place that configures logging, draws bars and prints tables.

Alternative texts, URLs and paths come from strangers: whatever is shown here is shown as it is,
never as markup, and what a terminal would obey is escaped (`visible`).
"""

import io
import json
import logging
import sys
import time
import unicodedata
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
from rich.table import Table
from rich.text import Text

from curation.ledger import Receipt, StageRecord
from pipelines.audit.funnel import FunnelRow
from pipelines.audit.tables import plain
from pipelines.operate.forecast import Forecast, share_done

_SECONDS_BETWEEN_LINES = 60.0


def visible(text: str) -> str:
    """A text as one line that a terminal only shows: what it would obey is escaped.

    That is controls and line ends, marks that turn the direction of writing, and all else that has
    no shape of its own. Spaces of every width stay.
    """
    if text.isprintable():
        return text
    return "".join(
        one
        if one.isprintable() or unicodedata.category(one) == "Zs"
        else one.encode("unicode_escape").decode("ascii")
        for one in text
    )


class _Lines(logging.Formatter):
    """Log lines of what can be seen."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return visible(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join(map(visible, super().formatException(ei).splitlines()))


def set_up_logging(verbose: bool) -> None:
    """Send our warnings and progress (or everything) to stderr, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.INFO if verbose else logging.WARNING)
    logging.getLogger("curation.progress").setLevel(logging.INFO)


def let_all_be_written() -> None:
    """Characters that an old terminal or a pipe cannot take are escaped, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _console(*, stderr: bool = False) -> Console:
    """A console that takes no text for markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


class ConsoleWatcher:
    """Draws the progress of stages: bars on a terminal, else about a line a minute.

    With a plan it compares each stage with it, and tells the time left of the whole run.
    """

    def __init__(self, *, quiet: bool = False, planned: Mapping[str, float] | None = None) -> None:
        """planned: seconds by stage."""
        self._console = _console(stderr=True)
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
            TextColumn("{task.description:>14}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            _TimeLeft(self),
            console=self._console,
            transient=True,
        )
        self._bar = self._bars.add_task(
            visible(stage), total=total or None, completed=done, rate=""
        )
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
            progress = f"{self._done}/{self._total} shards, {self._rate()}"
            line = f"{stage}: {progress}, {self.time_left()}".rstrip(", ")
            self._console.print(visible(line))

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
        line = f"{stage:>22}  {kept}  {state:>11}  {dropped}"
        self._console.print(visible(line))

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-3)
        kept = self._kept / max(self._rows, 1)
        return f"{self._rows / seconds:,.0f} rows/s, {kept:.1%} kept"

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
        self._console = _console(stderr=True)
        self._total = total_steps
        self._spoke = float("-inf")
        self._quiet = quiet
        self._bars = Progress(
            TextColumn("{task.description:>14}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}", markup=False),
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
            self._console.print(visible(line))

    def close(self) -> None:
        """Take the bar away."""
        self._bars.stop()


def print_funnel(rows: list[FunnelRow], *, title: str) -> None:
    """Print the funnel as a table."""
    table = _table(title)
    for name in ("stage", "in", "added", "dropped", "out", "reasons"):
        table.add_column(name, justify="left" if name in ("stage", "reasons") else "right")
    for row in rows:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in row.dropped.items())
        added = f"+{row.added:,}" if row.added else ""
        dropped = sum(row.dropped.values())
        _add(table, row.stage, row.rows_in, added, dropped, row.rows_out, reasons)
    _console().print(table)


def print_marks(marks: dict[str, dict[str, Any]]) -> None:
    """Print how the demo's planted troubles fared."""
    table = _table("planted troubles")
    for name in ("kind", "planted", "caught", "share"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, tally in marks.items():
        name = "innocent, dropped as copy or leak" if kind == "innocent" else kind
        share = tally["caught"] / max(tally["planted"], 1)
        _add(table, name, tally["planted"], tally["caught"], f"{share:.1%}")
    _console().print(table)


def print_rows(names: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Print a plain table."""
    table = _table(title)
    for name in names:
        table.add_column(visible(name), overflow="fold")
    for row in rows:
        _add(table, *row)
    _console().print(table)


def print_pairs(pairs: dict[str, Any], *, title: str) -> None:
    """Print names and values in two columns; a list of texts takes a line each."""
    table = _table(title, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        lines = value if isinstance(value, list) else [value]
        shown = (str(one) if isinstance(one, float) else _shown(one) for one in lines)
        table.add_row(visible(name), "\n".join(shown))
    _console().print(table)


def _table(title: str, **options: Any) -> Table:
    return Table(title=visible(title), title_justify="left", **options)


def _add(table: Table, *values: object) -> None:
    table.add_row(*(_shown(value) for value in values))


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:,.1f}" if isinstance(value, float) else visible(str(value))


def print_json(value: Any) -> None:
    """Print JSON for machines."""
    sys.stdout.write(json.dumps(plain(value), indent=1) + "\n")


def print_line(text: str) -> None:
    """Print one line of result."""
    sys.stdout.write(visible(text) + "\n")


def print_error(text: str) -> None:
    """Print one line of error."""
    sys.stderr.write(f"curate: {visible(' '.join(text.split()))}\n")
