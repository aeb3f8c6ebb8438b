"""What `loadtest` and `loadtest merge` share: gates, files, the result and its exit code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.cli.options import writing
from repo_manager.errors import GateError, InconclusiveError, ServerRefusedError

if TYPE_CHECKING:
    from repo_manager.loadtest import LoadTestReport, Verdict
    from repo_manager.report.terminal import Terminal

__all__ = ["Over", "Reports", "Slo", "raise_for", "show_report", "split_gates"]

Slo = Annotated[
    list[str] | None,
    typer.Option("--slo", metavar="GATE", help='"p99<20ms", "throughput>500", "errors<0.1%" (may be given often).'),
]
Over = Annotated[str, typer.Option("--slo-over", help="every: each level holds the gates; some: one level does.")]
Reports = Annotated[
    list[Path] | None,
    typer.Option("--report", metavar="FILE", help="Also .html, .json, .md, .xml (JUnit) or .prom; repeatable."),
]


def show_report(terminal: Terminal, report: LoadTestReport, verdict: Verdict | None, files: tuple[Path, ...]) -> None:
    """Write the report's files and print it, each with the verdict."""
    from repo_manager.files import write_atomic
    from repo_manager.report.load_files import report_text
    from repo_manager.report.load_tables import load_view, verdict_view
    from repo_manager.types import as_json

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


def split_gates(texts: list[str] | None) -> list[str]:
    """Several gates may stand in one text, separated by commas."""
    return [part.strip() for text in texts or [] for part in text.split(",") if part.strip()]
