"""Texts from strangers in Markdown: shown as they are, as no markup of Markdown or HTML."""

import html
import re


def as_text(text: str | float | None) -> str:
    """A text on one line, with all that Markdown or HTML would take for markup escaped."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def as_code(text: str | float | None) -> str:
    """A text as code: the fence is longer than any run of backticks in it."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"
