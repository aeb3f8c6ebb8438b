"""Putting versions into service: deploy, rollback, status."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.cli.connection import Connection, client_options, connecting
from repo_manager.cli.options import (
    DryRun,
    JsonOutput,
    ModelName,
    Quiet,
    Repository,
    Timeout,
    To,
    resolve_repository,
)

if TYPE_CHECKING:
    from repo_manager.report.terminal import Terminal
    from repo_manager.repository.location import Location
    from repo_manager.rollout import ModelStatus, Rollout, RolloutOptions
    from repo_manager.server import TritonClient

__all__ = ["register"]

KeepPrevious = Annotated[
    bool,
    typer.Option("--keep-previous", help="Leave the previous version loaded, so that going back is instant."),
]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("deploy")(deploy_command)
    app.command("rollback")(rollback_command)
    app.command("status")(status_command)


@connecting
def deploy_command(
    target: Annotated[
        str, typer.Argument(metavar="NAME[:VERSION]", help="What to serve: a number or a tag; without one the newest.")
    ],
    repository: Repository = None,
    to: To = None,
    keep_previous: KeepPrevious = False,
    timeout: Timeout = 600.0,
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
    *,
    connection: Connection,
) -> None:
    """Serve a version, proven by an inference; on any failure the previous state is put back.

    Without --to it goes to the running `serve` of the repository; when there is none, it starts one that stays.
    """
    from repo_manager.report.terminal import Terminal
    from repo_manager.repository import resolve_version
    from repo_manager.rollout import RolloutOptions, deploy

    terminal = Terminal(as_json=json, quiet=quiet)
    root = resolve_repository(repository)
    name, chosen = resolve_version(root, target)
    options = RolloutOptions(keep_previous=keep_previous, dry_run=dry_run, load_timeout_s=timeout)

    def act(client: TritonClient) -> Rollout:
        return deploy(root, name, chosen, client, options=options, report=terminal.reporter())

    _roll_out(terminal, root, (to, connection), options, act)


@connecting
def status_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One model [default: all].")] = None,
    repository: Repository = None,
    to: Annotated[
        list[str] | None, typer.Option("--to", metavar="URL", help="Servers to ask [default: the running serve].")
    ] = None,
    json: JsonOutput = False,
    quiet: Quiet = False,
    *,
    connection: Connection,
) -> None:
    """Show what servers serve, when it was deployed, and where that differs from the repository."""
    from repo_manager.errors import ServerUnreachableError
    from repo_manager.report.rollout_tables import status_view
    from repo_manager.report.terminal import Terminal
    from repo_manager.rollout import status
    from repo_manager.server import TritonClient, running_server
    from repo_manager.settings import load_settings

    root = resolve_repository(repository)
    urls = list(to or filter(None, [load_settings().server]))
    if not urls:
        running = running_server(root)
        if running is None:
            raise ServerUnreachableError(
                f"No server runs on {root}", hint="Start one: repo-manager serve, or use --to."
            )
        urls = [running.grpc_url]
    found: list[ModelStatus] = []
    how = client_options(connection, urls)
    for url in urls:
        with TritonClient.connect(url, how) as client:
            found += status(root, client, (name,) if name else ())
    Terminal(as_json=json, quiet=quiet).result({"models": found}, *status_view(found))


@connecting
def rollback_command(
    name: ModelName,
    repository: Repository = None,
    to: To = None,
    keep_previous: KeepPrevious = False,
    timeout: Timeout = 600.0,
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
    *,
    connection: Connection,
) -> None:
    """Go back to the version that was deployed before the current one, with the same proof as `deploy`."""
    from repo_manager.report.terminal import Terminal
    from repo_manager.repository import find_model
    from repo_manager.rollout import RolloutOptions, rollback

    terminal = Terminal(as_json=json, quiet=quiet)
    root = resolve_repository(repository)
    find_model(root, name)
    options = RolloutOptions(keep_previous=keep_previous, dry_run=dry_run, load_timeout_s=timeout)

    def act(client: TritonClient) -> Rollout:
        return rollback(root, name, client, options=options, report=terminal.reporter())

    _roll_out(terminal, root, (to, connection), options, act)


def _roll_out(
    terminal: Terminal,
    root: Location,
    where: tuple[str | None, Connection],
    options: RolloutOptions,
    act: Callable[[TritonClient], Rollout],
) -> None:
    """Find the server, start one where that is allowed, act on it, and show what was done."""
    from repo_manager.errors import ServerUnreachableError
    from repo_manager.pipeline.serving import ensure_server
    from repo_manager.report.rollout_tables import rollout_view
    from repo_manager.server import TritonClient, running_server
    from repo_manager.settings import load_settings

    to, connection = where
    url = to or load_settings().server
    how = client_options(connection, [url] if url else [])
    if url is None and options.dry_run and running_server(root) is None:
        raise ServerUnreachableError(
            f"No server runs on {root}, so there is nothing to plan against; without --dry-run one would be started",
            hint="Start one with repo-manager serve --detach, or use --to.",
        )
    server = ensure_server(root, url, timeout_s=options.load_timeout_s, report=terminal.note)
    with TritonClient.connect(server.url, how) as client:
        rollout = act(client)
    terminal.result({"rollout": rollout, "server": server}, *rollout_view(rollout))
