"""Charts as SVG: places are computed here, `templates/charts.html.j2` draws.

Colors come from the page's style sheet by class, so that they follow light and dark. What is
dropped is hatched as well as colored: nothing is told by color alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup

from pipelines.audit.funnel import FunnelRow
from pipelines.audit.tables import Row
from pipelines.web.rendering import environment

Points = Sequence[tuple[float, float]]

_ROW = 34
_LINE = 18
_MIN_BAR = 1.5
_GAP = 10
_WIDTHS = {"wide": 1040, "narrow": 340}
"""Of the funnel on a desk and on a phone, in pixels."""


def draw(name: str, **values: object) -> Markup:
    """Draw a chart by the name of its macro."""
    macros = environment().get_template("charts.html.j2").module
    return Markup(getattr(macros, name)(**values))


def funnel_charts(rows: Sequence[FunnelRow], joining: Sequence[str]) -> list[tuple[str, Markup]]:
    """The funnel for wide and for narrow windows; the style sheet shows the one that fits.

    joining: names of the sets that are added.
    """
    names = ", ".join(joining)
    return [(name, funnel_chart(rows, width, names)) for name, width in _WIDTHS.items()]


def funnel_chart(rows: Sequence[FunnelRow], width: int, joining: str = "") -> Markup:
    """The funnel as a Sankey from top to bottom: what is dropped branches off to the right.

    width: of the drawing, in pixels; texts stand in its right part.
    """
    room = width - (330 if width > 600 else 215)
    most = max((row.rows_in + row.added for row in rows), default=1) or 1
    scale = (room - _GAP) / most
    y, drawn = 8, []
    for row in rows:
        below = y + _ROW + _LINE * max(1, len(row.dropped) + bool(row.added))
        drawn.append(_funnel_row(row, scale, room + 4, y, below))
        y = below
    last = rows[-1].rows_out if rows else 0
    values = {"y": y, "last": last, "size": max(last * scale, _MIN_BAR), "joining": joining}
    return draw("funnel", width=width, height=y + 26, right=room + 14, rows=drawn, **values)


def _funnel_row(row: FunnelRow, scale: float, right: float, y: float, below: float) -> Row:
    before, after, top = row.rows_in * scale, row.rows_out * scale, y + 9
    end, line = max(after, _MIN_BAR), top
    size = min(max(min(before, after) if row.added else before, _MIN_BAR), end)
    added: list[tuple[float, float]] = []
    if row.added:
        # what joins comes in from the right and ends at the right of the trunk
        left, joined = before + 30, row.added * scale
        added = [(left, top), (left + max(joined, 2), top)]
        added += [(end, below), (max(end - joined, 0.0), below)]
        line += _LINE
    drops, left = [], after
    for reason, count in row.dropped.items():
        line, wide = line + _LINE, max(count * scale, _MIN_BAR)
        drops.append((reason, count, line, _branch(left, wide, top, right, line - 4)))
        left += wide
    flow = [(0, top), (size, top), (size, below), (0, below)]
    bar = max(before, _MIN_BAR)
    return {"row": row, "y": y, "flow": flow, "size": bar, "added": added, "drops": drops}


def _branch(left: float, size: float, top: float, right: float, y: float) -> str:
    """A ribbon that leaves the trunk downward and narrows to its line of text."""
    end = min(max(size * 0.25, 2.0), 12.0) / 2
    edge = left + size
    return (
        f"M{left:.1f} {top:.1f} C{left:.1f} {y:.1f} {left:.1f} {y + end:.1f} "
        f"{right:.1f} {y + end:.1f} L{right:.1f} {y - end:.1f} "
        f"C{edge:.1f} {y - end:.1f} {edge:.1f} {top + 2:.1f} {edge:.1f} {top:.1f} Z"
    )


def histogram_chart(
    low: float,
    high: float,
    kept: Sequence[int],
    dropped: Sequence[int],
    thresholds: Sequence[float],
    label: str,
) -> Markup:
    """Counts by score, kept under dropped, on a square-root scale, with the thresholds."""
    width, span = 440, (high - low) or 1.0
    step = width / max(len(kept), 1)
    unit = 136 / math.sqrt(max(map(sum, zip(kept, dropped, strict=True)), default=1) or 1)
    bins = []
    for number, (stay, fall) in enumerate(zip(kept, dropped, strict=True)):
        if total := stay + fall:
            height = max(math.sqrt(total) * unit, 2.0)
            begin = f"{low + span * number / len(kept):.4g}"
            place = (number * step + 0.5, max(step - 1, 1), begin)
            bins.append((*place, stay, fall, height, height * fall / total))
    limits = [
        (1 + min(max((value - low) / span, 0), 1) * (width - 2), f"{value:.4g}")
        for value in thresholds
    ]
    ticks = [
        (anchor, share * width, _tick(low + share * span, span))
        for anchor, share in (("start", 0.0), ("middle", 0.5), ("end", 1.0))
    ]
    values = {"label": label, "kept": sum(kept), "dropped": sum(dropped)}
    return draw("histogram", bins=bins, limits=limits, ticks=ticks, **values)


def paired_bars(before: Sequence[int], after: Sequence[int]) -> Markup:
    """Shares of numbered groups, before over after, with their counts."""
    totals = sum(before) or 1, sum(after) or 1
    most = max([*(b / totals[0] for b in before), *(a / totals[1] for a in after), 1e-9])
    groups = []
    for counts in zip(before, after, strict=True):
        shares = [count / total for count, total in zip(counts, totals, strict=True)]
        sizes, told = [share * 332 / most for share in shares], map("{:.1%}".format, shares)
        kinds = (("before", 6), ("kept", 18))
        groups.append(list(zip(kinds, counts, totals, sizes, told, strict=True)))
    return draw("pairs", groups=groups)


@dataclass(frozen=True)
class Series:
    """A line of a chart, told apart by color, dash and the name at its end."""

    name: str
    points: Points
    interval: Points = field(default_factory=list)
    """Ends of a band around each point, where it has one."""


@dataclass(frozen=True)
class _Frame:
    """Where the values of a line chart lie in its drawing."""

    xs: tuple[float, float]
    ys: tuple[float, float]
    floor: int

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.xs[0]) / ((self.xs[1] - self.xs[0]) or 1)
        above = (y - self.ys[0]) / ((self.ys[1] - self.ys[0]) or 1)
        return 46 + across * 508, self.floor - above * (self.floor - 14)

    def path(self, points: Points) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))

    def ticks(
        self, shares: Sequence[float], up: Callable[[float], str], across: str
    ) -> list[tuple[float, str, float, str]]:
        (x0, x1), (y0, y1) = self.xs, self.ys
        places = [(x0 + share * (x1 - x0), y0 + share * (y1 - y0)) for share in shares]
        return [(self.at(x, y)[1], up(y), self.at(x, y)[0], format(x, across)) for x, y in places]

    def lines(self, series: Sequence[Series]) -> list[tuple[str, int, str, str, float]]:
        """Name, number, path, band and place of the label of each line."""
        labels = [self.at(*one.points[-1])[1] for one in series]
        order = sorted(range(len(labels)), key=labels.__getitem__)
        for before, after in pairwise(order):  # none covers another
            labels[after] = max(labels[after], labels[before] + 15)
        found = []
        for number, one in enumerate(series):
            ends = [(x, *both) for (x, _), both in zip(one.points, one.interval, strict=False)]
            band = [(x, high) for x, _, high in ends] + [(x, low) for x, low, _ in ends[::-1]]
            lines = self.path(one.points), self.path(band)
            found.append((one.name, number % 5, *lines, labels[number]))
        return found


def line_chart(series: Sequence[Series], across: str, up: str) -> Markup:
    """A few lines over one axis."""
    xs, ys = zip(*(point for one in series for point in one.points), strict=True)
    frame = _Frame((min(xs), max(xs)), (min(ys), max(ys)), 214)
    ticks = frame.ticks((0.0, 0.5, 1.0), lambda y: _tick(y, max(ys) - min(ys)), ",.0f")
    values = {"floor": 214, "limits": [], "across": across, "summary": f"{up} by {across}"}
    return draw("lines", height=260, ticks=ticks, series=frame.lines(series), **values)


def band_chart(bands: Sequence[Series], thresholds: Sequence[float], across: str) -> Markup:
    """Shares between 0 and 1 over a score, each with its interval as a band around it."""
    xs = [x for band in bands for x, _ in band.points]
    frame = _Frame((min(xs), max(xs)), (0.0, 1.0), 234)
    ticks = frame.ticks((0.0, 0.25, 0.5, 0.75, 1.0), "{:.0%}".format, ".3g")
    limits = [(min(max(frame.at(t, 0)[0], 46), 554), f"{t:.4g}") for t in thresholds]
    summary = f"{' and '.join(band.name for band in bands)} by {across}"
    values = {"floor": 234, "limits": limits, "across": across, "summary": summary}
    return draw("lines", height=280, ticks=ticks, series=frame.lines(bands), **values)


def _tick(value: float, span: float) -> str:
    """A number with as many decimals as the axis needs."""
    decimals = 0 if span >= 30 else 1 if span >= 4 else 2 if span >= 0.3 else 4
    return f"{value + 0.0:,.{decimals}f}"
