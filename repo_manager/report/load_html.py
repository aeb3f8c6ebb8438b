"""A load test as one HTML file: inline SVG, no script, light and dark, printable."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from repo_manager.gates import Verdict
from repo_manager.loadtest.compare import Comparison
from repo_manager.loadtest.metrics import Metric, metrics_in
from repo_manager.loadtest.result import Detail, LoadPoint, LoadTestReport, ServerTimes
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.report import load_charts
from repo_manager.report.load_tables import DETAIL_TITLES, format_compared, ordered_details, stages_of
from repo_manager.report.page import Figure, render_page
from repo_manager.report.svg import format_number

__all__ = ["compare_page", "load_page"]

_MAX_TIMELINES = 6
_HEADS = {"throughput": "inferences/s"}


def load_page(report: LoadTestReport, verdict: Verdict | None = None, comparisons: Sequence[Comparison] = ()) -> str:
    """Return the page of a load test.

    Args:
        report: result of a load test, with a point per level.
        verdict: its gates, drawn as limits and listed. `None` when there are none.
        comparisons: of batch sizes, drawn as ratios.

    Returns:
        A complete HTML document without references to the outside.
    """
    unit = load_charts.latency_unit(report.points)
    return render_page(
        "load_report.html.j2",
        report=report,
        verdict=verdict,
        unit=unit[0],
        heads=[_HEADS.get(metric.key, metric.key) for metric in metrics_in("html")],
        rows=[_cells(point, unit[1]) for point in report.points],
        details=[
            _detail_cells(point, name, detail, unit[1])
            for point in report.points
            for name, detail in ordered_details(point)
        ],
        parts=[
            [point.label, name, f"{times.requests:,}", *(_time(value, unit[1]) for value in stages_of(times))]
            for point in report.points
            for name, times in (point.server.parts.items() if point.server is not None else ())
        ],
        figures=_figures(report, verdict, unit),
        ratios=_ratios(comparisons),
        comparisons=comparisons,
        missing=tuple(dict.fromkeys(text for point in report.points for text in point.gpu.missing)),
        sources=tuple(dict.fromkeys(point.gpu.source for point in report.points if point.gpu.source)),
        headline=_headline(report),
    )


@dataclasses.dataclass(frozen=True)
class _Couple:
    """The comparisons of one A with one B, at one batch size or several."""

    title: str
    comparisons: tuple[Comparison, ...]
    figures: tuple[Figure, ...]
    rows: tuple[dict[str, str | bool], ...]
    notes: tuple[str, ...]

    @property
    def sides(self) -> list[tuple[str, ServedModelFacts, str]]:
        """A and B: the versions with their servers, and their precision, empty where not known."""
        first = self.comparisons[0]
        return [("A", first.a, first.precisions[0]), ("B", first.b, first.precisions[1])]


def compare_page(comparisons: Sequence[Comparison]) -> str:
    """Return the page of a comparison, of one couple of models or several, at one batch size or several."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        a, b = (f"{side.model} {side.version}" for side in (comparison.a, comparison.b))
        groups.setdefault(f"A: {a} against B: {b}", []).append(comparison)
    couples = [
        _Couple(
            title,
            tuple(group),
            tuple(_ratios(group)),
            tuple(row for comparison in group for row in _compared_rows(comparison)),
            tuple(dict.fromkeys(note for comparison in group for note in comparison.notes)),
        )
        for title, group in groups.items()
    ]
    return render_page(
        "load_compare.html.j2",
        couples=couples,
        first=comparisons[0],
        seconds=sum(comparison.seconds for comparison in comparisons),
    )


def _compared_rows(comparison: Comparison) -> list[dict[str, str | bool]]:
    return [
        {
            "batch_size": str(comparison.batch_size) if place == 0 else "",
            "starts": place == 0,
            "name": number.name,
            "a": format_compared(number.name, number.a),
            "b": format_compared(number.name, number.b),
            "ratio": f"{number.ratio:.3f}",
            "interval": f"{number.interval.low:.3f} to {number.interval.high:.3f}",
            "better": number.better or "",
        }
        for place, number in enumerate(comparison.numbers)
    ]


def _headline(report: LoadTestReport) -> str:
    best = max(report.points, key=lambda point: point.throughput_per_s, default=None)
    if best is None or best.latency.p99_ns is None:
        return "No level gave a measurement."
    name, size = load_charts.latency_unit([best])
    p50, p99 = (format_number((value or 0) / size) for value in (best.latency.p50_ns, best.latency.p99_ns))
    rate = format_number(best.throughput_per_s)
    return f"Up to {rate} inferences/s ({best.label}), p50 {p50} {name}, p99 {p99} {name}."


def _figures(report: LoadTestReport, verdict: Verdict | None, unit: tuple[str, float]) -> list[Figure]:
    drawn = [
        (
            "Latency against throughput",
            load_charts.latency_against_throughput(report, verdict, unit),
            f"Knee: {report.knee}, {report.knee_rule}." if report.knee else "Labels are load levels.",
        ),
        (
            "Latency by percentile",
            load_charts.percentile_curves(report, unit),
            "Every further nine takes the same room.",
        ),
        (
            "Where the mean latency goes",
            load_charts.server_times(report, unit),
            "The server's own mean times in the measured windows; the rest is network, protocol and client.",
        ),
    ]
    for point in _timelines(report.points):
        caption = f"{point.label}: {point.outcome} ({point.reason}). Shaded: the windows of the row."
        drawn.append((f"Over time: {point.label}", load_charts.latency_over_time(point, unit), caption))
    return [Figure(title, Markup(svg), caption) for title, svg, caption in drawn if svg is not None]


def _timelines(points: Sequence[LoadPoint]) -> Sequence[LoadPoint]:
    """Return the levels with a time line: the last ones, under the most load."""
    return points[-_MAX_TIMELINES:]


def _ratios(comparisons: Sequence[Comparison]) -> list[Figure]:
    """Return a chart for each number over the batch sizes. Of one batch size one chart with all numbers."""
    caption = "Intervals are simultaneous over all compared numbers."
    if len(comparisons) == 1:
        svg = load_charts.ratios_of_numbers(comparisons[0])
        return [] if svg is None else [Figure("The ratios with their intervals", Markup(svg), caption)]
    figures = []
    for name in dict.fromkeys(number.name for comparison in comparisons for number in comparison.numbers):
        svg = load_charts.ratio_by_batch_size(comparisons, name)
        if svg is not None:
            figures.append(Figure(f"B / A: {name}", Markup(svg), caption))
    return figures


def _number(metric: Metric, point: LoadPoint, size: float) -> tuple[str, str]:
    """Return a number's cell, and its interval. Empty when none is shown."""
    interval = metric.interval(point) if "html interval" in metric.places else None
    if interval is None:
        return load_charts.number_cell(metric, point, size), ""
    low, high = (format_number(end / size) for end in (interval.low, interval.high))
    return load_charts.number_cell(metric, point, size), f"{low} to {high}"


def _cells(point: LoadPoint, size: float) -> dict[str, Any]:
    """Return a table row's texts."""
    share, server = point.error_share, point.server
    batch = None if server is None else server.mean_batch
    stages = _stages(server)
    return {
        "level": point.label,
        "outcome": point.outcome,
        "numbers": [_number(metric, point, size) for metric in metrics_in("html")],
        **{name: "-" if value is None else format_number(value / size) for name, value in stages.items()},
        "errors": "-" if share is None else f"{share:.2%}" if share else "0",
        "batch": "-" if batch is None else f"{batch:.2f}",
        "energy": "-" if point.gpu.energy_per_inference_j is None else f"{point.gpu.energy_per_inference_j:.3g} J",
        "client": "-" if point.client.cpu_share is None else f"{point.client.cpu_share:.0%}",
        "note": "; ".join(
            text
            for text in (
                point.reason if point.outcome != "stable" else "",
                *(f"{e.count} x {e.message}" for e in point.error_messages),
                point.client.note,
            )
            if text
        ),
        "reason": point.reason,
    }


def _detail_cells(point: LoadPoint, name: str, detail: Detail, size: float) -> list[str]:
    """Return the texts of one row about sequences or single responses."""
    latency = detail.latency
    values = (latency.mean_ns, latency.p50_ns, latency.p90_ns, latency.p99_ns, latency.max_ns)
    numbers = [_time(value, size) for value in values]
    return [point.label, DETAIL_TITLES[name], f"{detail.count:,}", format_number(detail.per_s), *numbers]


def _time(nanoseconds: float | None, size: float) -> str:
    return "-" if nanoseconds is None else format_number(nanoseconds / size)


def _stages(server: ServerTimes | None) -> dict[str, float | None]:
    if server is None:
        return {"queue": None, "infer": None}
    return {"queue": server.queue_ns, "infer": server.compute_infer_ns}
