"""What this machine has: doctor."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.cli.connection import Connection, client_options, connecting
from repo_manager.cli.options import JsonOutput, Quiet, Repository, resolve_repository
from repo_manager.errors import UsageError

if TYPE_CHECKING:
    from repo_manager.engine import FitTarget

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("doctor")(doctor)


@connecting
def doctor(
    repository: Repository = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="URL", help="Check the repository's engines against this running server."),
    ] = None,
    for_server: Annotated[
        str | None,
        typer.Option("--for-server", metavar="26.07[:9.0]", help="... against this Triton release (and GPU)."),
    ] = None,
    *,
    connection: Connection,
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
    """Show what this machine has, what is missing, and what that would bring; and whether engines will load."""
    from repo_manager.pipeline.doctor import examine_engines, examine_machine
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
    where = ""
    if repository is not None or to is not None or for_server is not None:
        where, target = _target(to, for_server, connection)
        engines = examine_engines(resolve_repository(repository), target)
        machine = dataclasses.replace(machine, engines=engines)
    terminal.result(machine, *machine_view(machine, where))


def _target(to: str | None, for_server: str | None, connection: Connection) -> tuple[str, FitTarget]:
    """Return the server in words, and what is known of it."""
    from repo_manager.cli.engine_options import parse_server
    from repo_manager.engine import fit_target_of

    if for_server is not None:
        if to is not None:
            raise UsageError("--to and --for-server both name a server", hint="Give one of them.")
        return f"Triton {for_server}", parse_server(for_server)
    if to is None:
        return "the embedded server of this machine", fit_target_of("", embedded=True)
    from repo_manager.server import TritonClient

    client = TritonClient.connect(to, client_options(connection, [to]))
    version = client.metadata().version
    return f"{to} (Triton {version})", fit_target_of(version)
