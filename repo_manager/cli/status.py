"""What servers serve: status."""

from __future__ import annotations

import dataclasses

import typer

from repo_manager.cli.connection import Connection, client_options, urls_of
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import Output
from repo_manager.cli.repository_options import AnyModelName, RepositoryFlag
from repo_manager.errors import ServerUnreachableError
from repo_manager.pipeline.status import status
from repo_manager.report.rollout_tables import status_view
from repo_manager.settings import load_settings

__all__ = ["app"]

app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class StatusFlags:
    """Which servers are asked."""

    to: list[str] | None = option(
        "--to",
        metavar="URL",
        help="Servers to ask, k8s://namespace/release or kserve://namespace/name, as for deploy (may be given often) "
        "[default: the running serve].",
    )
    timeout: float = option(
        "--timeout", metavar="SECONDS", sets=(status, "timeout_s"), min=0.1, help="How long to wait for a server."
    )


@app.command("status")
@grouped
def status_command(
    name: AnyModelName = None,
    *,
    place: RepositoryFlag,
    flags: StatusFlags,
    output: Output,
    connection: Connection,
) -> None:
    """Show what servers serve, when it was deployed, what restarted since, and where they differ from the repository.

    Exit code 5 when a server does not answer; the others are shown.
    """
    terminal = output.terminal()
    to = tuple(flags.to or filter(None, [load_settings().server]))
    how = client_options(connection, urls_of(to))
    found = status(place.root(), name, to, **settings_of(status, flags), connection=how)
    terminal.result(found, *status_view(found))
    if found.unreachable:
        raise typer.Exit(ServerUnreachableError.exit_code)
