"""Putting versions into service and taking them out: deploy, rollback, undeploy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import typer

from repo_manager.cli.connection import ConnectionFlags, client_options, urls_of
from repo_manager.cli.durations import seconds_option
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import Output, check_input, check_keys
from repo_manager.cli.repository_options import ModelName, NamedVersion, RepositoryFlag, model_versions
from repo_manager.cli.rollout_options import RolloutFlags, Trial
from repo_manager.errors import RepositoryError, UsageError
from repo_manager.pipeline.deploying import deploy, rollback, undeploy
from repo_manager.report.rollout_tables import rollout_view
from repo_manager.report.terminal import Terminal
from repo_manager.repository.tags import resolve_version
from repo_manager.rollout.options import Amount, RolloutOptions
from repo_manager.rollout.result import Rollout
from repo_manager.server.transport import ClientOptions
from repo_manager.settings import load_settings

__all__ = ["app"]

app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class TargetFlags:
    """Where a roll-out goes."""

    to: list[str] | None = option(
        "--to",
        metavar="URL",
        help="A running server, grpc://host:port or http://host:port. For several: repeat the option, or use @FILE, "
        "or dns://name:port for every address of a name. Or a cluster: k8s://namespace/release or "
        "kserve://namespace/name, with ?context=NAME to choose a kubeconfig context [default: the running `serve` of "
        "the repository, else one is started].",
    )

    def texts(self) -> tuple[str, ...]:
        """Return the targets named, else the server of the settings."""
        return tuple(self.to or filter(None, [load_settings().server]))

    def connected(self, connection: ConnectionFlags) -> ClientOptions:
        """Return how they are reached.

        Raises:
            UsageError: as `client_options`.
        """
        return client_options(connection, urls_of(self.texts()))


@dataclasses.dataclass(frozen=True)
class FleetFlags:
    """How several servers go, one batch after the other."""

    PANEL: ClassVar[str] = "Roll-out"
    batch: str = option(
        "--batch",
        metavar="N|N%",
        sets=(RolloutOptions, "batch"),
        read=lambda text: _batch(text),
        show=str,
        help="With several servers: how many at a time.",
    )
    max_unavailable: str = option(
        "--max-unavailable",
        metavar="N|N%",
        sets=(RolloutOptions, "max_unavailable"),
        read=lambda text: Amount.parse(text, "--max-unavailable"),
        show=str,
        help="With several servers: how many may fail to answer.",
    )


@dataclasses.dataclass(frozen=True)
class DeployFlags(FleetFlags, RolloutFlags):
    """Options of deploy and rollback."""

    signed_by: list[Path] | None = option(
        "--signed-by",
        metavar="KEY.pub",
        sets=(RolloutOptions, "signed_by"),
        help="Refuse versions without a signature by this key (may be given often) [default: the settings' signed_by].",
    )
    force: bool = option(
        "--force", sets=(RolloutOptions, "force"), help="Continue although the estimated memory is not enough."
    )
    drop_pinned: bool = option(
        "--drop-pinned",
        sets=(RolloutOptions, "drop_pinned"),
        help="Undeploy a version even if an ensemble pins it. Triton then unloads the ensemble.",
    )
    retries: int = option(
        "--retries",
        sets=(RolloutOptions, "retries"),
        min=0,
        help="Retries for an unreachable server.",
    )
    proof: Literal["inference", "readiness"] = option(
        "--proof",
        sets=(RolloutOptions, "proof"),
        help="readiness: deploy a version even if it has no recorded sample and its model refuses made-up requests. "
        "The result then says that no inference proved it.",
    )
    dry_run: bool = option(
        "--dry-run",
        sets=(RolloutOptions, "dry_run"),
        help="Show the planned changes without making them.",
        rich_help_panel="Options",
    )

    def options(self) -> RolloutOptions:
        """Return them as the library takes them."""
        check_keys(self.signed_by)
        settings = self.settings()
        return RolloutOptions(**{**settings, "signed_by": settings["signed_by"] or load_settings().signed_by})


def _batch(text: str) -> Amount:
    """Read `--batch`.

    Raises:
        UsageError: it is no amount of servers, or none of them.
    """
    batch = Amount.parse(text, "--batch")
    if batch.value == 0:
        raise UsageError(f"--batch {text}: a batch needs at least one server")
    return batch


@app.command("deploy")
@grouped
def deploy_command(
    named_version: NamedVersion,
    *,
    place: RepositoryFlag,
    where: TargetFlags,
    how: DeployFlags,
    trial: Trial,
    output: Output,
    connection: ConnectionFlags,
) -> None:
    """Serve a version, proven by an inference. On any failure the previous state is put back.

    Without --to it goes to the running `serve` of the repository. When there is none, it starts one that keeps
    running. Several servers go forward together or not at all. With --shadow or --canary the version is on trial
    first: exit code 4 when a gate fails, 6 when one stays undecided. The old version then stays in service.
    """
    terminal = output.terminal()
    root, options, tried = place.root(), how.options(), trial.options(terminal)
    check_input(trial.shadow)
    name, version = resolve_version(root, named_version)
    to, connected = where.texts(), where.connected(connection)
    report = terminal.reporter()
    done = deploy(root, name, version, to, options=options, trial=tried, connection=connected, report=report)
    _show(terminal, done, options)


@app.command("rollback")
@grouped
def rollback_command(
    name: ModelName,
    *,
    place: RepositoryFlag,
    where: TargetFlags,
    how: DeployFlags,
    output: Output,
    connection: ConnectionFlags,
) -> None:
    """Go back to the version deployed before the current one, with the same proof as `deploy`."""
    terminal = output.terminal()
    root, options = place.root(), how.options()
    to, connected = where.texts(), where.connected(connection)
    done = rollback(root, name, to, options=options, connection=connected, report=terminal.reporter())
    _show(terminal, done, options, back=True)


@dataclasses.dataclass(frozen=True)
class UndeployFlags(FleetFlags):
    """How a model is taken out of service."""

    drop_pinned: bool = option(
        "--drop-pinned",
        sets=(RolloutOptions, "drop_pinned"),
        help="Undeploy a version even if an ensemble pins it. Triton then unloads the ensemble.",
    )
    timeout: float = seconds_option(
        "--timeout", sets=(RolloutOptions, "deadline_s"), help="Deadline of the whole command."
    )
    dry_run: bool = option(
        "--dry-run",
        sets=(RolloutOptions, "dry_run"),
        help="Show the planned changes without making them.",
        rich_help_panel="Options",
    )


@app.command("undeploy")
@grouped
def undeploy_command(
    named_version: Annotated[
        str,
        typer.Argument(
            metavar="NAME[:VERSION]",
            help="VERSION is a number or a tag \\[default: every version].",
            show_default=False,
            autocompletion=model_versions,
        ),
    ],
    *,
    place: RepositoryFlag,
    where: TargetFlags,
    how: UndeployFlags,
    output: Output,
    connection: ConnectionFlags,
) -> None:
    """Take a model, or one version of it, out of service. The server's index proves that it is gone.

    It stays published: `rollback` or `deploy` serves it again. `serve` does not load it when it starts. Refused while
    a dependent model is served.
    """
    terminal = output.terminal()
    options = RolloutOptions(**settings_of(RolloutOptions, how))
    name, separator, version = named_version.partition(":")
    to, connected = where.texts(), where.connected(connection)
    done = undeploy(
        place.root(),
        name,
        version if separator else None,
        to or None,
        options=options,
        connection=connected,
        report=terminal.reporter(),
    )
    _show(terminal, done, options)


def _show(terminal: Terminal, rollout: Rollout, options: RolloutOptions, *, back: bool = False) -> None:
    """Show the result. Raise the error of a failed check if the roll-out was only planned."""
    terminal.result({"rollout": rollout}, *rollout_view(rollout, back=back))
    if rollout.dry_run and any(check.blocks(options) for server in rollout.servers for check in server.checks):
        raise typer.Exit(RepositoryError.exit_code)
