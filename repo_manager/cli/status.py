"""What servers serve: status."""

from __future__ import annotations

import dataclasses

import typer

from repo_manager.cli.connection import Connection, client_options
from repo_manager.cli.option_groups import grouped, option
from repo_manager.cli.options import Output
from repo_manager.cli.repository_options import AnyModelName, RepositoryFlag
from repo_manager.errors import ServerError, ServerUnreachableError
from repo_manager.report.rollout_tables import status_view
from repo_manager.repository import Location, find_model
from repo_manager.rollout.status import ModelStatus, status
from repo_manager.rollout.targets.urls import resolve_targets
from repo_manager.server import TritonClient, running_server
from repo_manager.settings import load_settings

__all__ = ["app"]

app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class StatusFlags:
    """Which servers are asked."""

    to: list[str] | None = option(
        "--to", metavar="URL", help="Servers to ask, as for deploy (may be given often) [default: the running serve]."
    )
    timeout: float = option(
        "--timeout", metavar="SECONDS", default=10.0, min=0.1, help="How long to wait for a server."
    )

    def urls(self, root: Location) -> list[str]:
        """Return the servers that are named, else the one of the settings, else the running `serve`.

        Raises:
            ServerUnreachableError: there is none.
        """
        texts = list(self.to or filter(None, [load_settings().server]))
        if texts:
            return texts
        running = running_server(root)
        if running is None:
            raise ServerUnreachableError(
                f"No server runs on {root}", hint="Start one: repo-manager serve, or use --to."
            )
        return [running.http_url]


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
    root = place.root()
    if name is not None:
        find_model(root, name)
    targets = resolve_targets(flags.urls(root))
    how = client_options(connection, [target.url for target in targets])
    how = dataclasses.replace(how, timeout_s=flags.timeout)
    found: list[ModelStatus] = []
    silent: dict[str, ServerError] = {}
    for target in targets:
        try:
            with TritonClient.connect(target.url, target.options(how)) as client:
                found += status(root, client, (name,) if name else ())
        except ServerError as exc:
            silent[target.url] = exc
    if silent and not found:
        hints = dict.fromkeys(exc.hint for exc in silent.values() if exc.hint)
        raise ServerUnreachableError("; ".join(exc.message for exc in silent.values()), hint=" ".join(hints) or None)
    reasons = {url: exc.message for url, exc in silent.items()}
    terminal.result({"models": found, "unreachable": reasons}, *status_view(found, reasons))
    if silent:
        raise typer.Exit(ServerUnreachableError.exit_code)
