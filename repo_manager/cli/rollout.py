"""Putting versions into service: deploy, rollback, status."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.cli.cluster import is_cluster, roll_out_on_cluster
from repo_manager.cli.connection import Connection, client_options, connecting
from repo_manager.cli.options import DryRun, JsonOutput, ModelName, Quiet, Repository, Timeout, resolve_repository
from repo_manager.cli.shadow_options import Trial, run_trial
from repo_manager.errors import RepositoryError, ServerUnreachableError, UsageError

if TYPE_CHECKING:
    from repo_manager.report.terminal import Terminal
    from repo_manager.repository.location import Location
    from repo_manager.rollout import FleetRollout, ModelStatus, Rollout, RolloutOptions, Target
    from repo_manager.server import ClientOptions

__all__ = ["register"]

Servers = Annotated[
    list[str] | None,
    typer.Option(
        "--to",
        metavar="URL",
        help="A running server, grpc://host:port or http://host:port; several: give it often, or @FILE, or "
        "dns://name:port for every address behind a name; or k8s://namespace/release, kserve://namespace/name "
        "[default: the running `serve` of the repository, else one is started].",
        show_default=False,
    ),
]


@dataclasses.dataclass(frozen=True)
class _How:
    """What deploy and rollback let one choose."""

    keep_previous: Annotated[
        bool,
        typer.Option("--keep-previous", help="Leave the previous version loaded, so that going back is instant."),
    ] = False
    batch: Annotated[str, typer.Option("--batch", metavar="N|N%", help="Of several servers: how many at a time.")] = "1"
    max_unavailable: Annotated[
        str, typer.Option("--max-unavailable", metavar="N|N%", help="Of several servers: how many may not answer.")
    ] = "0"
    signed_by: Annotated[
        list[Path] | None,
        typer.Option(
            "--signed-by",
            metavar="KEY.pub",
            help="Refuse a version that no such key signed (may be given often) [default: the settings' signed_by].",
        ),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Go on although memory is estimated to be too little.")] = False
    retries: Annotated[
        int, typer.Option("--retries", min=0, help="How often a server that is out of reach is asked again.")
    ] = 2
    timeout: Timeout = 600.0
    dry_run: DryRun = False

    def options(self) -> RolloutOptions:
        """Return them as the library takes them."""
        from repo_manager.rollout import Amount, RolloutOptions
        from repo_manager.settings import load_settings

        batch = Amount.parse(self.batch, "--batch")
        if batch.value == 0:
            raise UsageError(f"--batch {self.batch}: a batch has at least one server")
        return RolloutOptions(
            keep_previous=self.keep_previous,
            dry_run=self.dry_run,
            deadline_s=self.timeout,
            load_timeout_s=self.timeout,
            retries=self.retries,
            signed_by=tuple(self.signed_by or ()) or load_settings().signed_by,
            force=self.force,
            batch=batch,
            max_unavailable=Amount.parse(self.max_unavailable, "--max-unavailable"),
        )


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
    to: Servers = None,
    json: JsonOutput = False,
    quiet: Quiet = False,
    *,
    how: _How,
    trial: Trial,
    connection: Connection,
) -> None:
    """Serve a version, proven by an inference; on any failure the previous state is put back.

    Without --to it goes to the running `serve` of the repository; when there is none, it starts one that stays.
    Several servers go forward together or not at all. With --shadow or --canary the version is on trial first: exit
    code 4 when a gate fails, 6 when one stays undecided; the old version is then served on.
    """
    from repo_manager.report.terminal import Terminal
    from repo_manager.repository import resolve_version

    terminal = Terminal(as_json=json, quiet=quiet)
    root = resolve_repository(repository)
    trial.options()
    name, version = resolve_version(root, target)
    _roll_out(terminal, root, (name, version), (to, connection), how.options(), trial)


@connecting
def rollback_command(
    name: ModelName,
    repository: Repository = None,
    to: Servers = None,
    json: JsonOutput = False,
    quiet: Quiet = False,
    *,
    how: _How,
    connection: Connection,
) -> None:
    """Go back to the version that was deployed before the current one, with the same proof as `deploy`."""
    from repo_manager.report.terminal import Terminal
    from repo_manager.repository import find_model

    terminal = Terminal(as_json=json, quiet=quiet)
    root = resolve_repository(repository)
    find_model(root, name)
    _roll_out(terminal, root, (name, None), (to, connection), how.options())


@connecting
def status_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One model [default: all].")] = None,
    repository: Repository = None,
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="URL", help="Servers to ask, as for deploy [default: the running serve]."),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for a server.")] = 10.0,
    json: JsonOutput = False,
    quiet: Quiet = False,
    *,
    connection: Connection,
) -> None:
    """Show what servers serve, when it was deployed, what restarted since, and where they differ from the repository.

    Exit code 5 when a server does not answer; the others are shown.
    """
    from repo_manager.errors import ServerError
    from repo_manager.report.rollout_tables import status_view
    from repo_manager.report.terminal import Terminal
    from repo_manager.repository import find_model
    from repo_manager.rollout import resolve_targets, status
    from repo_manager.server import TritonClient, running_server
    from repo_manager.settings import load_settings

    terminal = Terminal(as_json=json, quiet=quiet)
    root = resolve_repository(repository)
    if name is not None:
        find_model(root, name)
    texts = list(to or filter(None, [load_settings().server]))
    if not texts:
        running = running_server(root)
        if running is None:
            raise ServerUnreachableError(
                f"No server runs on {root}", hint="Start one: repo-manager serve, or use --to."
            )
        texts = [running.control_url]
    targets = resolve_targets(texts)
    how = client_options(connection, [target.url for target in targets])
    how = dataclasses.replace(how, timeout_s=timeout)
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


def _roll_out(
    terminal: Terminal,
    root: Location,
    what: tuple[str, int | None],
    where: tuple[list[str] | None, Connection],
    options: RolloutOptions,
    trial: Trial | None = None,
) -> None:
    """Find the servers, start one where that is allowed, act, and show what was done; no version: go back."""
    from repo_manager.pipeline.serving import ensure_server
    from repo_manager.report.rollout_tables import fleet_view, rollout_view
    from repo_manager.report.shadow_tables import canary_view
    from repo_manager.rollout import is_one_server, resolve_targets
    from repo_manager.server import running_server
    from repo_manager.settings import load_settings

    texts = list(where[0] or filter(None, [load_settings().server]))
    if is_cluster(texts):
        roll_out_on_cluster(terminal, root, what, (texts[0], client_options(where[1], [])), options, trial)
        return
    if not texts and options.dry_run and running_server(root) is None:
        raise ServerUnreachableError(
            f"No server runs on {root}, so there is nothing to plan against; without --dry-run one would be started",
            hint="Start one with repo-manager serve --detach, or use --to.",
        )
    if not texts or is_one_server(texts):
        how = client_options(where[1], texts)
        server = ensure_server(
            root, texts[0] if texts else None, timeout_s=options.load_timeout_s, report=terminal.note
        )
        if trial is not None and trial.is_wanted and what[1] is not None:
            tried = run_trial(terminal, root, (what[0], what[1]), (server.url, how), options, trial)
            terminal.result({"canary": tried, "rollout": tried.rollout, "server": server}, *canary_view(tried))
            rollouts = [tried.rollout]
        else:
            rollout = _on_one(terminal, root, what, (server.url, how), options)
            terminal.result({"rollout": rollout, "server": server}, *rollout_view(rollout))
            rollouts = [rollout]
    elif trial is not None and trial.is_wanted:
        raise UsageError(
            "--shadow and --canary try a version on one server",
            hint="Try it on one of them with --to; then deploy to all: those that serve it already are left alone.",
        )
    else:
        targets = resolve_targets(texts)
        how = client_options(where[1], [target.url for target in targets])
        fleet = _on_all(terminal, root, what, (targets, how), options)
        terminal.result({"fleet": fleet}, *fleet_view(fleet))
        rollouts = list(fleet.servers)
    if options.dry_run and any(check.blocks(options) for rollout in rollouts for check in rollout.checks):
        raise typer.Exit(RepositoryError.exit_code)


def _on_one(
    terminal: Terminal,
    root: Location,
    what: tuple[str, int | None],
    server: tuple[str, ClientOptions],
    options: RolloutOptions,
) -> Rollout:
    from repo_manager.rollout import deploy, rollback
    from repo_manager.server import TritonClient

    name, version = what
    with TritonClient.connect(*server) as client:
        if version is None:
            return rollback(root, name, client, options=options, report=terminal.reporter())
        return deploy(root, name, version, client, options=options, report=terminal.reporter())


def _on_all(
    terminal: Terminal,
    root: Location,
    what: tuple[str, int | None],
    servers: tuple[Sequence[Target], ClientOptions],
    options: RolloutOptions,
) -> FleetRollout:
    from repo_manager.rollout import deploy_fleet, rollback_fleet
    from repo_manager.server import TritonClient

    name, version = what
    targets, how = servers
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(TritonClient.connect(each.url, each.options(how))) for each in targets]
        if version is None:
            return rollback_fleet(root, name, clients, options=options, report=terminal.reporter())
        return deploy_fleet(root, name, version, clients, options=options, report=terminal.reporter())
