"""The whole path on the shipped model: quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repo_manager.cli.options import JsonOutput, Quiet

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("quickstart")(quickstart_command)


def quickstart_command(
    directory: Annotated[
        Path | None,
        typer.Option("--directory", "-d", metavar="DIR", help="Where to work [default: ./repo-manager-quickstart]."),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.2, help="How long each load level is measured.")] = 2.0,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Take a shipped sparse model the whole way on this machine, and show what comes out.

    Inspect, FP16 and INT8, add, a real tritonserver, deploy, load test, report. No process is left behind.
    """
    from repo_manager.files import write_atomic
    from repo_manager.pipeline.quickstart import quickstart
    from repo_manager.report.quickstart_html import quickstart_page
    from repo_manager.report.quickstart_tables import quickstart_view
    from repo_manager.report.terminal import Terminal

    terminal = Terminal(as_json=json, quiet=quiet)
    result = quickstart(directory, seconds_per_level=seconds, report=terminal.reporter())
    page = result.folder / "report.html"
    write_atomic(page, quickstart_page(result).encode())
    terminal.result({"result": result, "report": page}, *quickstart_view(result, page))
