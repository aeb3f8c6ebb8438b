"""A load test as Markdown, for a job's summary or a comment on a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from repo_manager.loadtest.compare import Comparison
from repo_manager.loadtest.result import LoadTestReport
from repo_manager.loadtest.slo import Verdict
from repo_manager.report.load_charts import latency_unit
from repo_manager.report.svg import format_number

__all__ = ["compare_markdown", "load_markdown"]

_MARKS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "❔ inconclusive"}


def load_markdown(report: LoadTestReport, verdict: Verdict | None = None) -> str:
    """Return the report's levels, gates and notes as GitHub-flavoured Markdown."""
    unit, size = latency_unit(report.points)
    target = report.target
    version = f", version {target.version}" if target.version else ""
    lines = [f"### Load test of {_safe(target.model)}{version}", ""]
    if verdict is not None:
        holding = f"; the highest level that holds every gate: {verdict.largest_holding}" if verdict.holding else ""
        lines += [f"**Gates: {_MARKS[verdict.outcome.value]}**{holding}", ""]
    head = ["level", "outcome", "inferences/s", *(f"{name} {unit}" for name in ("p50", "p90", "p95", "p99")), "errors"]
    rows = []
    for point in report.points:
        latency = point.latency
        values = (latency.p50_ns, latency.p90_ns, latency.p95_ns, latency.p99_ns)
        rows.append(
            [
                point.label,
                point.outcome,
                format_number(point.throughput_per_s),
                *("-" if value is None else format_number(value / size) for value in values),
                str(point.errors),
            ]
        )
    lines += _table(head, rows)
    if verdict is not None and verdict.results:
        found = [[f"`{r.gate}`", r.level, _MARKS[r.outcome.value], r.why] for r in verdict.results]
        lines += ["", *_table(["gate", "level", "outcome", "why"], found)]
    if report.knee is not None:
        lines += ["", f"Knee: {report.knee}, {report.knee_rule}."]
    lines += [f"\n{_safe(note)}" for note in report.notes]
    return "\n".join(lines) + "\n"


def compare_markdown(comparisons: Sequence[Comparison]) -> str:
    """Return comparisons as one table."""
    rows = [
        [
            str(comparison.batch_size),
            number.name,
            f"{number.ratio:.3f}",
            f"{number.interval.low:.3f} to {number.interval.high:.3f}",
            number.better or "no difference shown",
        ]
        for comparison in comparisons
        for number in comparison.numbers
    ]
    first = comparisons[0]
    title = f"### A: {_safe(first.a.model)} {first.a.version} against B: {_safe(first.b.model)} {first.b.version}"
    return "\n".join([title, "", *_table(["batch", "number", "B / A", "interval", "better"], rows)]) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(_safe(cell) for cell in row) + " |" for row in rows),
    ]


def _safe(text: str) -> str:
    """Keep a text inside its cell."""
    return (
        text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
        if "`" not in text
        else text.replace("|", "\\|")
    )
