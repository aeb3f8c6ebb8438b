from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_manager.report.svg import Chart, ChartAxis, format_number, stacked_bars

SIZES = st.floats(1e-6, 1e12)


@given(SIZES, SIZES, st.booleans())
def test_ticks_lie_on_the_axis_and_ascend(first, second, is_log):
    axis = ChartAxis.around("x", [first, second], is_log=is_log)
    ticks = [value for value, _ in axis.marks()]
    assert ticks == sorted(ticks)
    assert all(axis.low * (1 - 1e-9) <= tick <= axis.high * (1 + 1e-9) for tick in ticks)
    if not is_log:
        assert 2 <= len(ticks) <= 13
    assert axis.share(axis.low) == pytest.approx(0, abs=1e-9)
    assert axis.share(axis.high) == pytest.approx(1)


@pytest.mark.parametrize("values", [[], [0.0], [math.nan], [5.0, 5.0]])
def test_axes_of_hardly_any_values(values):
    axis = ChartAxis.around("x", values)
    assert axis.high > axis.low
    assert axis.marks()


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1.2345, "1.23"), (1234.0, "1234"), (12345, "12.3k"), (2.5e6, "2.5M"), (3e9, "3G")]
)
def test_numbers(value, text):
    assert format_number(value) == text


def test_texts_are_escaped_and_gaps_interrupt_lines():
    axis = ChartAxis("a<b", 0, 10)
    chart = Chart('"t"', "<d>", axis, axis)
    chart.line("l&m", [(0, 1), (1, math.nan), (2, 3)], 0).marks([(1, 1, "<m>")], 1).label(1, 1, "&").limit(5, "<5")
    chart.limit(50, "outside").band(1, 2, "b").span(3, 1, 2, 0)
    image = ElementTree.fromstring(chart.render())
    assert image.get("aria-label") == '"t"'
    lines = [path.get("d") for path in image.iter("path") if path.get("class") == "line s0"]
    assert lines[0].count("M") == 2
    assert "outside" not in "".join(image.itertext())


def test_bars_are_as_long_as_their_parts():
    image = ElementTree.fromstring(stacked_bars("t", "d", [("a", [1.0, 3.0]), ("b", [2.0, 0.0])], ["x", "y"], "ms"))
    sizes = [float(rect.get("width")) for rect in image.iter("rect") if rect.get("aria-label")]
    assert sizes[1] == pytest.approx(3 * sizes[0], abs=0.2)
    assert sizes[2] == pytest.approx(2 * sizes[0], abs=0.2)
    assert sizes[3] == 0


def test_a_label_below_a_point_stays_clear_of_the_axis() -> None:
    """At the lowest point there is no room below: the text stands above it, in the chart."""
    axis = ChartAxis("y", 1.0, 100.0, is_log=True)

    def tops(y: float) -> tuple[float, float]:
        chart = (
            Chart("t", "d", ChartAxis("x", 0.0, 10.0), axis)
            .marks([(5, y, "point")], 0)
            .label(5, y, "knee", above=False)
        )
        image = ElementTree.fromstring(chart.render())
        circle = next(each for each in image.iter() if each.tag.endswith("circle"))
        text = next(each for each in image.iter() if each.tag.endswith("text") and each.text == "knee")
        return float(circle.get("cy", "nan")), float(text.get("y", "nan"))

    low_point, low_text = tops(1.0)
    assert low_text < low_point
    high_point, high_text = tops(50.0)
    assert high_text > high_point
