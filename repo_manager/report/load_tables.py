"""A load test's points and gates as rich renderables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.tables import format_share, make_table

if TYPE_CHECKING:
    from repo_manager.loadtest import Comparison, LoadPoint, LoadTestReport, Verdict

__all__ = ["comparison_view", "format_ms", "load_view", "verdict_view"]

_STYLES = {
    "stable": "green",
    "failed": "red",
    "unstable": "yellow",
    "over_limit": "yellow",
    "pass": "green",
    "fail": "red",
}


def format_ms(nanoseconds: float | None) -> str:
    """Format a latency in milliseconds; `-` when it is not known."""
    return "-" if nanoseconds is None else f"{nanoseconds / 1e6:.3g}"


def load_view(report: LoadTestReport) -> list[RenderableType]:
    """Show one row per load level, and what a reader has to know."""
    target = report.target
    title = f"{target.model} version {target.version or '?'} on {target.url} ({target.server} {target.server_version})"
    columns = ["load", "outcome", "inf/s", "p50", "p90", "p95", "p99", "errors", "queue", "compute", "batch", "client"]
    rows = [_row(point) for point in report.points]
    views: list[RenderableType] = [
        make_table(title, columns, rows, right="inf/s,p50,p90,p95,p99,errors,queue,compute,batch"),
        Text("Latencies and server times in milliseconds; inf/s: inferences a second.", style="dim"),
    ]
    for point in report.points:
        views += [
            Text(f"{point.label}: {error.count} x {error.message}", style="red") for error in point.error_messages
        ]
        if point.outcome != "stable" or point.client.bottleneck:
            views.append(Text(f"{point.label}: {'; '.join(filter(None, [point.reason, point.client.note]))}"))
    if report.knee is not None:
        views.append(Text(f"Knee: {report.knee} ({report.knee_rule})"))
    return [*views, *(Text(f"Note: {note}") for note in report.notes)]


def _row(point: LoadPoint) -> list[object]:
    latency, server = point.latency, point.server
    compute = None
    if server is not None and server.compute_infer_ns is not None:
        compute = sum(t or 0 for t in (server.compute_input_ns, server.compute_infer_ns, server.compute_output_ns))
    client = point.client.name if point.client.cpu_share is None else f"{format_share(point.client.cpu_share)} CPU"
    return [
        point.label,
        Text(point.outcome, style=_STYLES.get(point.outcome, "")),
        f"{point.throughput_per_s:,.1f}",
        *(format_ms(value) for value in (latency.p50_ns, latency.p90_ns, latency.p95_ns, latency.p99_ns)),
        point.errors,
        format_ms(None if server is None else server.queue_ns),
        format_ms(compute),
        "-" if server is None or server.mean_batch is None else f"{server.mean_batch:.2f}",
        "bottleneck" if point.client.bottleneck else client,
    ]


def comparison_view(comparisons: Sequence[Comparison]) -> list[RenderableType]:
    """Show the ratio of every number with its interval, and the verdict in words."""
    views: list[RenderableType] = []
    for comparison in comparisons:
        rows = [
            [
                number.name,
                _number(number.name, number.a),
                _number(number.name, number.b),
                f"{number.ratio:.3f}",
                f"{number.interval.low:.3f} to {number.interval.high:.3f}",
                number.better or "no difference shown",
            ]
            for number in comparison.numbers
        ]
        a, b = (f"{side.model}:{side.version}" for side in (comparison.a, comparison.b))
        title = (
            f"A = {a}, B = {b}: {comparison.level}, batch size {comparison.batch_size}, {comparison.plan.pairs} pairs"
        )
        columns = ["number", "A", "B", "B / A", "interval", "better"]
        views.append(make_table(title, columns, rows, right="A,B,B / A,interval"))
        views.append(Text(comparison.verdict))
        views += [Text(f"Note: {note}") for note in comparison.notes]
    return views


def _number(name: str, value: float) -> str:
    return f"{format_ms(value)} ms" if "latency" in name else f"{value:,.4g}"


def verdict_view(verdict: Verdict) -> list[RenderableType]:
    """Show each gate's outcome at each level, and the whole."""
    rows = [
        [
            result.gate,
            result.level,
            Text(str(result.outcome), style=_STYLES.get(str(result.outcome), "yellow")),
            result.reason,
        ]
        for result in verdict.results
    ]
    views: list[RenderableType] = [make_table("Gates", ["gate", "load", "outcome", "why"], rows)]
    if verdict.largest_holding is not None:
        views.append(Text(f"Largest load that holds every gate: {verdict.largest_holding}"))
    return views
