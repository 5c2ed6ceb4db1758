"""Charts as SVG text, drawn by hand so that the page needs no library.

Colours come from the page's style sheet by class, so that they follow light and dark. What is
dropped is hatched as well as coloured: nothing is told by colour alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from pipelines.audit.funnel import FunnelRow

_ROW = 34
_LINE = 18
_MIN_BAR = 1.5
_GAP = 10


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    points: list[tuple[float, float]]


def funnel_chart(rows: Sequence[FunnelRow], width: int, joining: str = "") -> Markup:
    """The funnel as a Sankey from top to bottom: what is dropped branches off to the right.

    width: of the drawing, in pixels; texts stand in its right part. joining: names of the sets
    that are added.
    """
    room = width - (330 if width > 600 else 215)
    most = max((row.rows_in + row.added for row in rows), default=1) or 1
    scale = (room - _GAP) / most
    parts: list[str] = []
    y = 8.0
    for row in rows:
        height = _ROW + _LINE * max(1, len(row.dropped) + bool(row.added))
        parts += _funnel_row(row, scale, room, y, height, joining)
        y += height
    last = rows[-1].rows_out if rows else 0
    parts.append(_bar(0, y, max(last * scale, _MIN_BAR), "kept"))
    parts.append(_text(room + 14, y + 9, f"{last:,} images in the set", "strong"))
    return _svg(width, y + 26, "funnel", f"Funnel of {len(rows)} stages", parts)


def _funnel_row(
    row: FunnelRow, scale: float, room: float, y: float, height: float, joining: str
) -> list[str]:
    before, after = row.rows_in * scale, row.rows_out * scale
    below = y + height
    title = f"{row.stage}: {row.rows_in:,} in, {row.rows_out:,} out"
    parts = [
        f"<g><title>{escape(title)}</title>",
        _ribbon(0, before if not row.added else min(before, after), y + 9, 0, after, below, "flow"),
        _bar(0, y, max(before, _MIN_BAR), "kept"),
        _name(room + 14, y + 9, row.stage, f"{row.rows_in:,}"),
    ]
    line = y + 9 + _LINE
    if row.added:
        parts.append(_text(room + 14, line, f"+ {row.added:,} {joining}".rstrip(), "added-text"))
        parts.append(_joining_ribbon(before, after, y, below, row.added * scale))
        line += _LINE
    return [*parts, *_drops(row, scale, room, y, line), "</g>"]


def _drops(row: FunnelRow, scale: float, room: float, y: float, line: float) -> list[str]:
    """Ribbons of what is dropped, each to its own line of text."""
    parts = []
    left = row.rows_out * scale
    for reason, count in row.dropped.items():
        size = max(count * scale, _MIN_BAR)
        ribbon = _side_ribbon(left, size, y + 9, room + 4, line - 4)
        parts.append(f"<g><title>{escape(reason)}: {count:,}</title>{ribbon}")
        parts.append(_text(room + 14, line, f"− {count:,} {reason}", "dropped-text"))
        parts.append("</g>")
        left += size
        line += _LINE
    return parts


def _side_ribbon(left: float, size: float, top: float, right: float, y: float) -> str:
    """A ribbon that leaves the trunk downward and narrows to its line of text."""
    end = min(max(size * 0.25, 2.0), 12.0)
    return (
        f'<path class="dropped" d="M{left:.1f} {top:.1f} C{left:.1f} {y:.1f} {left:.1f} '
        f"{y + end / 2:.1f} {right:.1f} {y + end / 2:.1f} L{right:.1f} {y - end / 2:.1f} "
        f"C{left + size:.1f} {y - end / 2:.1f} {left + size:.1f} {top + 2:.1f} "
        f'{left + size:.1f} {top:.1f} Z"/>'
    )


def _ribbon(
    left: float, size: float, top: float, left2: float, size2: float, bottom: float, kind: str
) -> str:
    size, size2 = max(size, _MIN_BAR), max(size2, _MIN_BAR)
    size = min(size, size2) if kind == "flow" else size
    return (
        f'<path class="{kind}" d="M{left:.1f} {top:.1f} L{left + size:.1f} {top:.1f} '
        f'L{left2 + size:.1f} {bottom:.1f} L{left2:.1f} {bottom:.1f} Z"/>'
    )


def _joining_ribbon(before: float, after: float, y: float, below: float, size: float) -> str:
    """What joins comes in from the right and ends at the right of the trunk."""
    end = max(after, _MIN_BAR)
    start = max(end - size, 0.0)
    shift = before + 30
    return (
        f'<path class="added" d="M{shift:.1f} {y + 9:.1f} L{shift + max(size, 2):.1f} '
        f'{y + 9:.1f} L{end:.1f} {below:.1f} L{start:.1f} {below:.1f} Z"/>'
    )


def _bar(x: float, y: float, size: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{size:.1f}" height="9" rx="2"/>'


def histogram_chart(
    low: float,
    high: float,
    kept: Sequence[int],
    dropped: Sequence[int],
    thresholds: Sequence[float],
    label: str,
) -> Markup:
    """Counts by score, kept under dropped, on a square-root scale, with the thresholds."""
    width, height, floor = 440, 190, 150
    span = (high - low) or 1.0
    top = math.sqrt(max((a + b for a, b in zip(kept, dropped, strict=True)), default=1) or 1)
    step = width / max(len(kept), 1)
    parts = [f'<line class="axis" x1="0" y1="{floor}" x2="{width}" y2="{floor}"/>']
    for number, (stay, fall) in enumerate(zip(kept, dropped, strict=True)):
        begin = low + span * number / len(kept)
        parts.append(_stacked(number * step, step, stay, fall, (floor - 14) / top, floor, begin))
    for value in thresholds:
        x = 1 + min(max((value - low) / span, 0), 1) * (width - 2)
        anchor = "end" if x > width * 0.7 else "start"
        shift = -5 if anchor == "end" else 5
        parts.append(f'<line class="limit" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{floor}"/>')
        parts.append(_text(x + shift, 11, f"{value:.4g}", "limit-text", anchor))
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        parts.append(
            _text(share * width, floor + 17, _tick(low + share * span, span), "tick", anchor)
        )
    parts.append(_text(width / 2, floor + 36, label, "muted", "middle"))
    summary = f"Histogram of {label}: {sum(kept):,} kept, {sum(dropped):,} dropped"
    return _svg(width, height, "histogram", summary, parts)


def _stacked(
    x: float, step: float, stay: int, fall: int, unit: float, floor: float, begin: float
) -> str:
    """One bin: its height is the root of both counts, shared in proportion."""
    total = stay + fall
    if not total:
        return ""
    height = max(math.sqrt(total) * unit, 2.0)
    upper = height * fall / total
    tip = f"<title>from {begin:.4g}: {stay:,} kept, {fall:,} dropped</title>"
    one = f'x="{x + 0.5:.1f}" width="{max(step - 1, 1):.1f}"'
    kept = (
        f'<rect class="kept" {one} y="{floor - height + upper:.1f}" height="{height - upper:.1f}"/>'
    )
    drop = f'<rect class="dropped" {one} y="{floor - height:.1f}" height="{upper:.1f}"/>'
    return f"<g>{tip}{kept if stay else ''}{drop if fall else ''}</g>"


def paired_bars(before: Sequence[int], after: Sequence[int]) -> Markup:
    """Shares of numbered groups, before over after, with their counts."""
    width, row, left = 440, 34, 30
    totals = sum(before) or 1, sum(after) or 1
    most = max([*(b / totals[0] for b in before), *(a / totals[1] for a in after), 1e-9])
    room = (width - left - 78) / most
    parts = []
    for number, counts in enumerate(zip(before, after, strict=True)):
        y = number * row + 6.0
        parts.append(_text(left - 8, y + 17, str(number + 1), "strong", "end"))
        for place, (count, total, kind) in enumerate(
            zip(counts, totals, ("before", "kept"), strict=True)
        ):
            size, top = count / total * room, y + place * 12
            tip = f"<title>group {number + 1}: {count:,} of {total:,}</title>"
            parts.append(
                f'<g>{tip}<rect class="{kind}" x="{left}" y="{top:.1f}" '
                f'width="{max(size, _MIN_BAR):.1f}" height="11"/></g>'
            )
            parts.append(_text(left + size + 6, top + 10, f"{count / total:.1%}", "tick"))
    return _svg(width, len(before) * row + 8, "pairs", "Shares of groups before and after", parts)


def line_chart(series: Sequence[Series], across: str, up: str) -> Markup:
    """A few lines over one axis, told apart by colour, dash and the name at their end."""
    width, height, left, floor = 640, 260, 46, 214
    points = [point for one in series for point in one.points]
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    right = width - 86

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / ((x1 - x0) or 1)
        above = (y - y0) / ((y1 - y0) or 1)
        return left + across * (right - left), floor - above * (floor - 14)

    parts = [f'<line class="axis" x1="{left}" y1="{floor}" x2="{right}" y2="{floor}"/>']
    for share in (0.0, 0.5, 1.0):
        value = y0 + share * (y1 - y0)
        y = place(x0, value)[1]
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, _tick(value, y1 - y0), "tick", "end"))
        step = x0 + share * (x1 - x0)
        parts.append(_text(place(step, y0)[0], floor + 17, f"{step:,.0f}", "tick", "middle"))
    labels = _spread([place(*one.points[-1])[1] for one in series])
    for number, one in enumerate(series):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in one.points))
        parts.append(f'<polyline class="line line-{number % 5}" points="{path}"/>')
        parts.append(_text(right + 8, labels[number] + 4, one.name, f"line-text line-{number % 5}"))
    parts.append(_text((left + right) / 2, floor + 36, across, "muted", "middle"))
    return _svg(width, height, "lines", f"{up} by {across}", parts)


@dataclass(frozen=True)
class Band:
    """A line of shares with its interval."""

    name: str
    points: list[tuple[float, float, float, float]]
    """Place, share, and the interval's ends."""


def band_chart(bands: Sequence[Band], thresholds: Sequence[float], across: str) -> Markup:
    """Shares between 0 and 1 over a score, each with its interval as a band around it."""
    width, height, left, floor, right = 640, 280, 46, 234, 554
    places = [point[0] for band in bands for point in band.points]
    low, span = min(places), (max(places) - min(places)) or 1.0

    def place(x: float, y: float) -> str:
        return f"{left + (x - low) / span * (right - left):.1f},{floor - y * (floor - 14):.1f}"

    parts = [f'<line class="axis" x1="{left}" y1="{floor}" x2="{right}" y2="{floor}"/>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = floor - share * (floor - 14)
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, f"{share:.0%}", "tick", "end"))
        x = left + share * (right - left)
        parts.append(_text(x, floor + 17, f"{low + share * span:.3g}", "tick", "middle"))
    labels = _spread([floor - band.points[-1][1] * (floor - 14) for band in bands])
    for number, band in enumerate(bands):
        upper = [place(x, high) for x, _, _, high in band.points]
        lower = [place(x, least) for x, _, least, _ in reversed(band.points)]
        parts.append(f'<polygon class="band band-{number}" points="{" ".join(upper + lower)}"/>')
        line = " ".join(place(x, y) for x, y, _, _ in band.points)
        parts.append(f'<polyline class="line line-{number}" points="{line}"/>')
        parts.append(_text(right + 8, labels[number] + 4, band.name, f"line-text line-{number}"))
    for value in thresholds:
        x = left + min(max((value - low) / span, 0), 1) * (right - left)
        parts.append(f'<line class="limit" x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{floor}"/>')
        parts.append(_text(x + 5, 11, f"{value:.4g}", "limit-text"))
    parts.append(_text((left + right) / 2, floor + 36, across, "muted", "middle"))
    names = " and ".join(band.name for band in bands)
    return _svg(width, height, "lines", f"{names} by {across}", parts)


def _spread(heights: list[float]) -> list[float]:
    """Move labels apart so that none covers another."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + 15)
    return placed


def _tick(value: float, span: float) -> str:
    """A number with as many decimals as the axis needs."""
    decimals = 0 if span >= 30 else 1 if span >= 4 else 2 if span >= 0.3 else 4
    return f"{value + 0.0:,.{decimals}f}"


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _name(x: float, y: float, name: str, number: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}"><tspan class="strong">{escape(name)}</tspan>'
        f'<tspan class="muted" dx="8">{escape(number)}</tspan></text>'
    )


def _svg(width: float, height: float, kind: str, summary: str, parts: Sequence[str]) -> Markup:
    body = "".join(parts)
    return Markup(
        f'<svg class="{kind}" role="img" aria-label="{escape(summary)}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}">'
        f"{body}</svg>"
    )
