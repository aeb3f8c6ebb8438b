"""Deploy and roll back as the commands do: with the settings, and with the repository's own server."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from repo_manager.errors import ServerUnreachableError
from repo_manager.pipeline.connection import connection_of
from repo_manager.pipeline.serving import ensure_server
from repo_manager.repository import Location, find_model, resolve_version
from repo_manager.rollout.deploy import deploy as deploy_to
from repo_manager.rollout.deploy import rollback as rollback_on
from repo_manager.rollout.options import RolloutOptions, TrialOptions
from repo_manager.rollout.result import Rollout
from repo_manager.rollout.targets.urls import To
from repo_manager.server import ClientOptions, running_server
from repo_manager.settings import load_settings

__all__ = ["deploy", "rollback"]

Report = Callable[[str], None]


def deploy(
    repository: Location,
    name: str,
    version: int | str | None = None,
    to: To | None = None,
    *,
    options: RolloutOptions | None = None,
    trial: TrialOptions | None = None,
    connection: ClientOptions | None = None,
    report: Report = lambda _: None,
) -> Rollout:
    """Put a version into service, proven by an inference; on any failure the previous state is put back.

    Args:
        repository: the model repository.
        name: the model.
        version: its number or a tag; `None` takes the newest.
        to: connected clients, URLs, or one `k8s://namespace/release` or `kserve://namespace/name`; `None` takes the
            server of the settings, else the running `serve` of the repository, else starts one that goes on running.
        options: how to roll out; `None` takes the defaults and the settings' keys.
        trial: how the version is tried first; `None`: not at all.
        connection: how to connect to URLs; `None` takes the settings.
        report: told what is being done.

    Returns:
        What was done. When the version was served already, nothing is changed, and an inference proves that it answers.

    Raises:
        RepoManagerError: as `repo_manager.rollout.deploy`.
    """
    wanted = name if version is None else f"{name}:{version}"
    _, number = resolve_version(repository, wanted)
    where = _Where.find(repository, to, options, connection, report)
    done = deploy_to(
        repository,
        name,
        number,
        where.to,
        options=where.options,
        trial=trial,
        connection=where.connection,
        report=report,
    )
    return where.mark(done)


def rollback(
    repository: Location,
    name: str,
    to: To | None = None,
    *,
    options: RolloutOptions | None = None,
    connection: ClientOptions | None = None,
    report: Report = lambda _: None,
) -> Rollout:
    """Go back to the version that was deployed before the current one, with the same proof as `deploy`.

    Raises:
        RepositoryError: there is none.
        RepoManagerError: as `repo_manager.rollout.deploy`.
    """
    find_model(repository, name)
    where = _Where.find(repository, to, options, connection, report)
    done = rollback_on(repository, name, where.to, options=where.options, connection=where.connection, report=report)
    return where.mark(done)


@dataclasses.dataclass(frozen=True)
class _Where:
    """Where a roll-out goes, and how, with the settings in place of what was left out."""

    to: To
    options: RolloutOptions
    connection: ClientOptions
    started: bool

    @classmethod
    def find(
        cls,
        repository: Location,
        to: To | None,
        options: RolloutOptions | None,
        connection: ClientOptions | None,
        report: Report,
    ) -> _Where:
        """Find the server, and start one where none was named and none runs.

        Raises:
            ServerUnreachableError: a dry run has no server to plan against.
        """
        settings = load_settings()
        if options is None:
            options = RolloutOptions(signed_by=settings.signed_by)
        if connection is None:
            connection = connection_of(settings)
        if not to:
            to = settings.server
        if to is not None:
            return cls(to, options, connection, started=False)
        if options.dry_run and running_server(repository) is None:
            raise ServerUnreachableError(
                f"No server runs on {repository}, so there is nothing to plan against; without --dry-run one would be "
                "started",
                hint="Start one with repo-manager serve --detach, or use --to.",
            )
        server = ensure_server(repository, None, timeout_s=options.load_timeout_s, report=report)
        return cls(server.url, options, connection, started=server.started)

    def mark(self, rollout: Rollout) -> Rollout:
        """Say in the result whether the server was started for it."""
        if not self.started:
            return rollout
        servers = tuple(dataclasses.replace(server, started=True) for server in rollout.servers)
        return dataclasses.replace(rollout, servers=servers)
