"""The same roll-out on several servers of one repository: all of them, or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from repo_manager.errors import (
    RepoManagerError,
    RollbackFailedError,
    RolloutUndoneError,
    ServerUnreachableError,
    UsageError,
)
from repo_manager.repository import Location, record_deployment, set_served_versions
from repo_manager.rollout.attempt import Attempt, Report
from repo_manager.rollout.lease import rollout_lease
from repo_manager.rollout.policy_file import read_bytes, write_back
from repo_manager.rollout.result import Rollout, RolloutOptions
from repo_manager.rollout.signals import as_interrupts
from repo_manager.rollout.smoke import SmokeResult
from repo_manager.server import TritonClient

__all__ = ["FleetRollout", "deploy_fleet"]


@dataclasses.dataclass(frozen=True)
class FleetRollout:
    """A roll-out on several servers.

    Attributes:
        servers: one result a server, in the order given.
        unavailable: servers that did not answer and were left out, within `max_unavailable`; they serve the
            right version when they start, because the repository says so.
    """

    servers: tuple[Rollout, ...]
    unavailable: tuple[str, ...]


def deploy_fleet(
    repository: Location,
    name: str,
    version: int,
    clients: Sequence[TritonClient],
    *,
    max_unavailable: int = 0,
    options: RolloutOptions | None = None,
    report: Report = lambda _: None,
) -> FleetRollout:
    """Put a version into service on every server, one after the other; on a failure put all of them back.

    First every server serves the old and the new version and proves the new one; only when all have, the
    old one is dropped, again one after the other. So at any moment every server answers, and going back
    never has to load anything.

    Args:
        repository: the repository that all of them serve.
        name: the model.
        version: the version to serve.
        clients: one a server.
        max_unavailable: how many servers may not answer without failing the whole.
        options: as for `deploy`.
        report: told what is being done.

    Raises:
        UsageError: no server.
        RepositoryError: no such model or version, or another roll-out of it is under way.
        ServerUnreachableError: more servers than `max_unavailable` do not answer; nothing was changed.
        RolloutUndoneError: it failed on one, and all were put back.
        RollbackFailedError: it failed, and so did putting one back.
    """
    if not clients:
        raise UsageError(f"No server to deploy {name}:{version} to", hint="Give at least one URL.")
    options = RolloutOptions() if options is None else options
    repository = repository.resolve()
    fleet = _Fleet(repository, name, version, max_unavailable, options, report)
    if options.dry_run:
        fleet.look(clients)
        return FleetRollout(tuple(each.dry_run() for each in fleet.attempts), tuple(fleet.unavailable))
    with rollout_lease(repository, name, timeout_s=options.lease_timeout_s), as_interrupts():
        fleet.look(clients)
        return fleet.run()


class _Fleet:
    """One roll-out on several servers."""

    def __init__(
        self,
        repository: Location,
        name: str,
        version: int,
        max_unavailable: int,
        options: RolloutOptions,
        report: Report,
    ) -> None:
        self.repository, self.name, self.version = repository, name, version
        self.max_unavailable, self.options, self.report = max_unavailable, options, report
        self.attempts: list[Attempt] = []
        self.unavailable: list[str] = []

    def look(self, clients: Sequence[TritonClient]) -> None:
        """Ask every server what it serves, before anything is changed."""
        for client in clients:
            try:
                self.attempts.append(
                    Attempt(self.repository, self.name, self.version, client, self.options, self.report)
                )
            except ServerUnreachableError as exc:
                self._leave_out(client.url, exc)
        if not self.attempts:
            raise ServerUnreachableError(f"None of the servers answers: {', '.join(self.unavailable)}")
        after = {version for attempt in self.attempts for version in attempt.plan.ready_after}
        for attempt in self.attempts:  # they share one config.pbtxt
            attempt.plan = dataclasses.replace(attempt.plan, ready_after=tuple(sorted(after)))

    def run(self) -> FleetRollout:
        """Apply, prove, finish; or put all back."""
        original = read_bytes(self.repository, self.name)
        self.attempts[0].check_version()
        begun: list[Attempt] = []
        try:
            results = self._apply(begun)
            record_deployment(self.repository, self.name, self.version)
        except (RepoManagerError, KeyboardInterrupt, OSError) as exc:
            raise self._undo(original, begun, exc) from exc
        return FleetRollout(results, tuple(self.unavailable))

    def _apply(self, begun: list[Attempt]) -> tuple[Rollout, ...]:
        meanwhile = tuple(sorted({version for attempt in self.attempts for version in attempt.loaded_meanwhile()}))
        proofs: dict[str, SmokeResult] = {}
        for attempt in list(self.attempts):
            self.report(f"{attempt.client.url}:")
            begun.append(attempt)
            try:
                proofs[attempt.client.url] = attempt.bring_up(meanwhile)
            except ServerUnreachableError as exc:
                self._leave_out(attempt.client.url, exc)
                self.attempts.remove(attempt)
                begun.remove(attempt)
        results = []
        set_served_versions(self.repository, self.name, self.attempts[0].plan.ready_after)
        for attempt in self.attempts:
            state = attempt.finish()
            changed = attempt.before.ready != state.ready
            smoke = proofs[attempt.client.url]
            results.append(attempt.result(changed=changed, ready=state.ready, smoke=smoke, draining=state.busy))
        return tuple(results)

    def _leave_out(self, url: str, exc: ServerUnreachableError) -> None:
        """Go on without a server, if that is allowed.

        Raises:
            ServerUnreachableError: it is one too many.
        """
        self.unavailable.append(url)
        if len(self.unavailable) > self.max_unavailable:
            raise exc
        self.report(f"{url} does not answer; going on without it")

    def _undo(self, original: bytes | None, begun: list[Attempt], cause: BaseException) -> RepoManagerError:
        failure = "interrupted" if isinstance(cause, KeyboardInterrupt) else str(cause)
        what = f"{self.name}:{self.version} was not deployed"
        self.report(f"failed: {failure.splitlines()[0]}; putting {len(begun)} servers back")
        states, failed = [], []
        try:
            write_back(self.repository, self.name, original)
        except RepoManagerError as exc:
            failed.append(str(exc))
        for attempt in begun:
            try:
                states.append(attempt.restore_server().sentence)
            except ServerUnreachableError as exc:
                # It has nothing to be put back: started again it reads the repository, which is as it was.
                states.append(f"{attempt.client.url} does not answer ({exc.message})")
            except (RepoManagerError, KeyboardInterrupt) as exc:
                failed.append(f"{attempt.client.url}: {exc or 'interrupted again'}\n{attempt.by_hand(original)}")
        if failed:
            return RollbackFailedError(
                f"{what}: {failure}\nPutting the previous state back failed on {len(failed)} of {len(begun)} servers",
                hint="\n".join(failed),
            )
        now = "; ".join(states) or "no server was touched"
        return RolloutUndoneError(f"{what}: {failure}\nThe previous state was put back: {now}.")
