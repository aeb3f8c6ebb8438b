"""One Triton server of a roll-out: its served state, its change and proof, and the way back."""

from __future__ import annotations

from repo_manager.errors import RepositoryError, ServerRefusedError
from repo_manager.repository.configuration import set_served_versions, touch_config, write_config_bytes
from repo_manager.repository.stores import open_store
from repo_manager.rollout.checks import Check
from repo_manager.rollout.observe import (
    ServedState,
    load_on_server,
    observe,
    require_control,
    require_known,
    wait_until_only_ready,
)
from repo_manager.rollout.plan import RolloutPlan, VersionFate, differing_fields, hidden_changes, obstacle_of, plan_from
from repo_manager.rollout.prediction.rules import INSTANCES
from repo_manager.rollout.result import ServerResult
from repo_manager.rollout.rollout_context import RolloutContext
from repo_manager.rollout.server_checks import check_server
from repo_manager.rollout.smoke import SmokeResult, smoke_test
from repo_manager.rollout.targets.relatives import Family, Relatives
from repo_manager.server.client import TritonClient
from repo_manager.triton_config.config import CONFIG_FILENAME

__all__ = ["LEFT_ALONE", "TritonPart"]

_UNLOAD_S = 3.0
LEFT_ALONE = (VersionFate.KEEP, VersionFate.DROP)


class TritonPart:
    """One server, from the first look at its served state to the proof of the new one.

    Args:
        context: the roll-out's context: model, options, deadline, report.
        client: connected client of the server.
        family: the models around the one rolled out.

    Raises:
        ServerUnreachableError: no answer.
        ServerRefusedError: the server refuses to list its models.
    """

    def __init__(self, context: RolloutContext, client: TritonClient, family: Family) -> None:
        self.context, self.client = context, client
        self.touched = self._reloaded = False
        self.checks: tuple[Check, ...] = ()
        self.before = self._observe()
        context.retried(lambda: require_known(self.before, client, context.name))
        self.plan = self._planned()
        self.relatives = Relatives(context, client, family)
        self.meanwhile: tuple[int, ...] = ()
        self.original: bytes | None = None
        self.smoke: SmokeResult | None = None
        self._state = self.before

    def _planned(self) -> RolloutPlan:
        context = self.context
        return plan_from(
            context.entry,
            context.version,
            self.before,
            keep_previous=context.options.keep_previous,
            pinned=context.pinned,
            obstacle=obstacle_of(context.repository, context.entry),
        )

    @property
    def label(self) -> str:
        """The server's URL."""
        return self.client.url

    @property
    def _unseen(self) -> bool:
        return not open_store(self.context.repository).traits.changes_visible

    def loaded_meanwhile(self) -> tuple[int, ...]:
        """Return the versions served until the new one has proven itself."""
        existing = {each.version for each in self.context.entry.versions}
        return tuple(sorted({*self.plan.ready_after, *(set(self.before.ready) & existing)}))

    def check_server(self) -> tuple[Check, ...]:
        """Check whether this server can take the version.

        Raises:
            ServerRefusedError: it would refuse the calls of the roll-out and its undo.
        """
        context = self.context
        context.retried(lambda: require_control(self.client))
        timeout_s = context.deadline.remaining_s(context.options.smoke_timeout_s)
        found = check_server(context.entry, context.version, self.plan.new_bytes, self.client, timeout_s=timeout_s)
        lost = context.check_pinned(self.before.ready, self.plan.ready_after, self.relatives.ready)
        return (*self.relatives.check(), *lost, *found)

    def apply(self) -> None:
        """Serve the old and the new version together."""
        self.touched = True
        self.relatives.bring()
        self.serve(self.meanwhile)
        state = self._observe()
        self._state = state if self._took(state) else self._insist(state)

    def serve(self, versions: tuple[int, ...]) -> None:
        """Write the version policy, and let the server read it."""
        self._write_policy(versions)
        if self.plan.is_hindered and not self._unseen:
            self._touch()
        self.load()

    def prove(self) -> None:
        """Ask the new version for an inference. Where nothing was applied, bring a dead process back first."""
        if not self.touched:
            self.smoke = self._confirm()
            return
        self.context.check_loaded(self._state.config)
        self.smoke = smoke = self._smoke(self._state)
        what = f"{self.context.name}:{self.context.version}"
        if smoke.reference == "readiness":
            self.note(f"{what} is ready; it was not asked: {smoke.note}")
        else:
            self.note(f"{what} answers ({smoke.describe_reference()}, {smoke.latency_ns / 1e6:.1f} ms)")
        self.relatives.prove(self._state.ready)

    def finish(self) -> None:
        """Serve exactly the planned versions."""
        context, after = self.context, self.plan.ready_after
        if self._observe().ready != after:
            self._write_policy(after)
            self.load()
        else:
            context.change(lambda: set_served_versions(context.repository, context.name, after))
        state = wait_until_only_ready(self.client, context.name, after, context.options.settle_timeout_s)
        if state.ready != after:
            raise ServerRefusedError(
                f"{state.sentence}, expected exactly {', '.join(map(str, after))}",
                hint="Is it the server of this repository? Its log says why.",
            )
        self._state = state
        self.relatives.prove(self._state.ready)

    def clear(self) -> None:
        """Take a trial's entries from config.pbtxt, and let the server read it with the version policy planned."""
        context = self.context
        context.change(lambda: write_config_bytes(context.repository, context.name, self.original))
        self._write_policy(self.plan.ready_after)
        self.load()

    def undo(self) -> str:
        """Make the server serve its previous versions, and confirm it."""
        context, options, before = self.context, self.context.options, self.before.ready
        self.client.wait_live(context.reconnect_s)
        if not before or self._unseen:
            self._unload()
        refusal = ""
        if before:
            # This load may have to wait for the abandoned one, so a short deadline does not apply to it.
            timeout_s = max(options.load_timeout_s, options.settle_timeout_s)
            try:
                load_on_server(self.client, context.repository, context.name, timeout_s, options.signed_by)
            except (ServerRefusedError, RepositoryError) as exc:
                # The server may refuse the restored file. It then still serves the previous versions.
                refusal = f" ({exc.message})"
        state = wait_until_only_ready(self.client, context.name, before, options.settle_timeout_s)
        if state.ready != before:
            raise ServerRefusedError(f"{state.sentence}, before it were {before or 'none'}{refusal}")
        self.relatives.take_back()
        return state.sentence

    def by_hand(self) -> str:
        """Tell a person how to repair a failed undo."""
        name, policy = self.context.name, self.plan.policy_before
        text = policy if isinstance(policy, str) else "specific { versions: [" + ", ".join(map(str, policy)) + "] }"
        missing = " (it had no such file)" if self.original is None else ""
        return (
            f"By hand: set version_policy in config.pbtxt of {self.context.entry.path} to {text}{missing}, then load "
            f"{name} through {self.label} (POST /v2/repository/models/{name}/load). Before, READY were: "
            f"{', '.join(map(str, self.before.ready)) or 'none'}. Running the same command again is safe, too: it "
            "looks at what is there."
        )

    def result(self) -> ServerResult:
        """Describe the change made, or planned."""
        dry_run = self.context.options.dry_run
        return ServerResult(
            name=self.label,
            changed=self._reloaded or (not dry_run and (self.plan.changes or self._state.ready != self.before.ready)),
            ready=self._state.ready,
            previous=self.before.ready,
            proof=_proof(self.smoke),
            smoke=self.smoke,
            plan=self.plan,
            checks=self.checks,
            reloaded=self._reloaded,
            draining=self._state.busy if self.touched else (),
        )

    def tell_plan(self) -> None:
        """Announce the change."""
        if self.plan.changes:
            self.note("plan: " + "; ".join(f"{step.action} {step.version} ({step.reason})" for step in self.plan.steps))

    def note(self, event: str) -> None:
        """Record the change under way. Among several servers with the URL."""
        self.context.note(event if self.context.total == 1 else f"{self.label}: {event}")

    def load(self) -> None:
        """Ask the server to look at the repository again."""
        context = self.context

        def load() -> None:
            if self._unseen:
                self._unload()
            timeout_s = context.deadline.remaining_s(context.options.load_timeout_s)
            load_on_server(self.client, context.repository, context.name, timeout_s, context.options.signed_by)

        context.retried(load)

    def _write_policy(self, versions: tuple[int, ...]) -> None:
        """Write the next load's versions to the repository. A file with these versions already stays as it is."""
        numbers = ", ".join(map(str, versions))
        self.note(f"serving version{'s' if len(versions) > 1 else ''} {numbers}")
        context = self.context
        context.change(lambda: set_served_versions(context.repository, context.name, versions))

    def _touch(self) -> None:
        """Make config.pbtxt newer than anything the server has seen."""
        self.context.change(lambda: touch_config(self.context.repository, self.context.name))

    def _observe(self) -> ServedState:
        return self.context.retried(lambda: observe(self.client, self.context.name))

    def _unload(self) -> None:
        """Unload the model, and wait a moment until none of its versions is left."""
        context = self.context
        self.client.unload(context.name, timeout_s=context.options.load_timeout_s)
        # Triton may wait for a dead process forever (python_backend, `StubLauncher::TerminateStub`). A version still
        # UNLOADING does not block a load.
        wait_until_only_ready(self.client, context.name, (), _UNLOAD_S, settled=True)

    def _took(self, state: ServedState) -> bool:
        """Return whether a load reached its aim: every version is READY, and its instances are the new ones."""
        if not set(self.plan.ready_after) <= set(state.ready):
            return False
        updates = any(step.action is VersionFate.UPDATE for step in self.plan.steps)
        return not updates or INSTANCES not in differing_fields(self.context.entry.config(), state.config)

    def _insist(self, state: ServedState) -> ServedState:
        """Load again with a newer config.pbtxt: Triton answers 200 and does nothing when nothing looks newer to it."""
        context = self.context
        self.note(f"the server answered the load and did nothing ({state.sentence}); asking again")
        self._touch()
        self.load()
        state = self._observe()
        if self._took(state):
            return state
        if set(self.plan.ready_after) <= set(state.ready):
            raise ServerRefusedError(
                f"{self.label} answered the load of {context.name} and still runs it with another {INSTANCES} than "
                f"{CONFIG_FILENAME} says",
                hint="The server's log says why.",
            )
        reason = state.reasons.get(context.version)
        raise ServerRefusedError(
            f"{self.label} answered the load of {context.name} and did nothing: {state.sentence}"
            + (f" ({reason})" if reason else ""),
            hint=" ".join(hidden_changes(context.entry))
            or f"Does it serve {context.repository}? A server of another repository does not see this change, nor does "
            "one with --model-config-name: it reads the file of that name in configs/.",
        )

    def _smoke(self, state: ServedState) -> SmokeResult:
        context, config = self.context, state.config
        if config is None or context.version not in state.ready:
            raise ServerRefusedError(f"{context.name}:{context.version} is not ready: {state.sentence}")

        def ask() -> SmokeResult:
            timeout_s = context.deadline.remaining_s(context.options.smoke_timeout_s)
            folder, name, version = context.folder, context.name, context.version
            return smoke_test(
                self.client,
                folder,
                name,
                version,
                config,
                timeout_s=timeout_s,
                readiness_only=context.options.proof == "readiness",
            )

        return context.retried(ask)

    def _confirm(self) -> SmokeResult:
        """Prove that the deployed version answers. Unload and load it where only its process has died.

        Raises:
            ServerRefusedError: it does not come back, or still does not answer.
        """
        context = self.context
        try:
            return self._smoke(self.before)
        except ServerRefusedError as exc:
            self.note(f"{context.name}:{context.version} is READY but does not answer: {exc.message}")
        self.note(f"unloading and loading {context.name}")
        self.touched = True
        self._unload()
        self.load()
        settle_s = context.options.settle_timeout_s
        self._state = wait_until_only_ready(self.client, context.name, self.plan.ready_after, settle_s)
        smoke = self._smoke(self._state)
        self._reloaded = True
        return smoke


def _proof(smoke: SmokeResult | None) -> str:
    """Return the proof of a version."""
    if smoke is None:
        return "none"
    return "readiness" if smoke.reference == "readiness" else "inference"
