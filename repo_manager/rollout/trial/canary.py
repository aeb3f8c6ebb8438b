"""A new version on trial beside the old one: in its shadow, or with a growing share of the traffic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from repo_manager.errors import (
    GateError,
    InconclusiveError,
    RepoManagerError,
    RepositoryError,
    RolloutUndoneError,
    UsageError,
)
from repo_manager.repository import Location, record_deployment
from repo_manager.rollout.attempt import Attempt, Report
from repo_manager.rollout.checks import refuse
from repo_manager.rollout.lease import rollout_lease
from repo_manager.rollout.policy_file import read_bytes, write_back
from repo_manager.rollout.result import Rollout, RolloutOptions
from repo_manager.rollout.signals import as_interrupts
from repo_manager.rollout.trial.gates import Gate, GateOutcome, GateResult, parse_gates, worst_outcome
from repo_manager.rollout.trial.mirror import Mirror
from repo_manager.rollout.trial.recorded import read_requests
from repo_manager.rollout.trial.shadow import ShadowOptions, ShadowReport
from repo_manager.rollout.trial.steps import CanaryStep, gate_error, run_steps
from repo_manager.rollout.trial.watch import ShadowWatch, TrafficWatch
from repo_manager.rollout.trial.weights import FileWeights, PublishedWeights, Weights
from repo_manager.server import TritonClient

__all__ = ["CanaryOptions", "CanaryRollout", "run_canary"]

_DEFAULT_GATES = "errors<1%"


@dataclasses.dataclass(frozen=True)
class CanaryOptions:
    """How a version is tried.

    Attributes:
        steps: rising shares of the traffic, the last one 1; empty for a shadow alone.
        step_s: how long each is watched.
        gates: what has to hold; empty takes `errors<1%`.
        shadow: mirror recorded requests; `None`: only the server's counters are watched.
        weights_file: write the weights there instead of publishing them on the server.
    """

    steps: tuple[float, ...] = ()
    step_s: float = 120.0
    gates: tuple[Gate, ...] = ()
    shadow: ShadowOptions | None = None
    weights_file: Path | None = None

    @property
    def all_gates(self) -> tuple[Gate, ...]:
        """The gates, or the default ones."""
        return self.gates or parse_gates(_DEFAULT_GATES)

    @property
    def longest_s(self) -> float:
        """How long the trial takes at most."""
        return len(self.steps) * self.step_s + (0.0 if self.shadow is None else self.shadow.duration_s)

    def check(self) -> None:
        """See whether the gates can be judged at all.

        Raises:
            UsageError: one needs mirrored requests, or there is neither a shadow nor a step.
        """
        if self.shadow is None and not self.steps:
            raise UsageError("neither a shadow nor canary steps were asked for")
        deaf = [gate.text for gate in self.gates if gate.metric not in ("errors", "mean") or gate.relative]
        if self.shadow is None and deaf:
            raise UsageError(
                f"the server's counters cannot tell {', '.join(deaf)}: they know errors and mean times only",
                hint="Add --shadow REQUESTS, or use errors<... and mean<... alone.",
            )


@dataclasses.dataclass(frozen=True)
class CanaryRollout:
    """A trial that ended well, or its plan.

    Attributes:
        rollout: the roll-out that it was part of.
        shadow: what mirroring showed; `None` without.
        steps: the steps that were taken.
        notes: what is worth knowing.
    """

    rollout: Rollout
    shadow: ShadowReport | None
    steps: tuple[CanaryStep, ...]
    notes: tuple[str, ...]


def run_canary(
    repository: Location,
    name: str,
    version: int,
    client: TritonClient,
    canary: CanaryOptions,
    *,
    options: RolloutOptions | None = None,
    report: Report = lambda _: None,
    connect: Callable[[], TritonClient] | None = None,
    weights: Weights | None = None,
    on_shadow: Callable[[ShadowReport], None] = lambda _: None,
) -> CanaryRollout:
    """Put a version into service when it has proven itself on requests.

    Old and new are served together meanwhile, and the old one goes on being served when the trial does not end well.
    A request that names no version goes to the higher number while both are served (Triton's rule): where there are
    such requests, they are on trial from the first moment, and the notes count them.

    Args:
        repository: the repository that the server serves.
        name: the model.
        version: the new version.
        client: of the server.
        canary: how to try it.
        options: of the roll-out; `None` takes the defaults.
        report: told what is being done.
        connect: makes more clients of the same server for mirroring; `None` connects without TLS and headers.
        weights: gives the new version its share; `None`: published on the server, or in the weights file.
        on_shadow: given the shadow's report, whatever its outcome.

    Returns:
        What was done; without an old version beside it, or when it is served already, a plain deployment.

    Raises:
        UsageError: the gates cannot be judged.
        InputError: the recorded requests cannot be read or do not fit.
        GateError: a gate failed; the previous state was put back.
        InconclusiveError: a gate is undecided; the previous state was put back.
        RolloutUndoneError: something else failed; the previous state was put back.
        RollbackFailedError: putting it back failed.
        ServerError: as `deploy`.
    """
    canary.check()
    options = RolloutOptions() if options is None else options
    # The deadline is for what the server does: the time that the trial was asked to take comes on top.
    options = dataclasses.replace(options, deadline_s=options.deadline_s + canary.longest_s)
    repository = repository.resolve()
    if options.dry_run:
        return CanaryRollout(Attempt(repository, name, version, client, options, report).dry_run(), None, (), ())
    with rollout_lease(repository, name, timeout_s=options.lease_timeout_s), as_interrupts():
        attempt = Attempt(repository, name, version, client, options, report)
        trial = _Trial(attempt, canary, connect or (lambda: TritonClient.connect(client.url)), on_shadow)
        return trial.run(weights)


class _Trial:
    """One trial on one server."""

    def __init__(
        self,
        attempt: Attempt,
        canary: CanaryOptions,
        connect: Callable[[], TritonClient],
        on_shadow: Callable[[ShadowReport], None],
    ) -> None:
        self._attempt, self._canary = attempt, canary
        self._connect, self._on_shadow = connect, on_shadow
        self._mirror: Mirror | None = None
        self._shadow: ShadowReport | None = None

    def run(self, weights: Weights | None) -> CanaryRollout:
        """Bring the new version up, try it, and finish; or put things back."""
        attempt = self._attempt
        old = max((each for each in attempt.before.ready if each != attempt.version), default=None)
        if old is None or attempt.version in attempt.before.ready:
            why = "it is served already" if old is not None or attempt.before.ready else "nothing is served beside it"
            return CanaryRollout(attempt.run(), None, (), (f"no trial: {why}",))
        attempt.checks = (*attempt.check_version(), *attempt.check_server())
        refuse(attempt.name, attempt.version, attempt.checks, attempt.options)
        self._read_requests(old)
        original = read_bytes(attempt.repository, attempt.name)
        try:
            smoke = attempt.bring_up(attempt.loaded_meanwhile())
            before = self._counted()
            self._run_shadow()
            notes = self._notes(before)
            steps = self._run_steps(old, weights)
            write_back(attempt.repository, attempt.name, original)
            attempt.write_policy(attempt.plan.ready_after)
            attempt.client.load(attempt.name, timeout_s=attempt.options.load_timeout_s)
            state = attempt.finish()
            record_deployment(attempt.repository, attempt.name, attempt.version)
        except (RepoManagerError, KeyboardInterrupt, OSError) as exc:
            raise self._undone(original, exc) from exc
        except BaseException as exc:
            attempt.undo(original, exc)  # a fault of ours is no reason to leave the server half-way
            raise
        rollout = attempt.result(changed=True, ready=state.ready, smoke=smoke, draining=state.busy)
        return CanaryRollout(rollout, self._shadow, steps, notes)

    def _read_requests(self, old: int) -> None:
        """Read the recorded requests before anything is changed."""
        shadow, attempt = self._canary.shadow, self._attempt
        if shadow is None:
            return
        if attempt.before.config is None:
            raise RepositoryError(f"{attempt.client.url} does not tell the configuration of {attempt.name}")
        requests = read_requests(shadow.requests, attempt.before.config)
        self._mirror = Mirror(self._connect, attempt.name, (old, attempt.version), requests, shadow)

    def _run_shadow(self) -> None:
        """Mirror until the gates are decided.

        Raises:
            GateError: one failed.
            InconclusiveError: one is undecided.
        """
        shadow, mirror = self._canary.shadow, self._mirror
        if shadow is None or mirror is None:
            return
        self._attempt.note(
            f"mirroring {shadow.requests.name} to versions {mirror.old} and {mirror.new}, "
            f"{shadow.rate_per_s:g} pairs a second, for {shadow.duration_s:g} s at most"
        )
        results: tuple[GateResult, ...] = ()
        try:
            results = ShadowWatch(mirror, self._canary.all_gates, until_decided=True).watch(shadow.duration_s)
        finally:
            self._shadow = mirror.report(results, worst_outcome(results))
            self._on_shadow(self._shadow)
        if worst_outcome(results) is not GateOutcome.PASS:
            raise gate_error(results)

    def _run_steps(self, old: int, weights: Weights | None) -> tuple[CanaryStep, ...]:
        canary, attempt = self._canary, self._attempt
        if not canary.steps:
            return ()
        versions = (old, attempt.version)
        if weights is None and canary.weights_file is not None:
            weights = FileWeights(canary.weights_file, attempt.name, versions)
        elif weights is None:
            weights = PublishedWeights(
                attempt.repository,
                attempt.name,
                versions,
                attempt.client,
                load_timeout_s=attempt.options.load_timeout_s,
            )
        shadow = None if self._mirror is None else ShadowWatch(self._mirror, canary.all_gates, until_decided=False)
        watch = TrafficWatch(attempt.client, attempt.name, attempt.version, canary.all_gates, shadow)
        return run_steps(weights, canary.steps, canary.step_s, watch, attempt.note)

    def _counted(self) -> int:
        """Return how many requests the new version has been counted to get."""
        counted = self._attempt.client.statistics(self._attempt.name, self._attempt.version)
        return counted[0].success_count + counted[0].fail_count if counted else 0

    def _notes(self, before: int) -> tuple[str, ...]:
        """Say whether others ask for the new version although nobody was told of it."""
        others = self._counted() - before - (0 if self._mirror is None else self._mirror.sent)
        if self._mirror is None or others <= 0:
            return ()
        return (
            f"{others} requests of others went to version {self._attempt.version} meanwhile: they name no version, and "
            "Triton sends these to the highest number served",
        )

    def _undone(self, original: bytes | None, cause: BaseException) -> RepoManagerError:
        """Put things back; a gate keeps its own exit code."""
        error = self._attempt.undo(original, cause)
        if isinstance(error, RolloutUndoneError) and isinstance(cause, GateError | InconclusiveError):
            return type(cause)(error.message)  # with the cause's hint in it
        return error
