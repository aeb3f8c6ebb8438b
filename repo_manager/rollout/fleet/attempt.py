"""One attempt to put a version into service on several servers: look, apply and prove in batches, and put back."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from repo_manager.errors import RepoManagerError, RollbackFailedError, RolloutUndoneError, ServerUnreachableError
from repo_manager.repository import Location, record_deployment, set_served_versions
from repo_manager.rollout.attempt import Attempt, Report
from repo_manager.rollout.checks import refuse
from repo_manager.rollout.fleet.result import FleetRollout
from repo_manager.rollout.policy_file import read_bytes, write_back
from repo_manager.rollout.result import Rollout, RolloutOptions
from repo_manager.rollout.retry import Deadline
from repo_manager.rollout.smoke import SmokeResult
from repo_manager.rollout.undo import reason_of
from repo_manager.rollout.waves import in_waves
from repo_manager.server import TritonClient

__all__ = ["FleetAttempt"]

# Looking and putting back cost a server nothing, so many are asked at once.
_WIDE = 16


class FleetAttempt:
    """One roll-out on several servers, from a look at each to the proof on all.

    Args:
        repository: the repository that all of them serve.
        name: the model.
        version: the version to serve.
        total: how many servers there are: what shares of them are taken of.
        options: how to roll out.
        report: told what is being done; from several threads when a batch has more than one server.
    """

    def __init__(
        self,
        repository: Location,
        name: str,
        version: int,
        total: int,
        options: RolloutOptions,
        report: Report,
    ) -> None:
        self.repository, self.name, self.version = repository, name, version
        self.options, self.report = options, report
        self.total = total
        self.batch = max(1, options.batch.of(total))
        self.may_miss = options.max_unavailable.of(total)
        self.deadline = Deadline(options.deadline_s)
        self.began = time.monotonic()
        self.attempts: list[Attempt] = []
        self.missing: dict[str, ServerUnreachableError] = {}
        self.done = 0
        self._lock = threading.Lock()

    def look(self, clients: Sequence[TritonClient]) -> None:
        """Ask every server what it serves, before anything is changed."""

        def attempt(client: TritonClient) -> Attempt | None:
            try:
                return Attempt(
                    self.repository,
                    self.name,
                    self.version,
                    client,
                    self.options,
                    lambda event: self.report(f"{client.url}: {event}"),
                    deadline=self.deadline,
                )
            except ServerUnreachableError as exc:
                self._leave_out(client.url, exc)
                return None

        found = in_waves(clients, min(_WIDE, len(clients)), attempt)
        self.attempts = [each for each in found if each is not None]
        self._check_missing()
        if not self.attempts:
            raise ServerUnreachableError(f"None of the servers answers: {', '.join(self.missing)}")
        after = {version for attempt in self.attempts for version in attempt.plan.ready_after}
        for each in self.attempts:  # they share one config.pbtxt
            each.plan = dataclasses.replace(each.plan, ready_after=tuple(sorted(after)))

    def run(self) -> FleetRollout:
        """Apply, prove, finish; or put all back."""
        if not any(attempt.plan.changes for attempt in self.attempts):
            self._check_served()
            results = in_waves(self.attempts, self.batch, Attempt.confirm)
            record_deployment(self.repository, self.name, self.version)
            return self.result(tuple(results))
        self._check()
        original = read_bytes(self.repository, self.name)
        begun: list[Attempt] = []
        try:
            applied = self._apply(begun)
            record_deployment(self.repository, self.name, self.version)
        except (RepoManagerError, KeyboardInterrupt, OSError) as exc:
            raise self._undo(original, begun, exc) from exc
        except BaseException as exc:
            self._undo(original, begun, exc)  # a fault of ours is no reason to leave servers half-way
            raise
        return self.result(applied)

    def result(self, servers: tuple[Rollout, ...]) -> FleetRollout:
        """Describe what was done."""
        return FleetRollout(
            model=self.name,
            version=self.version,
            servers=servers,
            unavailable=tuple(self.missing),
            batch=self.batch,
            changed=any(server.changed for server in servers),
            dry_run=self.options.dry_run,
            seconds=time.monotonic() - self.began,
        )

    def _check(self) -> None:
        """Check the version once, and every server.

        Raises:
            RepositoryError: something speaks against it; nothing was changed.
        """
        shared = self.attempts[0].check_version()

        def check(attempt: Attempt) -> None:
            attempt.checks = (*shared, *attempt.check_server())

        in_waves(self.attempts, min(_WIDE, len(self.attempts)), check)
        for attempt in self.attempts:
            refuse(self.name, self.version, attempt.checks, self.options)

    def _check_served(self) -> None:
        """Check a version that all serve already, where keys are given: it may have been tampered with since.

        Raises:
            RepositoryError: something speaks against it; the servers go on serving it.
        """
        if not self.options.signed_by:
            return
        shared = self.attempts[0].check_version()
        for attempt in self.attempts:
            attempt.checks = shared
        urls = [attempt.client.url for attempt in self.attempts]
        refuse(self.name, self.version, shared, self.options, served_by=urls)

    def _apply(self, begun: list[Attempt]) -> tuple[Rollout, ...]:
        meanwhile = tuple(sorted({version for attempt in self.attempts for version in attempt.loaded_meanwhile()}))
        proofs: dict[str, SmokeResult] = {}

        def prove(attempt: Attempt) -> None:
            begun.append(attempt)
            try:
                proofs[attempt.client.url] = attempt.bring_up(meanwhile)
            except ServerUnreachableError as exc:
                self._leave_out(attempt.client.url, exc)
                self._check_missing()
            else:
                self._progress(attempt, "serves it too")

        self._in_batches(prove)
        results: dict[str, Rollout] = {}

        def finish(attempt: Attempt) -> None:
            try:
                state = attempt.finish()
            except ServerUnreachableError as exc:
                self._leave_out(attempt.client.url, exc)
                self._check_missing()
                return
            changed = attempt.before.ready != state.ready or attempt.plan.changes
            smoke = proofs[attempt.client.url]
            results[attempt.client.url] = attempt.result(
                changed=changed, ready=state.ready, smoke=smoke, draining=state.busy
            )
            self._progress(attempt, "serves it")

        set_served_versions(self.repository, self.name, self.attempts[0].plan.ready_after)
        self._in_batches(finish)
        return tuple(results[attempt.client.url] for attempt in self.attempts)

    def _in_batches(self, act: Callable[[Attempt], None]) -> None:
        """Act on every server that still answers, a batch at a time."""
        self.done = 0
        waiting = list(self.attempts)
        while waiting:
            # Each wave is a call of its own, so that an error in one keeps the next from beginning.
            wave, waiting = waiting[: self.batch], waiting[self.batch :]
            in_waves(wave, self.batch, act)
        self.attempts = [attempt for attempt in self.attempts if attempt.client.url not in self.missing]
        if not self.attempts:
            raise ServerUnreachableError(f"None of the servers answers any more: {', '.join(self.missing)}")

    def _progress(self, attempt: Attempt, what: str) -> None:
        with self._lock:
            self.done += 1
            self.report(f"{attempt.client.url}: {what} ({self.done} of {len(self.attempts)})")

    def _leave_out(self, url: str, exc: ServerUnreachableError) -> None:
        with self._lock:
            self.missing[url] = exc
        self.report(f"{url} does not answer ({len(self.missing)} of at most {self.may_miss} that may be missing)")

    def _check_missing(self) -> None:
        """Go on without the servers that are missing, if that is allowed.

        Raises:
            ServerUnreachableError: it is one too many; with each one's reason.
        """
        if len(self.missing) <= self.may_miss:
            return
        reasons = "; ".join(exc.message for exc in self.missing.values())
        raise ServerUnreachableError(
            f"{len(self.missing)} of {self.total} servers do not answer, at most {self.may_miss} may be missing: "
            f"{reasons}",
            hint="Start them, or allow it: --max-unavailable.",
        )

    def _undo(self, original: bytes | None, begun: Sequence[Attempt], cause: BaseException) -> RepoManagerError:
        for attempt in self.attempts:
            attempt.halted.set()  # what runs in other threads goes no further
        failure = reason_of(cause)
        what = f"{self.name}:{self.version} was not deployed"
        states: list[str] = []
        failed: list[str] = []

        def restore(attempt: Attempt) -> None:
            try:
                states.append(attempt.restore_server().sentence)
            except ServerUnreachableError as exc:
                # It has nothing to be put back: started again it reads the repository, which is as it was.
                states.append(f"{attempt.client.url} does not answer ({exc.message})")
            except RepoManagerError as exc:
                failed.append(f"{attempt.client.url}: {exc}\n{attempt.by_hand(original)}")

        try:
            write_back(self.repository, self.name, original)
            self.report(f"failed: {failure.splitlines()[0]}; putting {len(begun)} servers back")
            in_waves(begun, min(_WIDE, max(1, len(begun))), restore)
        except (RepoManagerError, OSError) as exc:
            failed.append(str(exc))
        except KeyboardInterrupt:
            failed.append(f"interrupted again\n{self.attempts[0].by_hand(original)}")
        if failed:
            return RollbackFailedError(
                f"{what}: {failure}\nPutting the previous state back failed on {len(failed)} of {len(begun)} servers",
                hint="\n".join(failed),
            )
        now = "; ".join(sorted(states)) or "no server was touched"
        return RolloutUndoneError(f"{what}: {failure}\nThe previous state was put back: {now}.")
