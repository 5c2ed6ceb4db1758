"""Verbs for who operates runs: status and clean."""

from typing import Any

from pipelines import console
from pipelines.cleaning import clean
from pipelines.status import status_of

_COLUMNS = (
    *("stage", "rows_in", "seconds", "rows_per_s", "bytes_per_s", "busy_share", "wait_s"),
    *("retries", "peak_bytes"),
)
_SOMETIMES = ("device_busy_share", "planned_s")


def print_status(work: str, as_json: bool) -> None:
    """`curate status`."""
    status = status_of(work.rstrip("/"))
    if as_json:
        console.print_json(status)
        return
    stages = status.pop("stages")
    if stages:
        known = {name for stage in stages for name in stage}
        shown = (*_COLUMNS, *(name for name in _SOMETIMES if name in known))
        console.print_rows(shown, [[stage.get(name, "") for name in shown] for stage in stages])
    console.print_pairs(_shown(status), title=work)


def _shown(status: dict[str, Any]) -> dict[str, Any]:
    pairs = {"state": status["state"], "recipe": status.get("recipe", "")}
    if status.get("stage"):
        shards = f"{status['done']}/{status['total']} shards" if status["total"] else ""
        pairs["stage"] = f"{status['stage']} {shards}".strip()
        pairs["step"] = status.get("step")
        pairs["rows/s"] = status.get("rows_per_s")
    pairs["time left"] = None if status.get("left_s") is None else f"{status['left_s']:,.0f} s"
    pairs["times the plan so far"] = status.get("times_planned")
    pairs["seconds"] = status.get("seconds")
    pairs["error"] = status.get("error")
    pairs["last heard of"] = f"{status['silent_s']:,.0f} s ago"
    return {name: value for name, value in pairs.items() if value not in (None, "")}


def clean_work(work: str, dry_run: bool, as_json: bool) -> None:
    """`curate clean`."""
    removed = clean(work.rstrip("/"), dry_run=dry_run)
    if as_json:
        console.print_json(removed)
        return
    console.print_rows(("folder", "bytes"), list(removed.items()))
    verb = "would be" if dry_run else "were"
    console.print_line(f"{sum(removed.values()) / 1e6:,.1f} MB {verb} removed")
