"""The charts of a load test's page, each a function of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from repo_manager.gates import TIME, Verdict
from repo_manager.loadtest.compare import Comparison
from repo_manager.loadtest.judge import parse_slo
from repo_manager.loadtest.metrics import METRICS, Metric
from repo_manager.loadtest.result import LoadPoint, LoadTestReport
from repo_manager.report.svg import Chart, ChartAxis, format_number, stacked_bars
from repo_manager.stats.resampling import ComparedNumber

__all__ = [
    "latency_against_throughput",
    "latency_over_time",
    "latency_unit",
    "number_cell",
    "percentile_curves",
    "ratio_by_batch_size",
    "server_times",
]

_MAX_CURVES = 6
Unit = tuple[str, float]


def latency_unit(points: Sequence[LoadPoint]) -> Unit:
    """Return a unit for the report's latencies, and its size in nanoseconds."""
    largest = max((point.latency.p99_ns or 0 for point in points), default=0)
    for name, size in (("s", 1e9), ("ms", 1e6)):
        if largest >= size:
            return name, size
    return "µs", 1e3


def number_cell(metric: Metric, point: LoadPoint, size: float) -> str:
    """Return a number as a table shows it, latencies in a unit of `size` nanoseconds. `-` when it is not known.

    Args:
        metric: the quantity that is measured.
        point: row of the load level.
        size: nanoseconds of the latency unit.
    """
    value = metric.get(point)
    if value is None:
        return "-"
    return format_number(value / size if metric.unit is TIME else value)


def _measured(report: LoadTestReport) -> list[LoadPoint]:
    return [point for point in report.points if point.latency.p50_ns is not None]


def latency_against_throughput(report: LoadTestReport, verdict: Verdict | None, unit: Unit) -> str | None:
    """Return p50 and p99 against throughput, with the knee and the latency gates. `None` below two levels.

    Args:
        report: result of a load test, with a point per level.
        verdict: outcome of the gates. `None`: there are no gates.
        unit: the latencies' unit and its size in nanoseconds, from `latency_unit`.
    """
    points = sorted(_measured(report), key=lambda point: (point.mode, point.level))
    if len(points) < 2:
        return None
    name, size = unit
    lows = [(point.latency.p50_ns or 0) / size for point in points]
    highs = [(point.latency.p99_ns or 0) / size for point in points]
    limits = _limits(verdict, size)
    reach = max(highs)
    shown = [limit for limit in limits if limit[0] <= 3 * reach]
    is_log = reach / max(min(lows), 1e-9) > 20
    chart = Chart(
        "Latency against throughput",
        f"{len(points)} load levels; the table of load levels has the numbers.",
        ChartAxis.around("throughput, inferences/s", [point.throughput_per_s for point in points]),
        ChartAxis.around(f"latency, {name}", [*lows, *highs, *(limit for limit, _ in shown)], is_log=is_log),
    )
    for series, (label, values) in enumerate((("p50", lows), ("p99", highs))):
        for mode in dict.fromkeys(point.mode for point in points):
            pairs = [
                (point.throughput_per_s, value)
                for point, value in zip(points, values, strict=True)
                if point.mode == mode
            ]
            chart.line(label if mode == points[0].mode else "", pairs, series, dashed=mode != points[0].mode)
        chart.marks(
            [
                (
                    point.throughput_per_s,
                    value,
                    f"{point.label}: {label} {format_number(value)} {name}, {point.throughput_per_s:.0f}/s",
                )
                for point, value in zip(points, values, strict=True)
            ],
            series,
        )
    for point, high in zip(points, highs, strict=True):
        chart.label(
            point.throughput_per_s, high, f"{point.level:g}" if point.mode == "concurrency" else f"{point.level:g}/s"
        )
        if point.label == report.knee:
            chart.marks(
                [(point.throughput_per_s, (point.latency.p50_ns or 0) / size, f"knee: {point.label}")], 0, ring=True
            )
            chart.label(point.throughput_per_s, (point.latency.p50_ns or 0) / size, "knee", above=False)
    for limit, text in shown:
        chart.limit(limit, text)
    return chart.render()


def _limits(verdict: Verdict | None, size: float) -> list[tuple[float, str]]:
    """Return the latency gates of a verdict: limit in the chart's unit, and text."""
    names = {name for metric in METRICS if metric.is_latency for name in (metric.key, *metric.aliases)}
    texts = dict.fromkeys(result.gate for result in verdict.results) if verdict is not None else {}
    gates = [parse_slo(text) for text in texts if text.split("<")[0].strip().lower() in names]
    return [(gate.limit / size, gate.text) for gate in gates]


def percentile_curves(report: LoadTestReport, unit: Unit) -> str | None:
    """Return latency by percentile, the tail stretched, or `None` when no level has a histogram."""
    points = [point for point in _measured(report) if point.curve]
    if not points:
        return None
    step = max(math.ceil(len(points) / _MAX_CURVES), 1)
    points = [*points[:-1:step], points[-1]][-_MAX_CURVES:] if len(points) > 1 else points
    name, size = unit
    ticks = tuple((_stretched(share), f"p{share * 100:g}") for share in (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999))
    values = [value / size for point in points for _, value in point.curve]
    is_log = max(values) / max(min(values), 1e-9) > 30
    chart = Chart(
        "Latency by percentile",
        "One line a load level, over all measured requests.",
        ChartAxis("percentile of the requests", 0.0, _stretched(0.9999), ticks=ticks),
        ChartAxis.around(f"latency, {name}", values, is_log=is_log),
    )
    for series, point in enumerate(points):
        pairs = [(_stretched(share), value / size) for share, value in point.curve if share <= 0.9999]
        chart.line(point.label.replace("concurrency ", "c="), pairs, series)
    return chart.render()


def _stretched(share: float) -> float:
    """Spread the tail out: every further nine takes the same room."""
    return -math.log10(max(1 - share, 1e-5))


def latency_over_time(point: LoadPoint, unit: Unit) -> str | None:
    """Return p50 and p99 of each slice of time with the used windows shaded, or `None` without a series."""
    series = [piece for piece in point.series if piece.p50_ns is not None]
    if len(series) < 3:
        return None
    name, size = unit
    highs = [(piece.p99_ns or 0) / size for piece in series]
    end = series[-1].t_s + (series[1].t_s - series[0].t_s)
    chart = Chart(
        f"Latency over time at {point.label}",
        f"{len(point.windows)} windows; the shaded ones make the row of the table.",
        ChartAxis("seconds from the start of the load", 0.0, end),
        ChartAxis.around(f"latency, {name}", highs, is_log=max(highs) > 30 * max(min(highs), 1e-9)),
        height=240.0,
    )
    for window in point.windows:
        if window.used:
            words = f"window of {window.duration_s:.2g} s: {window.throughput_per_s:.0f}/s"
            chart.band(window.start_s, window.start_s + window.duration_s - 0.01 * window.duration_s, words)
    half = (series[1].t_s - series[0].t_s) / 2
    for number, values in enumerate(([(piece.p50_ns or 0) / size for piece in series], highs)):
        chart.line(
            ("p50", "p99")[number], [(piece.t_s + half, y) for piece, y in zip(series, values, strict=True)], number
        )
    return chart.render()


def server_times(report: LoadTestReport, unit: Unit) -> str | None:
    """Return stacked mean times: the server's stages, and the rest (network, client). `None` without any."""
    name, size = unit
    rows = []
    for point in report.points:
        server, mean = point.server, point.latency.mean_ns
        if server is None or mean is None or server.queue_ns is None:
            continue
        stages = [server.queue_ns, server.compute_input_ns, server.compute_infer_ns, server.compute_output_ns]
        parts = [(stage or 0.0) / size for stage in stages]
        rows.append((point.label, [*parts, max(mean / size - sum(parts), 0.0)]))
    if not rows:
        return None
    names = ("queue", "compute input", "compute infer", "compute output", "network and client")
    return stacked_bars("Where the mean latency goes", "Mean times of a request by stage.", rows, names, name)


def ratio_by_batch_size(comparisons: Sequence[Comparison], number: str = "throughput") -> str | None:
    """Return the ratio B/A of one number by batch size with its intervals, or `None` when nothing was compared."""
    found = [
        (math.log2(comparison.batch_size), str(comparison.batch_size), item)
        for comparison in comparisons
        for item in comparison.numbers
        if item.name == number
    ]
    return _ratios(f"Ratio of {number}, B to A", "batch size", found, is_line=True) if found else None


def ratios_of_numbers(comparison: Comparison) -> str | None:
    """Return the ratio B/A of each number of one comparison with its interval, or `None` when nothing was compared."""
    found = [(float(at), item.name.removesuffix(" latency"), item) for at, item in enumerate(comparison.numbers)]
    return _ratios("Ratios, B to A", "", found, is_line=False) if found else None


def _ratios(title: str, across: str, found: Sequence[tuple[float, str, ComparedNumber]], *, is_line: bool) -> str:
    """Draw ratios side by side: position on the horizontal axis, text below it, and the ratio."""
    places = [at for at, _, _ in found]
    ends = [end for _, _, item in found for end in (item.interval.low, item.interval.high, 1.0)]
    is_wide = min(ends) > 0 and max(ends) / min(ends) > 4
    room = 0.1 * max(max(ends) - min(ends), 0.02)
    room_for_text = max(0.5, (0.2 if is_line else 0.35) * (max(places) - min(places)))
    ticks = tuple({at: text for at, text, _ in found}.items())
    chart = Chart(
        title,
        "Marks are ratios, bars their simultaneous intervals; 1 means no difference.",
        ChartAxis(
            across,
            min(places) - room_for_text,
            max(places) + 0.5,
            ticks=ticks,
        ),
        ChartAxis.around("B / A", ends, is_log=True)
        if is_wide
        else ChartAxis("B / A", min(ends) - room, max(ends) + room),
    )
    chart.limit(1.0, "no difference")
    if is_line:
        chart.line("", [(at, item.ratio) for at, _, item in found], 0)
    for at, text, item in found:
        chart.span(at, item.interval.low, item.interval.high, 0)
        words = f"{across} {text}: {item.ratio:.3f} [{item.interval.low:.3f}, {item.interval.high:.3f}]".strip()
        chart.marks([(at, item.ratio, words)], 0)
    return chart.render()
