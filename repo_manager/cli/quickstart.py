"""The whole path on the shipped model: quickstart."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import typer

from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import Output
from repo_manager.files import write_atomic
from repo_manager.pipeline.quickstart import quickstart
from repo_manager.report.quickstart import quickstart_page, quickstart_view

__all__ = ["app"]

app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class QuickstartFlags:
    """Where, and how long."""

    directory: Path | None = option(
        "--directory",
        "-d",
        metavar="DIR",
        sets=(quickstart, "folder"),
        help="Where to work [default: ./repo-manager-quickstart].",
    )
    seconds: float = option(
        "--seconds", sets=(quickstart, "seconds_per_level"), min=0.2, help="How long each load level is measured."
    )


@app.command("quickstart")
@grouped
def quickstart_command(flags: QuickstartFlags, output: Output) -> None:
    """Take a shipped sparse model the whole way on this machine, and show what comes out.

    Inspect, FP16 and INT8, add, a real tritonserver, deploy, load test, report. No process is left behind.
    """
    terminal = output.terminal()
    result = quickstart(**settings_of(quickstart, flags), report=terminal.reporter())
    page = result.folder / "report.html"
    write_atomic(page, quickstart_page(result).encode())
    terminal.result({"result": result, "report": page}, *quickstart_view(result, page))
