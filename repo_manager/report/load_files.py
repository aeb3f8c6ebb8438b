"""A load test's report as a file: JSON, HTML, Markdown, JUnit or OpenMetrics, as the file's ending asks for."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

from repo_manager.errors import UsageError, redacted
from repo_manager.gates import TIME, Outcome, Verdict
from repo_manager.loadtest.compare import Comparison
from repo_manager.loadtest.metrics import METRICS, metrics_in
from repo_manager.loadtest.result import LoadPoint, LoadTestReport
from repo_manager.report.load_charts import latency_unit, number_cell
from repo_manager.report.load_html import load_page
from repo_manager.report.load_tables import DETAIL_TITLES, format_ms, ordered_details
from repo_manager.report.markdown import markdown_code, markdown_table, markdown_text
from repo_manager.report.plain import plain
from repo_manager.types import StrPath, as_json

__all__ = ["check_report_path", "compare_markdown", "load_junit", "load_markdown", "load_openmetrics", "report_text"]


# Gates as JUnit XML: CI systems show them as test results.

_JUNIT_KINDS = {"failed": "failure", "overloaded": "failure", "unstable": "skipped", "over_limit": "skipped"}


def load_junit(report: LoadTestReport, verdict: Verdict | None = None) -> str:
    """Return one test case a gate and level, one a level for its measurement, and one for a search.

    A failed gate is a failure, an inconclusive one an error (it is not known), an unstable level a skipped case. The
    levels of a search go beyond the server's capacity: only one without any answer is a failure of its own.

    Args:
        report: result of the load test.
        verdict: outcome of the gates. `None`: there are no gates.
    """
    name = f"loadtest.{report.target.model}"
    suite = ElementTree.Element("testsuite", name=name, timestamp=report.started, time=f"{report.seconds:.3f}")
    counts = {"failure": 0, "error": 0, "skipped": 0}
    for point in report.points:
        kind = _JUNIT_KINDS.get(point.outcome) if report.search is None or point.outcome == "failed" else None
        case = _case(suite, name, f"{point.label} is measured", f"{point.duration_s:.3f}")
        if kind is not None:
            counts[kind] += 1
            ElementTree.SubElement(case, kind, message=point.reason)
    undecided = {Outcome.FAIL: "failure", Outcome.INCONCLUSIVE: "error"}
    if report.search is not None:
        title = f"largest {report.search.mode} that holds {', '.join(report.search.gates)}"
        case = _case(suite, name, title, f"{sum(step.seconds for step in report.search.steps):.3f}")
        kind = undecided.get(Outcome(report.search.outcome))
        if kind is not None:
            counts[kind] += 1
            ElementTree.SubElement(case, kind, message=report.search.reason)
    for result in verdict.results if verdict is not None else ():
        case = _case(suite, name, f"{result.gate} at {result.level}", "0")
        kind = undecided.get(result.outcome)
        if kind is not None:
            counts[kind] += 1
            ElementTree.SubElement(case, kind, message=result.why)
    suite.set("tests", str(len(suite)))
    for kind, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(attribute, str(counts[kind]))
    for element in suite.iter():
        element.attrib = {name: _xml(value) for name, value in element.attrib.items()}
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """Return a text with characters forbidden in XML 1.0, even escaped, written out."""
    return plain(text).replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")


def _case(suite: ElementTree.Element, suite_name: str, name: str, seconds: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=suite_name, name=name, time=seconds)


# A load test as OpenMetrics text, for a push gateway or a node exporter's text file collector.


def load_openmetrics(report: LoadTestReport, verdict: Verdict | None = None) -> str:
    """Return gauges and latency summaries by model, version and load level, ended by `# EOF`.

    Args:
        report: result of the load test.
        verdict: outcome of the gates. `None`: there are no gates.
    """
    rows: dict[str, list[str]] = {}
    for point in report.points:
        labels = _labels(report, point)
        for metric in METRICS:
            value = metric.get(point)
            if metric.export is None or value is None:
                continue
            quantile = f',quantile="{metric.export.quantile}"' if metric.export.quantile else ""
            number = value * metric.export.scale
            rows.setdefault(metric.export.family, []).append(f"{{{labels}{quantile}}} {number!r}")
        rows.setdefault("requests", []).append(f"{{{labels}}} {point.requests}")
        rows.setdefault("errors", []).append(f"{{{labels}}} {point.errors}")
        rows.setdefault("stable", []).append(f"{{{labels}}} {int(point.outcome == 'stable')}")
    for result in verdict.results if verdict is not None else ():
        labels = (
            f'model="{_escaped(report.target.model)}",gate="{_escaped(result.gate)}",level="{_escaped(result.level)}"'
        )
        rows.setdefault("gate_passed", []).append(f"{{{labels}}} {int(result.outcome.value == 'pass')}")
    lines = []
    for name, samples in rows.items():
        lines.append(f"# TYPE repo_manager_loadtest_{name} gauge")
        lines += [f"repo_manager_loadtest_{name}{sample}" for sample in samples]
    return "\n".join([*lines, "# EOF"]) + "\n"


def _labels(report: LoadTestReport, point: LoadPoint) -> str:
    target = report.target
    pairs = {
        "model": target.model,
        "version": target.version,
        "protocol": target.protocol,
        "mode": point.mode,
        "level": f"{point.level:g}",
        "batch_size": str(point.batch_size),
    }
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs.items())


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# A load test as Markdown, for a job's summary or a comment on a pull request.

_HEADS = {"throughput": "inferences/s"}
_MARKS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "❔ inconclusive"}


def load_markdown(report: LoadTestReport, verdict: Verdict | None = None) -> str:
    """Return the report's levels, gates and notes as GitHub-flavoured Markdown.

    Args:
        report: result of the load test.
        verdict: outcome of the gates. `None`: there are no gates.
    """
    unit, size = latency_unit(report.points)
    target = report.target
    version = f", version {target.version}" if target.version else ""
    lines = [f"### Load test of {markdown_text(target.model)}{version}", ""]
    if verdict is not None:
        holding = f"; the highest level that holds every gate: {verdict.largest_holding}" if verdict.holding else ""
        lines += [f"**Gates: {_MARKS[verdict.outcome.value]}**{holding}", ""]
    if report.search is not None:
        found = [[step.label, step.decision, f"{step.seconds:.1f}", step.reason] for step in report.search.steps]
        gates = ", ".join("`" + gate.replace("`", "'") + "`" for gate in report.search.gates)
        lines += [
            f"**Largest load for {gates}: {_MARKS[report.search.outcome]}**: {markdown_text(report.search.reason)}",
            "",
        ]
        lines += [*markdown_table(["load", "decision", "seconds", "why"], found), ""]
    metrics = metrics_in("markdown")
    heads = [
        f"{metric.key} {unit}" if metric.unit is TIME else _HEADS.get(metric.key, metric.key) for metric in metrics
    ]
    head = ["level", "outcome", *heads, "errors"]
    rows = [
        [point.label, point.outcome, *(number_cell(metric, point, size) for metric in metrics), str(point.errors)]
        for point in report.points
    ]
    lines += markdown_table(head, rows)
    details = [
        [
            point.label,
            DETAIL_TITLES[name],
            f"{detail.per_s:,.1f}",
            *(format_ms(v) for v in (detail.latency.p50_ns, detail.latency.p99_ns)),
        ]
        for point in report.points
        for name, detail in ordered_details(point)
    ]
    if details:
        lines += ["", *markdown_table(["level", "what", "a second", "p50 ms", "p99 ms"], details)]
    if verdict is not None and verdict.results:
        found = [
            ["`" + r.gate.replace("`", "'") + "`", r.level, _MARKS[r.outcome.value], r.why] for r in verdict.results
        ]
        lines += ["", *markdown_table(["gate", "level", "outcome", "why"], found)]
    if report.knee is not None:
        lines += ["", f"Knee: {report.knee}, {report.knee_rule}."]
    lines += [f"\n{markdown_text(note)}" for note in report.notes]
    where = f"{target.server} {target.server_version} at {target.url}, backend {target.backend or 'unknown'}"
    lines += ["", *_origin(where, report.started, report.environment, report.command)]
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
    a, b = (f"{markdown_text(side.model)} {side.version}" for side in (first.a, first.b))
    title = f"### A: {a} against B: {b}"
    table = markdown_table(["batch", "number", "B / A", "interval", "better"], rows)
    sides = zip("AB", (first.a, first.b), first.precisions, strict=True)
    where = "; ".join(
        f"{label} at {side.url}, backend {side.backend or 'unknown'}{f', {precision}' if precision else ''}"
        for label, side, precision in sides
    )
    return "\n".join([title, "", *table, "", *_origin(where, first.started, first.environment, first.command)]) + "\n"


def _origin(where: str, started: str, environment: Mapping[str, str], command: str) -> list[str]:
    """Return the lines on place, time, machine and command of a measurement."""
    machine = ", ".join(environment[name] for name in ("machine", "cpu") if environment.get(name))
    count = f" ({environment['cpus']} CPUs)" if environment.get("cpus") else ""
    parts = [where, f"started {started}" if started else "", f"client: {machine}{count}" if machine else ""]
    lines = [markdown_text("; ".join(part for part in parts if part)) + "."]
    return [*lines, "", *markdown_code(command, "console")] if command else lines


def _json_text(report: LoadTestReport, verdict: Verdict | None) -> str:
    return json.dumps({**as_json(report), "verdict": as_json(verdict)}, indent=2) + "\n"


_WRITERS = {
    ".html": load_page,
    ".json": _json_text,
    ".md": load_markdown,
    ".xml": load_junit,
    ".prom": load_openmetrics,
}


def check_report_path(path: StrPath) -> Path:
    """Return the path when its ending names a format, before any load is made.

    Raises:
        UsageError: it does not.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise UsageError(
            f"--report {path}: the ending {path.suffix or '(none)'} names no format",
            hint="Expected .html, .json, .md (Markdown), .xml (JUnit) or .prom (OpenMetrics).",
        )
    return path


def report_text(path: StrPath, report: LoadTestReport, verdict: Verdict | None) -> str:
    """Return the report as the ending of `path` asks for it. See `check_report_path`.

    Args:
        path: name of the report, with the suffix of its format.
        report: result of the load test.
        verdict: outcome of the gates. `None`: there are no gates.
    """
    path = Path(path)
    return redacted(_WRITERS[path.suffix.lower()](report, verdict))
