"""Gates as JUnit XML: what CI systems show as test results."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from repo_manager.gates.verdict import Outcome, Verdict
from repo_manager.loadtest.result import LoadTestReport

__all__ = ["load_junit"]

_KINDS = {"failed": "failure", "overloaded": "failure", "unstable": "skipped", "over_limit": "skipped"}


def load_junit(report: LoadTestReport, verdict: Verdict | None = None) -> str:
    """Return one test case a gate and level, and one a level that says whether it was measured.

    A failed gate is a failure, an inconclusive one an error (it is not known), an unstable level a skipped case.
    """
    name = f"loadtest.{report.target.model}"
    suite = ElementTree.Element("testsuite", name=name, timestamp=report.started, time=f"{report.seconds:.3f}")
    counts = {"failure": 0, "error": 0, "skipped": 0}
    for point in report.points:
        kind = {"failed": "failure", "overloaded": "failure", "unstable": "skipped", "over_limit": "skipped"}.get(
            point.outcome
        )
        case = _case(suite, name, f"{point.label} is measured", f"{point.duration_s:.3f}")
        if kind is not None:
            counts[kind] += 1
            ElementTree.SubElement(case, kind, message=point.reason)
    for result in verdict.results if verdict is not None else ():
        case = _case(suite, name, f"{result.gate} at {result.level}", "0")
        kind = {Outcome.FAIL: "failure", Outcome.INCONCLUSIVE: "error"}.get(result.outcome)
        if kind is not None:
            counts[kind] += 1
            ElementTree.SubElement(case, kind, message=result.why)
    suite.set("tests", str(len(suite)))
    for kind, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(attribute, str(counts[kind]))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, suite_name: str, name: str, seconds: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=suite_name, name=name, time=seconds)
