"""The same roll-out on several servers of one repository: all of them, or none."""

from __future__ import annotations

from collections.abc import Sequence

from repo_manager.errors import RepositoryError, UsageError
from repo_manager.repository import Location, previous_deployment
from repo_manager.rollout.attempt import Report
from repo_manager.rollout.fleet.attempt import FleetAttempt
from repo_manager.rollout.fleet.result import FleetRollout
from repo_manager.rollout.lease import rollout_lease
from repo_manager.rollout.result import RolloutOptions
from repo_manager.rollout.signals import as_interrupts
from repo_manager.server import TritonClient

__all__ = ["deploy_fleet", "rollback_fleet"]


def deploy_fleet(
    repository: Location,
    name: str,
    version: int,
    clients: Sequence[TritonClient],
    *,
    options: RolloutOptions | None = None,
    report: Report = lambda _: None,
) -> FleetRollout:
    """Put a version into service on every server, a batch at a time; on a failure put all of them back.

    First every server serves the old and the new version and proves the new one; only when all have, the
    old one is dropped, again a batch at a time. So at any moment every server answers, and going back
    never has to load anything.

    Args:
        repository: the repository that all of them serve.
        name: the model.
        version: the version to serve.
        clients: one a server.
        options: as for `deploy`; `batch` and `max_unavailable` are for fleets.
        report: told what is being done; from several threads when a batch has more than one server.

    Raises:
        UsageError: no server.
        RepositoryError: no such model or version, a check speaks against it, or another roll-out of it is under way.
        ServerUnreachableError: more servers than `max_unavailable` do not answer; nothing was changed.
        RolloutUndoneError: it failed on one, and all were put back.
        RollbackFailedError: it failed, and so did putting one back.
    """
    if not clients:
        raise UsageError(f"No server to deploy {name}:{version} to", hint="Give at least one URL.")
    options = RolloutOptions() if options is None else options
    repository = repository.resolve()
    fleet = FleetAttempt(repository, name, version, len(clients), options, report)
    if options.dry_run:
        fleet.look(clients)
        return fleet.result(tuple(each.dry_run() for each in fleet.attempts))
    with rollout_lease(repository, name, timeout_s=options.lease_timeout_s), as_interrupts():
        fleet.look(clients)
        return fleet.run()


def rollback_fleet(
    repository: Location,
    name: str,
    clients: Sequence[TritonClient],
    *,
    options: RolloutOptions | None = None,
    report: Report = lambda _: None,
) -> FleetRollout:
    """Go back, on every server, to the version that was deployed before the current one.

    Raises:
        RepositoryError: there is none; and as `deploy_fleet`.
        ServerError: as `deploy_fleet`.
        RollbackFailedError: as `deploy_fleet`.
    """
    version = previous_deployment(repository, name)
    if version is None:
        raise RepositoryError(
            f"{name} has no earlier deployment to go back to",
            hint=f"Deploy a version by its number: repo-manager deploy {name}:VERSION",
        )
    return deploy_fleet(repository, name, version, clients, options=options, report=report)
