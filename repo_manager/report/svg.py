"""Small inline-SVG charts without a script: axes, lines, marks, bands, bars.

Colours come from CSS (classes `s0` to `s5`, `axis`, `grid`, `band`, `limit`), so a page can be light, dark and
printed. Every attribute is quoted and every text escaped. A chart is an image to a screen reader (`role="img"` with a
title and a description). Its marks can be reached by keyboard and carry their numbers as titles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

__all__ = ["Chart", "ChartAxis", "format_number", "stacked_bars"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 26.0, 34.0, 46.0
_SERIES = 6


def format_number(value: float) -> str:
    """Format a number for an axis: three significant digits, `k`, `M`, `G` for thousands."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclasses.dataclass(frozen=True)
class ChartAxis:
    """One axis.

    Attributes:
        title: the quantity shown, with its unit.
        low: value at its start, at the left or at the bottom.
        high: value at its end. Larger than `low`.
        is_log: logarithmic. `low` is then above 0.
        ticks: (value, label) pairs. `None` chooses round numbers.
    """

    title: str
    low: float
    high: float
    is_log: bool = False
    ticks: tuple[tuple[float, str], ...] | None = None

    @classmethod
    def around(cls, title: str, values: Sequence[float], *, is_log: bool = False, zero: bool = True) -> ChartAxis:
        """Return an axis for the values: from 0 (unless `zero` is off), or from decade to decade.

        Args:
            title: title of the axis, with its unit.
            values: numbers the axis must hold.
            is_log: use a logarithmic scale. It starts below the smallest value above 0.
            zero: start a linear axis at 0.
        """
        known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        high = max(known) or 1.0
        if is_log:
            low = min(value for value in (*known, high) if value > 0)
            return cls(title, low / 1.25, high * 1.25, is_log=True)
        low = 0.0 if zero else min(known)
        return cls(title, low, high + (high - low) * 0.06 if high > low else low + 1.0)

    def share(self, value: float) -> float:
        """Return where a value is between the axis's start (0) and end (1)."""
        if self.is_log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def marks(self) -> tuple[tuple[float, str], ...]:
        """Return the ticks."""
        if self.ticks is not None:
            return self.ticks
        values = self._log_marks() if self.is_log else self._round_marks()
        if max(values, default=0.0) >= 1e4:  # one suffix for the whole axis
            scale, suffix = (1e6, "M") if max(values) >= 2e6 else (1e3, "k")
            return tuple((value, f"{value / scale:g}{suffix if value else ''}") for value in values)
        return tuple((value, format_number(value)) for value in values)

    def _round_marks(self) -> list[float]:
        span = self.high - self.low
        step = 10.0 ** math.floor(math.log10(span / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
        first = math.ceil(self.low / step - 1e-9)
        return [step * number for number in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_marks(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            marks = [factor * 10.0**power for power in decades for factor in factors]
            marks = [mark for mark in marks if self.low <= mark <= self.high]
            if len(marks) >= 3:
                break
        return marks


_NEAR_THE_AXIS = 0.12


class Chart:
    """A chart, built up and rendered once.

    Args:
        title: shown above, and the image's name.
        description: text in its place for readers who do not see it.
        x: horizontal axis of the chart.
        y: vertical axis of the chart.
        width: of the view box. The image takes its container's width.
        height: of the view box, with the space for the legend and the axis labels.
    """

    def __init__(
        self, title: str, description: str, x: ChartAxis, y: ChartAxis, *, width: float = 620.0, height: float = 320.0
    ) -> None:
        self._title, self._description = title, description
        self._x, self._y = x, y
        self._width, self._height = width, height
        self._back: list[str] = []
        self._front: list[str] = []
        self._legend: list[tuple[str, str]] = []

    def _at(self, x: float, y: float) -> tuple[float, float]:
        across = self._width - _LEFT - _RIGHT
        down = self._height - _TOP - _BOTTOM
        return _LEFT + self._x.share(x) * across, self._height - _BOTTOM - self._y.share(y) * down

    def line(self, name: str, points: Sequence[tuple[float, float]], series: int, *, dashed: bool = False) -> Chart:
        """Add a line. Points without finite numbers interrupt it.

        Args:
            name: name in the legend. Empty: the line is not in it.
            points: points (x, y) in axis units.
            series: number of the series, for its colour.
            dashed: draw a dashed line, in the legend as well.
        """
        path, pen = [], "M"
        for x, y in points:
            if not (math.isfinite(x) and math.isfinite(y)):
                pen = "M"
                continue
            left, top = self._at(x, y)
            path.append(f"{pen}{left:.1f} {top:.1f}")
            pen = "L"
        kind = f"line s{series % _SERIES}" + (" dashed" if dashed else "")
        self._front.append(f'<path class="{kind}" d="{"".join(path)}"/>')
        if name:
            self._legend.append((name, kind))
        return self

    def marks(self, points: Sequence[tuple[float, float, str]], series: int, *, ring: bool = False) -> Chart:
        """Add marks with a title each: (x, y, title).

        Args:
            points: points (x, y) in axis units, each with a title.
            series: number of the series, for its colour.
            ring: draw rings instead of dots.
        """
        for x, y, title in points:
            left, top = self._at(x, y)
            kind = "ring" if ring else f"mark s{series % _SERIES}"
            self._front.append(
                f'<circle class="{kind}" cx="{left:.1f}" cy="{top:.1f}" r="{9 if ring else 4}" tabindex="0" role="img" '
                f'aria-label="{escape(title)}"><title>{escape(title)}</title></circle>'
            )
        return self

    def label(self, x: float, y: float, text: str, *, above: bool = True) -> Chart:
        """Add a text at a point. A label below a point near the horizontal axis is drawn above it, clear of a ring.

        Args:
            x: position on the horizontal axis.
            y: position on the vertical axis.
            text: text to draw. Near the right edge it ends at the point, else it is centred.
            above: draw it above the point.
        """
        left, top = self._at(x, y)
        anchor = "end" if left > self._width - 120 else "middle"
        top += -9 if above else 17 if self._y.share(y) > _NEAR_THE_AXIS else -14
        self._front.append(
            f'<text class="note" x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
        )
        return self

    def limit(self, y: float, text: str) -> Chart:
        """Add a horizontal limit with its text, when it is on the chart."""
        if not 0 <= self._y.share(y) <= 1:
            return self
        _, top = self._at(self._x.low, y)
        right = self._width - _RIGHT
        self._front.append(
            f'<line class="limit" x1="{_LEFT}" x2="{right}" y1="{top:.1f}" y2="{top:.1f}"/>'
            f'<text class="limit-text" x="{_LEFT + 6}" y="{top - 5:.1f}">{escape(text)}</text>'
        )
        return self

    def band(self, start: float, end: float, title: str) -> Chart:
        """Shade a stretch of the horizontal axis.

        Args:
            start: start on the horizontal axis.
            end: end on the horizontal axis.
            title: shown under the pointer only. Nothing is written into the stretch.
        """
        left, _ = self._at(max(start, self._x.low), self._y.low)
        right, _ = self._at(min(end, self._x.high), self._y.low)
        self._back.append(
            f'<rect class="band" x="{left:.1f}" y="{_TOP}" width="{max(right - left, 0):.1f}" '
            f'height="{self._height - _TOP - _BOTTOM}"><title>{escape(title)}</title></rect>'
        )
        return self

    def span(self, x: float, low: float, high: float, series: int) -> Chart:
        """Add a vertical interval with end caps.

        Args:
            x: position on the horizontal axis.
            low: lower end on the vertical axis.
            high: upper end on the vertical axis.
            series: number of the series, for its colour.
        """
        left, top = self._at(x, high)
        _, bottom = self._at(x, low)
        self._front.append(
            f'<path class="line s{series % _SERIES}" d="M{left:.1f} {top:.1f}V{bottom:.1f}'
            f'M{left - 5:.1f} {top:.1f}h10M{left - 5:.1f} {bottom:.1f}h10"/>'
        )
        return self

    def render(self) -> str:
        """Return the `<svg>` element."""
        return (
            f'<svg viewBox="0 0 {self._width:g} {self._height:g}" role="img" aria-label="{escape(self._title)}">'
            f"<title>{escape(self._title)}</title><desc>{escape(self._description)}</desc>"
            f"{self._grid()}{''.join(self._back)}{''.join(self._front)}{self._legend_row()}</svg>"
        )

    def _grid(self) -> str:
        bottom, right = self._height - _BOTTOM, self._width - _RIGHT
        parts = []
        for value, text in self._y.marks():
            _, top = self._at(self._x.low, value)
            parts.append(f'<path class="grid" d="M{_LEFT} {top:.1f}H{right}"/>')
            parts.append(
                f'<text class="tick" x="{_LEFT - 7}" y="{top + 4:.1f}" text-anchor="end">{escape(text)}</text>'
            )
        for value, text in self._x.marks():
            left, _ = self._at(value, self._y.low)
            parts.append(f'<path class="grid" d="M{left:.1f} {bottom}v5"/>')
            parts.append(
                f'<text class="tick" x="{left:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(text)}</text>'
            )
        parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
        middle, low = (_LEFT + right) / 2, self._height - 8
        parts.append(
            f'<text class="name" x="{middle:g}" y="{low:g}" text-anchor="middle">{escape(self._x.title)}</text>'
        )
        parts.append(f'<text class="name" x="{_LEFT - 54}" y="14">{escape(self._y.title)}</text>')
        return "".join(parts)

    def _legend_row(self) -> str:
        parts, right = [], self._width - _RIGHT
        for name, kind in reversed(self._legend):
            right -= 7.0 * len(name)
            parts.append(f'<text class="tick" x="{right:.0f}" y="14">{escape(name)}</text>')
            parts.append(f'<path class="{kind}" d="M{right - 26:.0f} 10h20"/>')
            right -= 40
        return "".join(parts)


def stacked_bars(
    title: str, description: str, rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], unit: str
) -> str:
    """Return horizontal stacked bars as an `<svg>` element.

    Args:
        title: name of the image, for screen readers.
        description: text in its place for readers who do not see it.
        rows: a label and its parts, in the order of `names`.
        names: names of the parts, shown in the legend. The order gives the colours.
        unit: unit of the numbers, shown at the axis and in each bar's title.
    """
    width, left, height = 620.0, 130.0, 58.0 + 30.0 * len(rows)
    axis = ChartAxis.around(unit, [sum(parts) for _, parts in rows])
    across = width - left - 62.0
    out = [
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    ]
    for value, text in axis.marks():
        x = left + axis.share(value) * across
        out.append(f'<path class="grid" d="M{x:.1f} 28V{height - 26:g}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{height - 10:g}" text-anchor="middle">{escape(text)}</text>')
    out.append(f'<text class="name" x="{width - 4:g}" y="{height - 10:g}" text-anchor="end">{escape(unit)}</text>')
    for number, (label, parts) in enumerate(rows):
        top, start = 34.0 + 30.0 * number, left
        out.append(f'<text class="tick" x="{left - 8:g}" y="{top + 14:g}" text-anchor="end">{escape(label)}</text>')
        for series, (name, part) in enumerate(zip(names, parts, strict=True)):
            size = max(part, 0.0) / axis.high * across
            words = f"{label}: {name} {format_number(part)} {unit}"
            out.append(
                f'<rect class="bar s{series % _SERIES}" x="{start:.1f}" y="{top:g}" width="{size:.1f}" height="20" '
                f'tabindex="0" role="img" aria-label="{escape(words)}"><title>{escape(words)}</title></rect>'
            )
            start += size
        out.append(
            f'<text class="note" x="{start + 5:.1f}" y="{top + 14:g}">{escape(format_number(sum(parts)))}</text>'
        )
    place = 8.0
    for series, name in enumerate(names):
        out.append(f'<rect class="bar s{series % _SERIES}" x="{place:g}" y="6" width="11" height="11"/>')
        out.append(f'<text class="tick" x="{place + 16:g}" y="16">{escape(name)}</text>')
        place += 34 + 6.6 * len(name)
    return "".join([*out, "</svg>"])
