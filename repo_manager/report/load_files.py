"""A load test's report in the format that a file's ending asks for."""

from __future__ import annotations

import json
from pathlib import Path

from repo_manager.errors import UsageError
from repo_manager.gates.verdict import Verdict
from repo_manager.loadtest.result import LoadTestReport
from repo_manager.report.load_html import load_page
from repo_manager.report.load_junit import load_junit
from repo_manager.report.load_markdown import load_markdown
from repo_manager.report.load_openmetrics import load_openmetrics
from repo_manager.types import as_json

__all__ = ["check_report_path", "report_text"]


def _json_text(report: LoadTestReport, verdict: Verdict | None) -> str:
    return json.dumps({**as_json(report), "verdict": as_json(verdict)}, indent=2) + "\n"


_WRITERS = {
    ".html": load_page,
    ".json": _json_text,
    ".md": load_markdown,
    ".xml": load_junit,
    ".prom": load_openmetrics,
}


def check_report_path(path: Path) -> Path:
    """Return the path when its ending names a format, before any load is made.

    Raises:
        UsageError: it does not.
    """
    if path.suffix.lower() not in _WRITERS:
        raise UsageError(
            f"--report {path}: the ending {path.suffix or '(none)'} names no format",
            hint="Expected .html, .json, .md (Markdown), .xml (JUnit) or .prom (OpenMetrics).",
        )
    return path


def report_text(path: Path, report: LoadTestReport, verdict: Verdict | None) -> str:
    """Return the report as the ending of `path` asks for it; see `check_report_path`."""
    return _WRITERS[path.suffix.lower()](report, verdict)
