"""A load test's points and gates as rich renderables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from repo_manager.gates import RATE, TIME
from repo_manager.loadtest.metrics import Metric, metric_of, metrics_in
from repo_manager.report.layout import make_table
from repo_manager.report.tables import format_share

if TYPE_CHECKING:
    from repo_manager.gates import Verdict
    from repo_manager.loadtest.compare import Comparison
    from repo_manager.loadtest.result import Detail, LoadPoint, LoadSearch, LoadTestReport, ServerTimes
    from repo_manager.stats.resampling import ComparedNumber

__all__ = [
    "DETAIL_TITLES",
    "comparison_view",
    "format_compared",
    "format_ms",
    "load_view",
    "ordered_details",
    "search_view",
    "verdict_view",
]

_MOST_TABLES = 3
_HEADS = {"throughput": "inf/s"}
DETAIL_TITLES = {
    "first": "to the first response",
    "between": "between responses",
    "sequence": "whole sequence",
}
# Columns dropped first on a narrow terminal. The load, its outcome, throughput, p50 and p99 always show.
_DROP = "client,batch,compute,queue,p99.9,p99.5,p95,p90,mean,errors"
_STYLES = {
    "stable": "green",
    "failed": "red",
    "overloaded": "red",
    "unstable": "yellow",
    "over_limit": "yellow",
    "pass": "green",
    "fail": "red",
    "holds": "green",
    "fails": "red",
}


def format_ms(nanoseconds: float | None) -> str:
    """Format a latency in milliseconds. `-` when it is not known.

    Args:
        nanoseconds: the latency, shown in milliseconds with three digits. `None`: unknown.
    """
    return "-" if nanoseconds is None else f"{nanoseconds / 1e6:.3g}"


def load_view(report: LoadTestReport) -> list[RenderableType]:
    """Show one row per load level, and the remarks."""
    target = report.target
    title = f"{target.model} version {target.version or '?'} on {target.url} ({target.server} {target.server_version})"
    numbers = [_HEADS.get(metric.key, metric.key) for metric in metrics_in("terminal")]
    server = ["queue", "compute", "batch"]
    columns = ["load", "outcome", *numbers, "errors", *server, "client"]
    rows = [_row(point) for point in report.points]
    views: list[RenderableType] = [
        make_table(title, columns, rows, right=",".join([*numbers, "errors", *server]), drop=_DROP),
        Text("Latencies and server times in milliseconds; inf/s: inferences a second.", style="dim"),
    ]
    views += [*details_view(report.points), *parts_view(report.points)]
    for point in report.points:
        views += [
            Text(f"{point.label}: {error.count} x {error.message}", style="red") for error in point.error_messages
        ]
        if point.outcome != "stable" or point.client.bottleneck:
            views.append(Text(f"{point.label}: {'; '.join(filter(None, [point.reason, point.client.note]))}"))
    if report.search is not None:
        views += search_view(report.search)
    if report.knee is not None:
        views.append(Text(f"Knee: {report.knee} ({report.knee_rule})"))
    sources = dict.fromkeys(point.gpu.source for point in report.points if point.gpu.source)
    energies = {
        p.label: p.gpu.energy_per_inference_j for p in report.points if p.gpu.energy_per_inference_j is not None
    }
    if energies:
        listed = ", ".join(f"{label} {joules:.3g} J" for label, joules in energies.items())
        views.append(Text(f"Energy per inference: {listed}"))
    return [*views, *(Text(f"Note: {note}") for note in (*sources, *report.notes))]


def ordered_details(point: LoadPoint) -> list[tuple[str, Detail]]:
    """Return the measurements besides whole requests, in the order of the titles."""
    return [(name, point.details[name]) for name in DETAIL_TITLES if name in point.details]


def details_view(points: Sequence[LoadPoint]) -> list[RenderableType]:
    """Show the numbers of sequences and of single responses. Nothing where there are none."""
    rows = [
        [
            point.label,
            DETAIL_TITLES[name],
            detail.count,
            f"{detail.per_s:,.1f}",
            *(format_ms(value) for value in (detail.latency.mean_ns, detail.latency.p50_ns, detail.latency.p90_ns)),
            *(format_ms(value) for value in (detail.latency.p99_ns, detail.latency.max_ns)),
        ]
        for point in points
        for name, detail in ordered_details(point)
    ]
    if not rows:
        return []
    columns = ["load", "what", "count", "a second", "mean", "p50", "p90", "p99", "max"]
    views: list[RenderableType] = [
        make_table("Sequences and responses", columns, rows, right=",".join(columns[2:]), drop="count,max,p90,mean")
    ]
    if any(point.responses_per_s is not None for point in points):
        listed = ", ".join(f"{p.label} {p.responses_per_s:,.1f}" for p in points if p.responses_per_s is not None)
        views.append(Text(f"The latency of a load is to the last response. Responses a second: {listed}."))
    return views


def parts_view(points: Sequence[LoadPoint]) -> list[RenderableType]:
    """Show a row for every model of an ensemble. Nothing for any other model."""
    rows = [
        [point.label, name, times.requests, *map(format_ms, stages_of(times)), _batch(times)]
        for point in points
        if point.server is not None
        for name, times in point.server.parts.items()
    ]
    if not rows:
        return []
    columns = ["load", "model", "requests", "queue", "input", "infer", "output", "batch"]
    return [make_table("Models of the ensemble", columns, rows, right=",".join(columns[2:]), drop="input,output,batch")]


def stages_of(times: ServerTimes) -> tuple[float | None, ...]:
    """Return the mean times of a request in the queue, and of its input, inference and output."""
    return times.queue_ns, times.compute_input_ns, times.compute_infer_ns, times.compute_output_ns


def _batch(times: ServerTimes | None) -> str:
    return "-" if times is None or times.mean_batch is None else f"{times.mean_batch:.2f}"


def _row(point: LoadPoint) -> list[object]:
    server = point.server
    compute = None
    if server is not None and server.compute_infer_ns is not None:
        compute = sum(t or 0 for t in (server.compute_input_ns, server.compute_infer_ns, server.compute_output_ns))
    client = point.client.name if point.client.cpu_share is None else f"{format_share(point.client.cpu_share)} CPU"
    return [
        point.label,
        Text(point.outcome, style=_STYLES.get(point.outcome, "")),
        *(_cell(metric, point) for metric in metrics_in("terminal")),
        point.errors,
        format_ms(None if server is None else server.queue_ns),
        format_ms(compute),
        _batch(server),
        "late sends" if point.client.is_late else "bottleneck" if point.client.bottleneck else client,
    ]


def _cell(metric: Metric, point: LoadPoint) -> str:
    value = metric.get(point)
    if metric.unit is TIME:
        return format_ms(value)
    return "-" if value is None else f"{value:,.1f}"


def comparison_view(comparisons: Sequence[Comparison]) -> list[RenderableType]:
    """Show the ratio of every number with its interval, and the verdict. Of many batch sizes one line each."""
    views: list[RenderableType] = []
    if len(comparisons) > _MOST_TABLES:
        views.append(_summary(comparisons))
    else:
        for comparison in comparisons:
            views += [_compared(comparison), Text(comparison.verdict)]
    notes = dict.fromkeys(note for comparison in comparisons for note in comparison.notes)
    return [*views, *(Text(f"Note: {note}") for note in notes)]


def _compared(comparison: Comparison) -> RenderableType:
    rows = [
        [
            number.name,
            format_compared(number.name, number.a),
            format_compared(number.name, number.b),
            f"{number.ratio:.3f}",
            f"{number.interval.low:.3f} to {number.interval.high:.3f}",
            number.better or "no difference shown",
        ]
        for number in comparison.numbers
    ]
    a, b = _names(comparison)
    title = f"A = {a}, B = {b}: {comparison.level}, batch size {comparison.batch_size}, {comparison.plan.pairs} pairs"
    return make_table(title, ["number", "A", "B", "B / A", "interval", "better"], rows, right="A,B,B / A,interval")


def _summary(comparisons: Sequence[Comparison]) -> RenderableType:
    """One line a comparison: the ratios, those with a difference shown in bold."""
    names = list(dict.fromkeys(number.name for comparison in comparisons for number in comparison.numbers))
    several = len(dict.fromkeys(_names(comparison) for comparison in comparisons)) > 1
    rows: list[list[object]] = []
    for comparison in comparisons:
        found = {number.name: number for number in comparison.numbers}
        better = {number.better for number in comparison.numbers if number.better is not None}
        rows.append(
            [
                *(_names(comparison) if several else ()),
                comparison.batch_size,
                *(_ratio(found.get(name)) for name in names),
                " and ".join(sorted(better)) or "-",
            ]
        )
    first = comparisons[0]
    who = "" if several else "A = {}, B = {}: ".format(*_names(first))
    title = f"{who}B / A by batch size, {first.level}, {first.plan.pairs} pairs; bold: a difference is shown"
    columns = [*(["A", "B"] if several else []), "batch", *names, "better"]
    return make_table(title, columns, rows, right=",".join(["batch", *names]))


def _ratio(number: ComparedNumber | None) -> Text:
    if number is None:
        return Text("-")
    text = f"{number.ratio:.3f} [{number.interval.low:.3f}, {number.interval.high:.3f}]"
    return Text(text, style="bold" if number.shown else "dim")


def _names(comparison: Comparison) -> tuple[str, str]:
    a, b = (f"{side.model}:{side.version}" for side in (comparison.a, comparison.b))
    return a, b


def format_compared(name: str, value: float) -> str:
    """Format a compared number with its unit."""
    unit = metric_of(name).unit
    if unit is TIME:
        return f"{format_ms(value)} ms"
    return (f"{value:,.0f}" if value >= 1000 else f"{value:.4g}") + ("/s" if unit is RATE else "")


def search_view(search: LoadSearch) -> list[RenderableType]:
    """Show every level of a search in the order of measurement, with its decision, and the answer."""
    rows = [
        [
            step.label,
            Text(step.decision, style=_STYLES.get(step.decision, "yellow")),
            f"{step.seconds:.1f}",
            step.reason,
        ]
        for step in search.steps
    ]
    title = f"Search for the largest {search.mode} that holds {', '.join(search.gates)}"
    answer = Text.assemble(("Search: ", "bold"), (search.outcome, _STYLES.get(search.outcome, "yellow")))
    return [
        make_table(title, ["load", "decision", "seconds", "why"], rows, right="seconds"),
        Text.assemble(answer, f": {search.reason}."),
    ]


def verdict_view(verdict: Verdict) -> list[RenderableType]:
    """Show each gate's outcome at each level, and the whole."""
    rows = [
        [
            result.gate,
            result.level,
            Text(str(result.outcome), style=_STYLES.get(str(result.outcome), "yellow")),
            result.why,
        ]
        for result in verdict.results
    ]
    views: list[RenderableType] = [make_table("Gates", ["gate", "load", "outcome", "why"], rows)] if rows else []
    if verdict.largest_holding is not None:
        views.append(Text(f"Largest load that holds every gate: {verdict.largest_holding}"))
    return views
