"""Reports of several load generators into one: loadtest merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repo_manager.cli.load_output import Over, Reports, Slo, raise_for, show_report, split_gates
from repo_manager.cli.options import JsonOutput, Quiet
from repo_manager.errors import UsageError

__all__ = ["merge"]


def merge(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES...", help="JSON reports of one load test.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="The merged report.")
    ] = None,
    slo: Slo = None,
    over: Over = "every",
    report: Reports = None,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Join the JSON reports of load generators that ran at the same time: rates added, histograms merged.

    Refused when model, configuration or times do not match. Exit codes as of loadtest.
    """
    from repo_manager.loadtest import judge, merge_reports, parse_slo, read_report
    from repo_manager.report.load_files import check_report_path
    from repo_manager.report.terminal import Terminal

    terminal = Terminal(as_json=json, quiet=quiet)
    gates = tuple(parse_slo(text) for text in split_gates(slo))
    paths = [check_report_path(path) for path in report or ()]
    if output is not None:
        if output.suffix.lower() != ".json":
            raise UsageError(f"--output {output}: the merged report is JSON", hint="Name it FILE.json; see --report.")
        paths.insert(0, output)
    merged = merge_reports([read_report(path) for path in files])
    verdict = judge(merged, gates, over=over) if gates else None
    show_report(terminal, merged, verdict, tuple(paths))
    raise_for(merged, verdict)
