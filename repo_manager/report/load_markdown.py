"""A load test as Markdown, for a job's summary or a comment on a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from repo_manager.gates.units import TIME
from repo_manager.gates.verdict import Verdict
from repo_manager.loadtest.compare import Comparison
from repo_manager.loadtest.metrics import metrics_in
from repo_manager.loadtest.result import LoadTestReport
from repo_manager.report.load_charts import latency_unit, number_cell

__all__ = ["compare_markdown", "load_markdown"]

_HEADS = {"throughput": "inferences/s"}
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
    metrics = metrics_in("markdown")
    heads = [
        f"{metric.key} {unit}" if metric.unit is TIME else _HEADS.get(metric.key, metric.key) for metric in metrics
    ]
    head = ["level", "outcome", *heads, "errors"]
    rows = [
        [point.label, point.outcome, *(number_cell(metric, point, size) for metric in metrics), str(point.errors)]
        for point in report.points
    ]
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
