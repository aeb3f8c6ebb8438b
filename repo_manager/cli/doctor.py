"""What this machine has: doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from repo_manager.cli.options import JsonOutput, Quiet

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("doctor")(doctor)


def doctor(
    install_perf_analyzer: Annotated[
        bool, typer.Option("--install-perf-analyzer", help="Fetch NVIDIA's perf_analyzer by pip into the user's cache.")
    ] = False,
    install_tritonserver: Annotated[
        bool,
        typer.Option("--install-tritonserver", help="Fetch the embedded tritonserver likewise (for Python 3.13)."),
    ] = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Show what this machine has, what is missing, and what that would bring."""
    from repo_manager.pipeline.doctor import examine_machine
    from repo_manager.report.machine_tables import machine_view
    from repo_manager.report.terminal import Terminal

    terminal = Terminal(as_json=json, quiet=quiet)
    if install_perf_analyzer:
        from repo_manager.loadtest import install_perf_analyzer as install

        terminal.note(f"perf_analyzer: {install().binary}")
    if install_tritonserver:
        from repo_manager.server.install import install_tritonserver as install_server

        terminal.note(f"tritonserver: {install_server()}")
    machine = examine_machine()
    terminal.result(machine, *machine_view(machine))
