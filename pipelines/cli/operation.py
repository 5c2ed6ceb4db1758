"""Verbs for who operates runs: preflight, status and clean."""

from typing import TYPE_CHECKING, Any

from pipelines.operate import console
from pipelines.operate.clean import clean
from pipelines.operate.status import status_of

if TYPE_CHECKING:
    from curation.stage import Engine

_COLUMNS = (
    *("stage", "rows_in", "seconds", "rows_per_s", "bytes_per_s", "busy_share", "wait_s"),
    *("retries", "peak_bytes"),
)
_SOMETIMES = ("device_busy_share", "planned_s")


def print_preflight(
    recipe: str,
    work: str,
    engine: "Engine",
    changes: list[str],
    base: str | None,
    as_json: bool,
) -> bool:
    """`curate preflight`: whether a run may begin."""
    from pipelines.run.preflight import preflight
    from pipelines.run.recipe import load_recipe

    work = work.rstrip("/")
    found = preflight(load_recipe(recipe, {"work": work}, changes), work, engine, base)
    if as_json:
        nodes = {name: vars(one) for name, one in found.nodes.items()}
        told = {"refusals": found.refusals, "warnings": found.warnings}
        console.print_json({"ok": not found.refusals, **told, "nodes": nodes})
        return not found.refusals
    if not found.refusals:
        same = next(iter(found.nodes.values())).facts
        differing = {one.what for one in found.differences}
        alike = [(what, value) for what, value in same.items() if what not in differing]
        console.print_rows(("on every node", ""), alike, title=", ".join(found.nodes))
    for line in found.warnings:
        console.print_line(f"differs: {line}")
    for line in found.refusals:
        console.print_line(f"REFUSED {line}")
    if not found.refusals:
        console.print_line(f"{recipe}: may run on {len(found.nodes) - 1} nodes or workers")
    return not found.refusals


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
    pairs["damaged lines of events left out"] = status["unreadable_events"] or None
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
