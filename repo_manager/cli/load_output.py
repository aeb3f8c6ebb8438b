"""What `loadtest` and `loadtest merge` share: gates, files, the result and its exit code."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from repo_manager.cli.option_groups import option, settings_of
from repo_manager.cli.options import writing
from repo_manager.errors import GateError, InconclusiveError, ServerRefusedError
from repo_manager.files import write_atomic
from repo_manager.gates.parse import Gate
from repo_manager.gates.verdict import Verdict
from repo_manager.loadtest.judge import Over, judge, parse_slo
from repo_manager.loadtest.result import LoadTestReport
from repo_manager.report.load_files import check_report_path, report_text
from repo_manager.report.load_tables import load_view, verdict_view
from repo_manager.report.terminal import Terminal
from repo_manager.types import as_json

__all__ = ["GateFlags", "raise_for", "show_report"]


@dataclasses.dataclass(frozen=True)
class GateFlags:
    """What decides the exit code, and the files of the report."""

    PANEL: ClassVar[str] = "Gates and reports"
    slo: list[str] | None = option(
        "--slo", metavar="GATE", help='"p99<20ms", "throughput>500", "errors<0.1%" (may be given often).'
    )
    over: Over = option(
        "--slo-over",
        sets=(judge, "over"),
        help="every: all levels must pass. some: one level that passes every gate is enough.",
    )
    report: list[Path] | None = option(
        "--report", metavar="FILE", help="Also .html, .json, .md, .xml (JUnit) or .prom (may be given often)."
    )

    def gates(self) -> tuple[Gate, ...]:
        """Return the gates; several may be in one text, separated by commas.

        Raises:
            UsageError: one cannot be read.
        """
        parts = (part.strip() for text in self.slo or [] for part in text.split(","))
        return tuple(parse_slo(part) for part in parts if part)

    def files(self) -> tuple[Path, ...]:
        """Return the files of the report.

        Raises:
            UsageError: an ending is none of a report.
        """
        return tuple(check_report_path(path) for path in self.report or ())

    def judge(self, report: LoadTestReport) -> Verdict:
        """Return what the gates say of a report."""
        return judge(report, self.gates(), **settings_of(judge, self))


def show_report(terminal: Terminal, report: LoadTestReport, verdict: Verdict | None, files: tuple[Path, ...]) -> None:
    """Write the report's files and print it, each with the verdict."""
    for path in files:
        with writing(path):
            write_atomic(path, report_text(path, report, verdict).encode())
        terminal.note(f"Report: {path}")
    views = [] if verdict is None else verdict_view(verdict)
    terminal.result({**as_json(report), "verdict": as_json(verdict)}, *load_view(report), *views)


def raise_for(report: LoadTestReport, verdict: Verdict | None) -> None:
    """Turn what was found, and shown, into an exit code: the server's failure first, then the gates.

    Raises:
        ServerRefusedError: a level failed.
        GateError: a gate failed.
        InconclusiveError: a gate is neither passed nor failed.
    """
    failed = [point.label for point in report.points if point.outcome == "failed"]
    if len(failed) == len(report.points):
        raise ServerRefusedError("No load level could be measured", hint="See the reasons above.", is_shown=True)
    if failed:
        raise ServerRefusedError(
            f"{len(failed)} of {len(report.points)} load levels failed: {', '.join(failed)}",
            hint="See the reasons above.",
            is_shown=True,
        )
    outcome = None if verdict is None else str(verdict.outcome)
    if outcome == "fail":
        raise GateError("A gate failed", hint="See the table of gates above.", is_shown=True)
    if outcome == "inconclusive":
        raise InconclusiveError(
            "The measurement does not decide",
            hint="The gates' table says why: measure longer (--duration), or on a quieter machine.",
            is_shown=True,
        )
