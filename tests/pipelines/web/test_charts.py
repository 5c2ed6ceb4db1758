"""Charts are well-formed SVG whose marks lie inside and whose texts are texts."""

import xml.etree.ElementTree as ET

import pytest

from pipelines.audit.funnel import FunnelRow
from pipelines.web import charts
from pipelines.web.rendering import count, percent, shown, size

BAD = "<script>'\"&"


def parsed(chart):
    return ET.fromstring(str(chart))


def texts(chart):
    return ["".join(one.itertext()) for one in parsed(chart).iter("text")]


def test_funnel_charts__say_every_number_for_both_widths():
    rows = [
        FunnelRow("pool", BAD, 1000, 0, {"copy": 200, "flat": 1}, 799),
        FunnelRow("pool", "select", 799, 12, {}, 811),
    ]
    found = charts.funnel_charts(rows, ["one", "two"])
    assert [name for name, _ in found] == ["wide", "narrow"]
    for _, chart in found:
        assert texts(chart) == [
            f"{BAD}1,000",
            "− 200 copy",
            "− 1 flat",
            "select799",
            "+ 12 one, two",
            "811 images in the set",
        ]
        assert len([one for one in parsed(chart).iter("path") if one.get("class") == "added"]) == 1


def test_funnel_chart__without_rows():
    assert texts(charts.funnel_chart([], 340)) == ["0 images in the set"]


def test_histogram_chart__one_bar_a_bin_and_thresholds_inside():
    chart = parsed(charts.histogram_chart(0.0, 1.0, [4, 0, 9], [0, 0, 16], [0.5, 7.0], BAD))
    bars = [(one.get("class"), float(one.get("height"))) for one in chart.iter("rect")]
    assert [kind for kind, _ in bars] == ["kept", "kept", "dropped"]
    assert bars[1][1] + bars[2][1] == pytest.approx(136)  # the fullest bin
    assert bars[0][1] == pytest.approx(136 * 2 / 5, abs=0.1)  # heights are roots of counts
    limits = [float(one.get("x1")) for one in chart.iter("line") if one.get("class") == "limit"]
    assert limits == [220, 439]


def test_line_chart__names_do_not_cover_each_other():
    series = [charts.Series(name, [(0.0, 1.0), (10.0, 2.0)]) for name in ("a", "b", "c")]
    chart = parsed(charts.line_chart(series, "step", "loss"))
    labels = [float(one.get("y")) for one in chart.iter("text") if "line-text" in one.get("class")]
    assert all(b - a >= 15 for a, b in zip(labels, labels[1:], strict=False))
    assert chart.get("aria-label") == "loss by step"
    assert not list(chart.iter("polygon"))


def test_band_chart__the_band_lies_around_its_line():
    points, interval = [(0.2, 0.5), (0.8, 0.9)], [(0.4, 0.6), (0.7, 1.0)]
    chart = parsed(charts.band_chart([charts.Series("recall", points, interval)], [0.5], "x"))
    (band,) = chart.iter("polygon")
    corners = [tuple(map(float, one.split(","))) for one in band.get("points").split()]
    assert corners == [(46, 102), (554, 14), (554, 80), (46, 146)]
    (line,) = chart.iter("polyline")
    assert line.get("points") == "46.0,124.0 554.0,36.0"


def test_paired_bars__shares_before_and_after():
    assert texts(charts.paired_bars([30, 10], [1, 1])) == [
        *("1", "75.0%", "50.0%"),
        *("2", "25.0%", "50.0%"),
    ]


def test_shown__cells_of_tables():
    assert [shown(1234, "count"), shown(None, "count")] == ["1,234", "–"]
    assert [shown(7, "added"), shown(0, "added")] == ["+7", ""]
    assert [shown(0.5, ".2f"), shown(None, ".2f"), shown("any", "count")] == ["0.50", "–", "any"]
    assert [count(None), percent(0.0004), size(1500)] == ["–", "0.04%", "1.5 kB"]
