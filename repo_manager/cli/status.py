"""The served state: status."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import typer
from rich.console import RenderableType
from rich.text import Text

from repo_manager.cli.connection import ConnectionFlags, client_options, urls_of
from repo_manager.cli.durations import seconds_option
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import Output
from repo_manager.cli.repository_options import AnyModelName, RepositoryFlag
from repo_manager.errors import ServerError, ServerUnreachableError
from repo_manager.pipeline.status import status, watch_status
from repo_manager.report.rollout_tables import status_view
from repo_manager.rollout.status import RepositoryStatus
from repo_manager.settings import load_settings

__all__ = ["app"]

app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class StatusFlags:
    """The servers to ask."""

    to: list[str] | None = option(
        "--to",
        metavar="URL",
        help="Servers to ask, k8s://namespace/release or kserve://namespace/name, as for deploy (may be given often) "
        "[default: the running serve].",
    )
    timeout: float = seconds_option("--timeout", sets=(status, "timeout_s"), help="How long to wait for a server.")
    watch: bool = option(
        "--watch",
        "-w",
        default=False,
        help="Repeat until Ctrl-C: in place on a terminal, else print each change (with --json one per line).",
    )
    interval: float = seconds_option("--interval", sets=(watch_status, "interval_s"), help="Interval of --watch.")


@app.command("status")
@grouped
def status_command(
    name: AnyModelName = None,
    *,
    place: RepositoryFlag,
    flags: StatusFlags,
    output: Output,
    connection: ConnectionFlags,
) -> None:
    """Show what servers serve, when it was deployed, what restarted since, and where they differ from the repository.

    Exit code 5 when a server does not answer. The others are shown.
    """
    terminal = output.terminal()
    to = tuple(flags.to or filter(None, [load_settings().server]))
    how = client_options(connection, urls_of(to))
    root, timeout = place.root(), settings_of(status, flags)
    if flags.watch:
        terminal.watch(
            _frames(watch_status(root, name, to, **settings_of(watch_status, flags), **timeout, connection=how))
        )
        return
    found = status(root, name, to, **timeout, connection=how)
    terminal.result(found, *status_view(found))
    if found.unreachable:
        raise typer.Exit(ServerUnreachableError.exit_code)


def _frames(seen: Iterable[RepositoryStatus | ServerError]) -> Iterator[tuple[object, list[RenderableType]]]:
    """Yield the view of each look."""
    for found in seen:
        if not isinstance(found, ServerError):
            yield found, status_view(found)
            continue
        error = {
            "type": type(found).__name__,
            "message": found.message,
            "hint": found.hint,
            "exit_code": found.exit_code,
        }
        yield {"error": error}, [Text(found.message, style="red"), *([Text(found.hint)] if found.hint else [])]
