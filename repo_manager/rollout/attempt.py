"""One attempt to put a version into service on one server: apply, prove, and put back."""

from __future__ import annotations

import time
from collections.abc import Callable

from repo_manager.errors import (
    RepoManagerError,
    RepositoryError,
    RollbackFailedError,
    RolloutUndoneError,
    ServerRefusedError,
    ServerUnreachableError,
)
from repo_manager.repository import Location, Severity, find_model, record_deployment, set_served_versions, verify
from repo_manager.rollout.observe import ServedState, observe, wait_until_only_ready
from repo_manager.rollout.plan import plan_from
from repo_manager.rollout.policy_file import read_bytes, touch, write_back
from repo_manager.rollout.result import Rollout, RolloutOptions
from repo_manager.rollout.smoke import SmokeResult, smoke_test
from repo_manager.server import TritonClient

__all__ = ["Attempt", "Report"]

Report = Callable[[str], None]
_RECONNECT_S = 10.0
_UNLOAD_S = 3.0


class Attempt:
    """One roll-out on one server, from its plan to its proof."""

    def __init__(
        self,
        repository: Location,
        name: str,
        version: int,
        client: TritonClient,
        options: RolloutOptions,
        report: Report,
    ) -> None:
        self.repository, self.name, self.version = repository, name, version
        self.client, self.options, self._tell = client, options, report
        self.entry = find_model(repository, name)
        self.folder = self.entry.version(version).path
        self.events: list[str] = []
        self.began = time.monotonic()
        self.before = observe(client, name)
        self.plan = plan_from(self.entry, version, self.before, keep_previous=options.keep_previous)

    def dry_run(self) -> Rollout:
        """Return the plan as a result."""
        return self.result(changed=False, ready=self.before.ready, smoke=None, dry_run=True)

    def run(self) -> Rollout:
        """Do what has to be done, and prove it."""
        if not self.plan.changes:
            return self._confirm()
        self.check_version()
        original = read_bytes(self.repository, self.name)
        try:
            state, smoke = self.apply()
            record_deployment(self.repository, self.name, self.version)
        except (RepoManagerError, KeyboardInterrupt, OSError) as exc:
            raise self._undo(original, exc) from exc
        return self.result(changed=True, ready=state.ready, smoke=smoke, draining=state.busy)

    def _note(self, event: str) -> None:
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

    def _confirm(self) -> Rollout:
        """Prove that what is deployed answers; mend it when only its process has died."""
        mended = False
        try:
            smoke = self._smoke(self.before)
        except ServerRefusedError as exc:
            self._note(f"{self.name}:{self.version} is READY but does not answer: {exc.message}")
            smoke = self._mend()
            mended = True
        record_deployment(self.repository, self.name, self.version)
        return self.result(changed=mended, ready=self.before.ready, smoke=smoke, mended=mended)

    def check_version(self) -> None:
        """Check the version's files before the server is asked to read them.

        Raises:
            RepositoryError: one is missing or damaged.
        """
        where = f"{self.name}/{self.version}"
        problems = [
            problem
            for problem in verify(self.repository, self.name, models=False)
            if problem.severity is Severity.ERROR and problem.where.startswith(where)
        ]
        if problems:
            raise RepositoryError(
                f"{self.name}:{self.version} is damaged: " + "; ".join(problem.what for problem in problems),
                hint="Publish it again as a new version; nothing was changed.",
            )

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
        self._serve(versions)
        state = observe(self.client, self.name)
        if not set(self.plan.ready_after) <= set(state.ready):
            state = self._insist(state)
        smoke = self._smoke(state)
        self._note(f"{self.name}:{self.version} answers ({smoke.reference} reference, {smoke.latency_ns / 1e6:.1f} ms)")
        return smoke

    def finish(self) -> ServedState:
        """Serve exactly what was planned."""
        if observe(self.client, self.name).ready != self.plan.ready_after:
            self._serve(self.plan.ready_after)
        state = wait_until_only_ready(self.client, self.name, self.plan.ready_after, self.options.settle_timeout_s)
        if state.ready != self.plan.ready_after:
            wanted = ", ".join(map(str, self.plan.ready_after))
            raise ServerRefusedError(
                f"{state.sentence}, expected exactly {wanted}",
                hint="Is it the server of this repository? Its log says why.",
            )
        return state

    def _serve(self, versions: tuple[int, ...]) -> None:
        numbers = ", ".join(map(str, versions))
        self._note(f"serving version{'s' if len(versions) > 1 else ''} {numbers}")
        set_served_versions(self.repository, self.name, versions)
        self.client.load(self.name, timeout_s=self.options.load_timeout_s)

    def _insist(self, state: ServedState) -> ServedState:
        """Load again with a newer config.pbtxt: Triton answers 200 and does nothing when nothing looks newer to it."""
        self._note(f"the server answered the load and did nothing ({state.sentence}); asking again")
        touch(self.repository, self.name)
        self.client.load(self.name, timeout_s=self.options.load_timeout_s)
        state = observe(self.client, self.name)
        if set(self.plan.ready_after) <= set(state.ready):
            return state
        reason = state.reasons.get(self.version)
        raise ServerRefusedError(
            f"{self.client.url} answered the load of {self.name} and did nothing: {state.sentence}"
            + (f" ({reason})" if reason else ""),
            hint=f"Does it serve {self.repository}? A server of another repository does not see this change.",
        )

    def _smoke(self, state: ServedState) -> SmokeResult:
        if state.config is None or self.version not in state.ready:
            raise ServerRefusedError(f"{self.name}:{self.version} is not ready: {state.sentence}")
        return smoke_test(
            self.client, self.folder, self.name, self.version, state.config, timeout_s=self.options.smoke_timeout_s
        )

    def _mend(self) -> SmokeResult:
        """Unload and load: the only way to bring back a version whose process was killed.

        Raises:
            ServerRefusedError: it does not come back, or still does not answer.
        """
        self._note(f"unloading and loading {self.name}")
        self.client.unload(self.name, timeout_s=self.options.load_timeout_s)
        # Triton may wait for the dead process for ever; a version that is UNLOADING does not hinder a load.
        wait_until_only_ready(self.client, self.name, (), _UNLOAD_S, settled=True)
        self.client.load(self.name, timeout_s=self.options.load_timeout_s)
        state = wait_until_only_ready(self.client, self.name, self.plan.ready_after, self.options.settle_timeout_s)
        return self._smoke(state)

    def _undo(self, original: bytes | None, cause: BaseException) -> RepoManagerError:
        """Put things back as they were; return what to tell the user."""
        what = f"{self.name}:{self.version} was not deployed"
        failure = "interrupted" if isinstance(cause, KeyboardInterrupt) else str(cause)
        self._note(f"failed: {failure.splitlines()[0] if failure else type(cause).__name__}; putting things back")
        try:
            write_back(self.repository, self.name, original)
            state = self.restore_server()
        except ServerUnreachableError as exc:
            return ServerUnreachableError(
                f"{what}: {failure}\nconfig.pbtxt is as it was before, but the "
                f"server does not answer any more: {exc.message}",
                hint="Start it again: it will serve what it served before.",
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
        self.client.wait_live(_RECONNECT_S)
        if self.before.ready:
            self.client.load(self.name, timeout_s=self.options.load_timeout_s)
        else:
            self.client.unload(self.name, timeout_s=self.options.load_timeout_s)
        state = wait_until_only_ready(self.client, self.name, self.before.ready, self.options.settle_timeout_s)
        if state.ready != self.before.ready:
            raise ServerRefusedError(f"{state.sentence}, before it were {self.before.ready or 'none'}")
        return state

    def by_hand(self, original: bytes | None) -> str:
        """Say what a person has to do when putting things back failed."""
        versions = ", ".join(map(str, self.before.ready)) or "none"
        policy = self.plan.policy_before
        text = policy if isinstance(policy, str) else "specific { versions: [" + ", ".join(map(str, policy)) + "] }"
        missing = " (it had no such file)" if original is None else ""
        return (
            f"By hand: set version_policy in {self.entry.path / 'config.pbtxt'} to {text}{missing}, then load "
            f"{self.name} through {self.client.url} (POST /v2/repository/models/{self.name}/load). "
            f"Before, READY were: {versions}."
        )
