"""Put a version into service under watch; put the previous state back when anything of it fails."""

from __future__ import annotations

from repo_manager.errors import RepositoryError
from repo_manager.repository import Location, previous_deployment
from repo_manager.rollout.attempt import Attempt, Report
from repo_manager.rollout.lease import rollout_lease
from repo_manager.rollout.result import Rollout, RolloutOptions
from repo_manager.rollout.signals import as_interrupts
from repo_manager.server import TritonClient

__all__ = ["deploy", "rollback"]


def deploy(
    repository: Location,
    name: str,
    version: int,
    client: TritonClient,
    *,
    options: RolloutOptions | None = None,
    report: Report = lambda _: None,
) -> Rollout:
    """Put a version into service.

    The old and the new version are served together until the new one has answered a real inference as
    ONNX Runtime does; only then the old one is dropped. So there is no moment without a version that
    answers. Ctrl-C, SIGTERM and SIGHUP undo what was begun.

    Args:
        repository: the repository that the server serves.
        name: the model.
        version: the version to serve.
        client: of the server.
        options: `None` takes the defaults.
        report: told what is being done.

    Returns:
        What was done. When the version was served already, nothing is changed, and an inference proves that it answers.

    Raises:
        RepositoryError: no such model or version, it is damaged, or another roll-out of the model is under way.
        ServerUnreachableError: no answer; what was changed in the repository is put back.
        RolloutUndoneError: it failed, and the previous state was put back and verified.
        RollbackFailedError: it failed, and so did putting the previous state back.
    """
    options = RolloutOptions() if options is None else options
    repository = repository.resolve()
    if options.dry_run:
        return Attempt(repository, name, version, client, options, report).dry_run()
    with rollout_lease(repository, name, timeout_s=options.lease_timeout_s), as_interrupts():
        return Attempt(repository, name, version, client, options, report).run()


def rollback(
    repository: Location,
    name: str,
    client: TritonClient,
    *,
    options: RolloutOptions | None = None,
    report: Report = lambda _: None,
) -> Rollout:
    """Go back to the version that was deployed before the current one.

    Raises:
        RepositoryError: there is none; and as `deploy`.
        ServerUnreachableError: as `deploy`.
        RolloutUndoneError: as `deploy`.
        RollbackFailedError: as `deploy`.
    """
    version = previous_deployment(repository, name)
    if version is None:
        raise RepositoryError(
            f"{name} has no earlier deployment to go back to",
            hint=f"Deploy a version by its number: repo-manager deploy {name}:VERSION",
        )
    return deploy(repository, name, version, client, options=options, report=report)
