"""Putting versions into service: deploy, rollback."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import typer

from repo_manager.cli.cluster import is_cluster, roll_out_on_cluster
from repo_manager.cli.connection import Connection, client_options
from repo_manager.cli.option_groups import grouped, option
from repo_manager.cli.options import Output
from repo_manager.cli.repository_options import ModelName, RepositoryFlag, Target
from repo_manager.cli.rollout_options import RolloutFlags
from repo_manager.cli.shadow_options import Trial, run_trial
from repo_manager.errors import RepositoryError, ServerUnreachableError, UsageError
from repo_manager.pipeline.serving import ensure_server
from repo_manager.report.rollout_tables import fleet_view, rollout_view
from repo_manager.report.shadow_tables import canary_view
from repo_manager.report.terminal import Terminal
from repo_manager.repository import Location, find_model, resolve_version
from repo_manager.rollout import (
    Amount,
    FleetRollout,
    Rollout,
    RolloutOptions,
    deploy,
    deploy_fleet,
    is_one_server,
    resolve_targets,
    rollback,
    rollback_fleet,
)
from repo_manager.rollout import (
    Target as Server,
)
from repo_manager.server import ClientOptions, TritonClient, running_server
from repo_manager.settings import load_settings

__all__ = ["app"]

app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class ServerFlags:
    """Where a roll-out goes."""

    to: list[str] | None = option(
        "--to",
        metavar="URL",
        help="A running server, grpc://host:port or http://host:port; several: give it often, or @FILE, or "
        "dns://name:port for every address behind a name; or k8s://namespace/release, kserve://namespace/name "
        "[default: the running `serve` of the repository, else one is started].",
    )


@dataclasses.dataclass(frozen=True)
class DeployFlags(RolloutFlags):
    """What deploy and rollback let one choose."""

    batch: str = option(
        "--batch",
        metavar="N|N%",
        sets=(RolloutOptions, "batch"),
        read=lambda text: _batch(text),
        show=str,
        help="Of several servers: how many at a time.",
    )
    max_unavailable: str = option(
        "--max-unavailable",
        metavar="N|N%",
        sets=(RolloutOptions, "max_unavailable"),
        read=lambda text: Amount.parse(text, "--max-unavailable"),
        show=str,
        help="Of several servers: how many may not answer.",
    )
    signed_by: list[Path] | None = option(
        "--signed-by",
        metavar="KEY.pub",
        sets=(RolloutOptions, "signed_by"),
        help="Refuse a version that no such key signed (may be given often) [default: the settings' signed_by].",
    )
    force: bool = option(
        "--force", sets=(RolloutOptions, "force"), help="Go on although memory is estimated to be too little."
    )
    retries: int = option(
        "--retries",
        sets=(RolloutOptions, "retries"),
        min=0,
        help="How often a server that is out of reach is asked again.",
    )
    dry_run: bool = option(
        "--dry-run",
        sets=(RolloutOptions, "dry_run"),
        help="Say what would be done; change nothing.",
        rich_help_panel="Options",
    )

    def options(self) -> RolloutOptions:
        """Return them as the library takes them."""
        settings = self.settings()
        return RolloutOptions(**{**settings, "signed_by": settings["signed_by"] or load_settings().signed_by})


def _batch(text: str) -> Amount:
    """Read `--batch`.

    Raises:
        UsageError: it is no amount of servers, or none of them.
    """
    batch = Amount.parse(text, "--batch")
    if batch.value == 0:
        raise UsageError(f"--batch {text}: a batch has at least one server")
    return batch


@app.command("deploy")
@grouped
def deploy_command(
    target: Target,
    *,
    place: RepositoryFlag,
    where: ServerFlags,
    how: DeployFlags,
    trial: Trial,
    output: Output,
    connection: Connection,
) -> None:
    """Serve a version, proven by an inference; on any failure the previous state is put back.

    Without --to it goes to the running `serve` of the repository; when there is none, it starts one that stays.
    Several servers go forward together or not at all. With --shadow or --canary the version is on trial first: exit
    code 4 when a gate fails, 6 when one stays undecided; the old version is then served on.
    """
    terminal = output.terminal()
    root = place.root()
    trial.options()
    name, version = resolve_version(root, target)
    _roll_out(terminal, root, (name, version), (where.to, connection), how.options(), trial)


@app.command("rollback")
@grouped
def rollback_command(
    name: ModelName,
    *,
    place: RepositoryFlag,
    where: ServerFlags,
    how: DeployFlags,
    output: Output,
    connection: Connection,
) -> None:
    """Go back to the version that was deployed before the current one, with the same proof as `deploy`."""
    terminal = output.terminal()
    root = place.root()
    find_model(root, name)
    _roll_out(terminal, root, (name, None), (where.to, connection), how.options())


def _roll_out(
    terminal: Terminal,
    root: Location,
    what: tuple[str, int | None],
    where: tuple[list[str] | None, Connection],
    options: RolloutOptions,
    trial: Trial | None = None,
) -> None:
    """Find the servers, start one where that is allowed, act, and show what was done; no version: go back."""
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
    name, version = what
    with TritonClient.connect(*server) as client:
        if version is None:
            return rollback(root, name, client, options=options, report=terminal.reporter())
        return deploy(root, name, version, client, options=options, report=terminal.reporter())


def _on_all(
    terminal: Terminal,
    root: Location,
    what: tuple[str, int | None],
    servers: tuple[Sequence[Server], ClientOptions],
    options: RolloutOptions,
) -> FleetRollout:
    name, version = what
    targets, how = servers
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(TritonClient.connect(each.url, each.options(how))) for each in targets]
        if version is None:
            return rollback_fleet(root, name, clients, options=options, report=terminal.reporter())
        return deploy_fleet(root, name, version, clients, options=options, report=terminal.reporter())
