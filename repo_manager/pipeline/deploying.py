"""Deploy, roll back and undeploy as the commands do: with the settings, and with the repository's own server."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from repo_manager.errors import RepositoryError, RollbackFailedError, ServerUnreachableError
from repo_manager.optional import deferred
from repo_manager.pipeline.annotating import annotated
from repo_manager.pipeline.connection import connection_of
from repo_manager.repository.location import Location, LocationLike, as_location, local_folder
from repo_manager.repository.scan import find_model
from repo_manager.repository.state import current_version, record_of
from repo_manager.repository.stores import open_store
from repo_manager.repository.tags import model_state, record_deployment, resolve_version
from repo_manager.rollout.checks import check_version, refuse
from repo_manager.rollout.deploy import deploy as deploy_to
from repo_manager.rollout.deploy import rollback as rollback_on
from repo_manager.rollout.deploy import undeploy as undeploy_from
from repo_manager.rollout.deploy import version_to_go_back_to
from repo_manager.rollout.observe import ServedState
from repo_manager.rollout.options import RolloutOptions, TrialOptions
from repo_manager.rollout.plan import plan_from
from repo_manager.rollout.result import Rollout, ServerResult
from repo_manager.rollout.targets.urls import To
from repo_manager.server.records import running_server
from repo_manager.server.transport import ClientOptions
from repo_manager.settings import Settings, load_settings

if TYPE_CHECKING:
    from repo_manager.pipeline import background
else:  # only needed when no server runs
    background = deferred("repo_manager.pipeline.background")

__all__ = ["deploy", "rollback", "undeploy"]

Report = Callable[[str], None]


def deploy(
    repository: LocationLike,
    name: str,
    version: int | str | None = None,
    to: To | None = None,
    *,
    options: RolloutOptions | None = None,
    trial: TrialOptions | None = None,
    connection: ClientOptions | None = None,
    report: Report = lambda _: None,
) -> Rollout:
    """Put a version into service, proven by an inference. On any failure the previous state is put back.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: the model to serve. The repository must have it.
        version: its number or a tag. `None` takes the newest.
        to: connected clients, URLs, or one `k8s://namespace/release` or `kserve://namespace/name`. `None` takes the
            server of the settings, else the running `serve` of the repository, else starts one, left running.
        options: how to roll out. `None` takes the defaults and the settings' keys.
        trial: how the version is tried first. `None`: not at all.
        connection: how to connect to URLs. `None` takes the settings.
        report: called with a line of text for each step.

    Returns:
        The roll-out's result. A version served already is left as it is, and proven by an inference.

    Raises:
        RepoManagerError: as `repo_manager.rollout.deploy`.
    """
    repository = as_location(repository)
    wanted = name if version is None else f"{name}:{version}"
    _, number = resolve_version(repository, wanted)
    where = _Where.find(to, options, connection)
    if where.to is None and where.options.dry_run and running_server(repository) is None:
        return _planned_alone(repository, name, number, where.options)
    told = annotated(where.settings, "deploy", f"{name}:{number}", where.options, report)
    with told as marked, where.reached(repository, name, number, report) as reached:
        done = deploy_to(
            repository,
            name,
            number,
            reached.url,
            options=where.options,
            trial=trial,
            connection=where.connection,
            report=report,
        )
        marked.append(done)
    return _marked(done, reached.started)


def rollback(
    repository: LocationLike,
    name: str,
    to: To | None = None,
    *,
    options: RolloutOptions | None = None,
    connection: ClientOptions | None = None,
    report: Report = lambda _: None,
) -> Rollout:
    """Go back to the version deployed before the current one, with the same proof as `deploy`.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: the model to take back. It needs a version deployed before the current one.
        to: a server, a cluster target, or several. `None`: the running `serve`, or a new one.
        options: settings of the roll-out. `None`: the defaults.
        connection: TLS, headers and deadlines of clients. `None`: those of the environment and the settings.
        report: called with one line per step.

    Raises:
        RepositoryError: there is none.
        RepoManagerError: as `repo_manager.rollout.deploy`.
    """
    repository = as_location(repository)
    find_model(repository, name)
    where = _Where.find(to, options, connection)
    options, connection = where.options, where.connection
    told = annotated(where.settings, "rollback", name, options, report)
    if where.to is not None:
        with told as marked:
            marked.append(
                rollback_on(repository, name, where.to, options=options, connection=connection, report=report)
            )
        return marked[0]
    version = version_to_go_back_to(repository, name)
    if options.dry_run and running_server(repository) is None:
        return _planned_alone(repository, name, version, options)
    with told as marked, where.reached(repository, name, version, report) as reached:
        done = rollback_on(repository, name, reached.url, options=options, connection=connection, report=report)
        marked.append(done)
    return _marked(done, reached.started)


def undeploy(
    repository: LocationLike,
    name: str,
    version: int | str | None = None,
    to: To | None = None,
    *,
    options: RolloutOptions | None = None,
    connection: ClientOptions | None = None,
    report: Report = lambda _: None,
) -> Rollout:
    """Take a model, or one version of it, out of service. The server's index proves it.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: the model to take out of service. It stays in the repository.
        version: its number or a tag. `None`: all versions served.
        to: as for `deploy`, but no server is started. `None` without a running server: the model is no longer recorded
            as deployed, so `serve` does not load it.
        options: deadline and the like. `None` takes the defaults.
        connection: how to connect to URLs. `None` takes the settings.
        report: called with a line of text for each step.

    Raises:
        RepositoryError: a served model needs it.
        RepoManagerError: as `repo_manager.rollout.deploy`.
    """
    repository = as_location(repository)
    find_model(repository, name)
    number = None if version is None else resolve_version(repository, f"{name}:{version}")[1]
    where = _Where.find(to, options, connection)
    running = None if where.to is not None else running_server(repository)
    reached: To | None = where.to if running is None else running.control_url
    if reached is None:
        return _undeployed_alone(repository, name, number, where.options)
    what = name if number is None else f"{name}:{number}"
    with annotated(where.settings, "undeploy", what, where.options, report) as marked:
        marked.append(
            undeploy_from(
                repository, name, number, reached, options=where.options, connection=where.connection, report=report
            )
        )
    return marked[0]


def _undeployed_alone(repository: Location, name: str, version: int | None, options: RolloutOptions) -> Rollout:
    """Record a model as not deployed, where no server runs: the next `serve` does not load it.

    Raises:
        ServerUnreachableError: one version alone is a matter of a server.
    """
    state = model_state(repository, name)
    current = current_version(state)
    if version is not None and version != current:
        raise ServerUnreachableError(
            f"No server runs on {repository}, and {name}:{version} is not what was deployed last",
            hint=f"Nothing serves it. The whole model: repo-manager undeploy {name}",
        )
    where = "no server runs"
    before = () if current is None else (current,)
    if not options.dry_run and before:
        record = record_of("undeploy", version, before, where, context=options.context)
        with open_store(repository).lease(name, timeout_s=options.lease_timeout_s):
            record_deployment(repository, name, None, record)
    server = ServerResult(where, bool(before) and not options.dry_run, (), before, "none")
    return Rollout(
        name, None, where, (server,), (), 1, server.changed, options.dry_run, None, 0.0, (), action="undeploy"
    )


@dataclasses.dataclass(frozen=True)
class _Reached:
    """The servers of a roll-out, and whether the one was started for it."""

    url: To
    started: bool = False


@dataclasses.dataclass(frozen=True)
class _Where:
    """Targets and options of a roll-out, with the settings in place of missing ones.

    Attributes:
        to: `None`: to the repository's own server.
        options: options of the roll-out, before the settings.
        connection: certificates, headers and protocol of the connection.
        settings: settings of the user, for options left out.
    """

    to: To | None
    options: RolloutOptions
    connection: ClientOptions
    settings: Settings

    @classmethod
    def find(cls, to: To | None, options: RolloutOptions | None, connection: ClientOptions | None) -> _Where:
        settings = load_settings()
        return cls(
            to or settings.server,
            dataclasses.replace(
                RolloutOptions(signed_by=settings.signed_by) if options is None else options, context=settings.context
            ),
            connection_of(settings) if connection is None else connection,
            settings,
        )

    @contextlib.contextmanager
    def reached(self, repository: Location, name: str, version: int, report: Report) -> Iterator[_Reached]:
        """Find the server, and start one where none was named and none runs. Stop the started one when the roll-out
        fails.

        Raises:
            RepositoryError: no server is started for a version not deployable anyway.
            ServerError: it does not start.
        """
        if self.to is not None:
            yield _Reached(self.to)
            return
        if running_server(repository) is None:
            _refuse_early(repository, name, version, self.options)
        server = background.ensure_server(repository, None, timeout_s=self.options.load_timeout_s, report=report)
        try:
            yield _Reached(server.url, server.started)
        except RollbackFailedError:
            raise  # a person must act on this server
        except BaseException:
            if server.started:
                background.stop_running(repository)
                report("The server started for it is stopped again.")
            raise


def _refuse_early(repository: Location, name: str, version: int, options: RolloutOptions) -> None:
    """Make the refusals possible without a server.

    Raises:
        RepositoryError: the model's folder cannot be written, or a check speaks against the version.
    """
    entry = find_model(repository, name)
    folder = local_folder(entry.path)
    if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
        raise RepositoryError(
            f"{entry.path} cannot be written, and a deployment writes its version policy to config.pbtxt there",
            hint="Deploy as the user who owns the repository, or serve a copy of it: repo-manager copy.",
        )
    refuse(f"{name}:{version}", check_version(repository, entry, version, signed_by=options.signed_by), options)


def _planned_alone(repository: Location, name: str, version: int, options: RolloutOptions) -> Rollout:
    """Plan for the server to be started: it loads the repository's models deployed before."""
    entry = find_model(repository, name)
    entry.version(version)
    deployed = model_state(repository, name).is_deployed
    ready = entry.selected if deployed else ()
    where = "a server to be started"
    served = ServedState(where, ready, (), {}, entry.config() if ready else None)
    plan = plan_from(entry, version, served, keep_previous=options.keep_previous)
    checks = check_version(repository, entry, version, signed_by=options.signed_by)
    server = ServerResult(where, False, ready, ready, "none", plan=plan, checks=checks)
    return Rollout(name, version, where, (server,), (), 1, False, True, None, 0.0, ())


def _marked(rollout: Rollout, started: bool) -> Rollout:
    """Say in the result whether the server was started for it."""
    if not started:
        return rollout
    servers = tuple(dataclasses.replace(server, started=True) for server in rollout.servers)
    return dataclasses.replace(rollout, servers=servers)
