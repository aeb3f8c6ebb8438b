"""One attempt to put a version into service on one server: apply, prove, and put back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from repo_manager.errors import (
    RepoManagerError,
    RollbackFailedError,
    RolloutUndoneError,
    ServerRefusedError,
    ServerUnreachableError,
)
from repo_manager.repository import Location, find_model, record_deployment, set_served_versions
from repo_manager.rollout.checks import Check, check_server, check_version, refuse
from repo_manager.rollout.observe import ServedState, observe, wait_until_only_ready
from repo_manager.rollout.plan import hidden_changes, obstacle_of, plan_from
from repo_manager.rollout.policy_file import changes_are_unseen, read_bytes, touch, write_back
from repo_manager.rollout.result import Rollout, RolloutOptions
from repo_manager.rollout.retry import Deadline, retried
from repo_manager.rollout.smoke import SmokeResult, smoke_test
from repo_manager.rollout.undo import by_hand, reason_of, restore_server, unload
from repo_manager.server import TritonClient

__all__ = ["Attempt", "Report"]

Report = Callable[[str], None]
Result = TypeVar("Result")


class Attempt:
    """One roll-out on one server, from its plan to its proof.

    Args:
        repository: the repository.
        name: the model.
        version: the version to serve.
        client: of the server.
        options: how to roll out.
        report: told what is being done.
        deadline: of the fleet that the server belongs to; `None`: one of its own.
    """

    def __init__(
        self,
        repository: Location,
        name: str,
        version: int,
        client: TritonClient,
        options: RolloutOptions,
        report: Report,
        *,
        deadline: Deadline | None = None,
    ) -> None:
        self.repository, self.name, self.version = repository, name, version
        self.client, self.options, self._tell = client, options, report
        self.entry = find_model(repository, name)
        self.folder = self.entry.version(version).path
        self.events: list[str] = []
        self.halted = threading.Event()
        self.began = time.monotonic()
        self.deadline = Deadline(options.deadline_s) if deadline is None else deadline
        self.before = retried(
            lambda: observe(client, name), retries=options.retries, report=self.note, deadline=self.deadline
        )
        obstacle = obstacle_of(repository, self.entry)
        self.plan = plan_from(self.entry, version, self.before, keep_previous=options.keep_previous, obstacle=obstacle)
        self.checks: tuple[Check, ...] = ()

    def dry_run(self) -> Rollout:
        """Return the plan as a result, and what speaks against it."""
        if self.plan.changes:
            self.checks = (*self.check_version(), *self.check_server())
        elif self.options.signed_by:
            self.checks = self.check_version()
        return self.result(changed=False, ready=self.before.ready, smoke=None, dry_run=True)

    def run(self) -> Rollout:
        """Do what has to be done, and prove it."""
        if not self.plan.changes:
            if self.options.signed_by:  # it may have been tampered with since it was deployed
                self.checks = self.check_version()
                refuse(self.name, self.version, self.checks, self.options, served_by=(self.client.url,))
            confirmed = self.confirm()
            record_deployment(self.repository, self.name, self.version)
            return confirmed
        self.checks = (*self.check_version(), *self.check_server())
        refuse(self.name, self.version, self.checks, self.options)
        original = read_bytes(self.repository, self.name)
        try:
            state, smoke = self.apply()
            record_deployment(self.repository, self.name, self.version)
        except (RepoManagerError, KeyboardInterrupt, OSError) as exc:
            raise self.undo(original, exc) from exc
        except BaseException as exc:
            self.undo(original, exc)  # a fault of ours is no reason to leave the server half-way
            raise
        return self.result(changed=True, ready=state.ready, smoke=smoke, draining=state.busy)

    def check_version(self) -> tuple[Check, ...]:
        """Check what is the same on every server, before one is asked to read it."""
        return check_version(self.repository, self.entry, self.version, signed_by=self.options.signed_by)

    def check_server(self) -> tuple[Check, ...]:
        """Check whether this server can take the version."""
        timeout_s = self.deadline.remaining_s(self.options.smoke_timeout_s)
        return check_server(self.entry, self.version, self.plan.new_bytes, self.client, timeout_s=timeout_s)

    def note(self, event: str) -> None:
        """Record what is being done, and tell it."""
        self.events.append(event)
        self._tell(event)

    def result(
        self,
        *,
        changed: bool,
        ready: tuple[int, ...],
        smoke: SmokeResult | None,
        dry_run: bool = False,
        mended: bool = False,
        draining: tuple[int, ...] = (),
    ) -> Rollout:
        """Describe what was done."""
        return Rollout(
            model=self.name,
            version=self.version,
            url=self.client.url,
            plan=self.plan,
            checks=self.checks,
            changed=changed,
            dry_run=dry_run,
            ready=ready,
            previous=self.before.ready,
            smoke=smoke,
            mended=mended,
            draining=draining,
            seconds=time.monotonic() - self.began,
            events=tuple(self.events),
        )

    def confirm(self) -> Rollout:
        """Prove that what is deployed answers; mend it when only its process has died."""
        mended = False
        try:
            smoke = self._smoke(self.before)
        except ServerRefusedError as exc:
            self.note(f"{self.name}:{self.version} is READY but does not answer: {exc.message}")
            smoke = self._mend()
            mended = True
        return self.result(changed=mended, ready=self.before.ready, smoke=smoke, mended=mended)

    def apply(self, meanwhile: tuple[int, ...] | None = None) -> tuple[ServedState, SmokeResult]:
        """Serve old and new together, prove the new one, drop the old."""
        smoke = self.bring_up(self.loaded_meanwhile() if meanwhile is None else meanwhile)
        return self.finish(), smoke

    def loaded_meanwhile(self) -> tuple[int, ...]:
        """Return the versions that are served until the new one has proven itself."""
        existing = {each.version for each in self.entry.versions}
        return tuple(sorted({*self.plan.ready_after, *(set(self.before.ready) & existing)}))

    def bring_up(self, versions: tuple[int, ...]) -> SmokeResult:
        """Serve these versions, and prove the new one among them."""
        self.write_policy(versions)
        if self.plan.is_hindered and not changes_are_unseen(self.repository):
            touch(self.repository, self.name)
        self._load()
        state = self._observe()
        if not set(self.plan.ready_after) <= set(state.ready):
            state = self._insist(state)
        smoke = self._smoke(state)
        self.note(f"{self.name}:{self.version} answers ({smoke.reference} reference, {smoke.latency_ns / 1e6:.1f} ms)")
        return smoke

    def finish(self) -> ServedState:
        """Serve exactly what was planned."""
        if self._observe().ready != self.plan.ready_after:
            self.write_policy(self.plan.ready_after)
            self._load()
        state = wait_until_only_ready(self.client, self.name, self.plan.ready_after, self.options.settle_timeout_s)
        if state.ready != self.plan.ready_after:
            wanted = ", ".join(map(str, self.plan.ready_after))
            raise ServerRefusedError(
                f"{state.sentence}, expected exactly {wanted}",
                hint="Is it the server of this repository? Its log says why.",
            )
        return state

    def write_policy(self, versions: tuple[int, ...]) -> None:
        """Say in the repository which versions the next load serves; a file that says so already stays as it is."""
        numbers = ", ".join(map(str, versions))
        self.note(f"serving version{'s' if len(versions) > 1 else ''} {numbers}")
        set_served_versions(self.repository, self.name, versions)

    def _observe(self) -> ServedState:
        return self._retried(lambda: observe(self.client, self.name))

    def _load(self) -> None:
        """Ask the server to look at the repository again."""

        def load() -> None:
            if changes_are_unseen(self.repository):
                unload(self.client, self.name, self.options)
            self.client.load(self.name, timeout_s=self.deadline.remaining_s(self.options.load_timeout_s))

        self._retried(load)

    def _retried(self, call: Callable[[], Result]) -> Result:
        if self.halted.is_set():
            raise ServerRefusedError(f"the roll-out of {self.name}:{self.version} was called off")
        return retried(call, retries=self.options.retries, report=self.note, deadline=self.deadline)

    def _insist(self, state: ServedState) -> ServedState:
        """Load again with a newer config.pbtxt: Triton answers 200 and does nothing when nothing looks newer to it."""
        self.note(f"the server answered the load and did nothing ({state.sentence}); asking again")
        touch(self.repository, self.name)
        self._load()
        state = self._observe()
        if set(self.plan.ready_after) <= set(state.ready):
            return state
        reason = state.reasons.get(self.version)
        raise ServerRefusedError(
            f"{self.client.url} answered the load of {self.name} and did nothing: {state.sentence}"
            + (f" ({reason})" if reason else ""),
            hint=" ".join(hidden_changes(self.entry))
            or f"Does it serve {self.repository}? A server of another repository does not see this change.",
        )

    def _smoke(self, state: ServedState) -> SmokeResult:
        config = state.config
        if config is None or self.version not in state.ready:
            raise ServerRefusedError(f"{self.name}:{self.version} is not ready: {state.sentence}")

        def ask() -> SmokeResult:
            timeout_s = self.deadline.remaining_s(self.options.smoke_timeout_s)
            return smoke_test(self.client, self.folder, self.name, self.version, config, timeout_s=timeout_s)

        return self._retried(ask)

    def _mend(self) -> SmokeResult:
        """Unload and load: the only way to bring back a version whose process was killed.

        Raises:
            ServerRefusedError: it does not come back, or still does not answer.
        """
        self.note(f"unloading and loading {self.name}")
        unload(self.client, self.name, self.options)
        self.client.load(self.name, timeout_s=self.options.load_timeout_s)
        state = wait_until_only_ready(self.client, self.name, self.plan.ready_after, self.options.settle_timeout_s)
        return self._smoke(state)

    def undo(self, original: bytes | None, cause: BaseException) -> RepoManagerError:
        """Put things back as they were; return what to tell the user."""
        what = f"{self.name}:{self.version} was not deployed"
        failure = reason_of(cause)
        try:
            write_back(self.repository, self.name, original)  # first: a server that starts now starts right
            self.note(f"failed: {failure.splitlines()[0]}; putting things back")
            state = self.restore_server()
        except ServerUnreachableError as exc:
            return ServerUnreachableError(
                f"{what}: {failure}\nconfig.pbtxt is as it was before, but the "
                f"server does not answer any more: {exc.message}",
                hint="A server that is started again serves what it served before. One that runs on may serve both: "
                "run the same command again once it answers.",
            )
        except (RepoManagerError, KeyboardInterrupt, OSError) as exc:
            reason = "interrupted again" if isinstance(exc, KeyboardInterrupt) else str(exc)
            return RollbackFailedError(
                f"{what}: {failure}\nPutting the previous state back failed: {reason}",
                hint=self.by_hand(original),
            )
        return RolloutUndoneError(f"{what}: {failure}\nThe previous state was put back: {state.sentence}.")

    def restore_server(self) -> ServedState:
        """Make the server serve what it served before, and see that it does.

        Raises:
            RepoManagerError: it does not.
        """
        return restore_server(
            self.client, self.name, self.before, self.options, unseen=changes_are_unseen(self.repository)
        )

    def by_hand(self, original: bytes | None) -> str:
        """Say what a person has to do when putting things back failed."""
        return by_hand(self.client, self.plan, self.before, self.entry, is_new=original is None)
