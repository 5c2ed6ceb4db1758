"""Templates of all pages, and numbers as people read them in these."""

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


@cache
def environment() -> "Environment":
    """Where templates come from; all that they show is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "percent": percent, "shown": shown}
    environment.filters["px"] = "{:.1f}".format
    environment.filters["json"] = lambda value: json.dumps(value, default=str)
    return environment


def shown(value: str | float | None, how: str) -> str:
    """A cell of a table. how: count, percent, size, `added`, a format, or empty for a text."""
    if isinstance(value, str):
        return value
    known = {"count": count, "size": size, "percent": percent}
    if how in known:
        return known[how](value)
    if how == "added":
        return f"+{value:,}" if value else ""
    return "–" if value is None else format(value, how)


def count(value: float | None) -> str:
    """A whole number with its thousands apart; a dash for nothing known."""
    return "–" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share as a percentage, with as many digits as small ones need."""
    if value is None:
        return "–"
    return f"{value:.1%}" if value >= 0.001 or value == 0 else f"{100 * value:.2g}%"


def size(num_bytes: float | None) -> str:
    """Bytes in the unit that suits them."""
    amount = float(num_bytes or 0)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
