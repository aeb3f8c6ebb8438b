"""A new version on trial beside the old one on a Triton server: in its shadow, or with a share of the traffic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from repo_manager.errors import RepositoryError
from repo_manager.gates import Gate, GateResult, Outcome
from repo_manager.rollout.checks import Check
from repo_manager.rollout.options import TrialOptions, Weights
from repo_manager.rollout.result import ServerResult, TrialResult
from repo_manager.rollout.rollout_context import RolloutContext
from repo_manager.rollout.targets.triton import TritonTarget
from repo_manager.rollout.targets.triton_part import TritonPart
from repo_manager.rollout.trial.gates import worst_outcome
from repo_manager.rollout.trial.mirror import Mirror
from repo_manager.rollout.trial.shadow import ShadowReport, read_exchanges
from repo_manager.rollout.trial.steps import (
    CanaryStep,
    FileWeights,
    PublishedWeights,
    check_kind,
    gate_error,
    run_steps,
    untried,
)
from repo_manager.rollout.trial.watch import ShadowWatch, TrafficWatch
from repo_manager.server.client import TritonClient
from repo_manager.server.exchange import ModelKind, kind_of
from repo_manager.triton_config.ensembles import is_ensemble

__all__ = ["CanaryTarget"]


class CanaryTarget:
    """A Triton server whose new version must prove itself on requests, beside its inference, before it takes over.

    Args:
        target: the same roll-out without a trial. It must have one server.
        context: the roll-out's context: model, options, deadline, report.
        options: steps, duration and gates of the trial.
        connect: makes more clients of the same server, for mirroring.
    """

    batch = 1

    def __init__(
        self, target: TritonTarget, context: RolloutContext, options: TrialOptions, connect: Callable[[], TritonClient]
    ) -> None:
        self._target, self._context = target, context
        self._options, self._connect = options, connect
        self.parts: Sequence[_Trial | TritonPart] = ()
        self._note = ""

    @property
    def changes(self) -> bool:
        """Whether anything must be done, on the server or in config.pbtxt."""
        return self._target.changes or any(isinstance(part, _Trial) for part in self.parts)

    @property
    def trial(self) -> TrialResult:
        """The result of the trial."""
        steps = self._options.steps
        for part in self.parts:
            if isinstance(part, _Trial):
                return TrialResult(steps, part.shadow, part.steps, part.notes)
        return TrialResult(steps, notes=(self._note,) if self._note else ())

    @property
    def brought(self) -> Mapping[str, tuple[int, ...]]:
        """The models the server has to serve first, because the model needs them."""
        return self._target.brought

    def describe(self) -> str:
        """Return the server's URL."""
        return self._target.describe()

    def look(self) -> None:
        """Look at the server, and read the recorded requests before anything is changed.

        Raises:
            InconclusiveError: the version is served already, and alone, so there is nothing to judge it against.
            UsageError: a model of this kind cannot have such a trial.
        """
        self._target.look()
        (part,) = self._target.parts
        old = max((each for each in part.before.ready if each != self._context.version), default=None)
        if old is None and part.before.ready:
            raise untried(self._context.name, self._context.version, part.label)
        if old is None:
            self._note = "no trial: nothing is served beside it"
            self.parts = (part,)
            return
        kind = ModelKind()
        if part.before.config is not None:
            kind = kind_of(part.client, self._context.name, config=part.before.config.message())
            streams = not kind.decoupled or part.label.startswith("grpc")
            ensemble = is_ensemble(part.before.config)
            check_kind(self._context.name, self._options, sequence=kind.sequence, streams=streams, ensemble=ensemble)
        self.parts = (_Trial(part, (old, kind), self._context, self._options, self._connect),)

    def check(self) -> None:
        """Check the version and the server."""
        self._target.check()

    @property
    def before(self) -> tuple[int, ...] | None:
        """As `Target.before`."""
        return self._target.before

    def put_back(self) -> None:
        """Restore config.pbtxt, without weights."""
        self._target.put_back()


class _Trial:
    """One trial on one server: the wrapped part, with the trial as a part of the proof."""

    def __init__(
        self,
        part: TritonPart,
        beside: tuple[int, ModelKind],
        context: RolloutContext,
        options: TrialOptions,
        connect: Callable[[], TritonClient],
    ) -> None:
        self._part, self._context, self._options = part, context, options
        old, self._kind = beside
        self._versions = (old, context.version)
        self._gates: tuple[Gate, ...] = options.all_gates
        self.shadow: ShadowReport | None = None
        self.steps: tuple[CanaryStep, ...] = ()
        self.notes: tuple[str, ...] = ()
        self._mirror: Mirror | None = None
        self._weights: Weights | None = None
        if options.shadow is not None and not context.options.dry_run:
            if part.before.config is None:
                raise RepositoryError(f"{part.label} does not tell the configuration of {context.name}")
            sequence = self._kind.sequence
            exchanges = read_exchanges(options.shadow.requests, part.before.config, sequence=sequence)
            self._mirror = Mirror(connect, context.name, self._versions, exchanges, options.shadow, self._kind)

    @property
    def label(self) -> str:
        """The server's URL."""
        return self._part.label

    @property
    def touched(self) -> bool:
        """Whether anything may have been changed."""
        return self._part.touched

    @property
    def checks(self) -> tuple[Check, ...]:
        """Of the server."""
        return self._part.checks

    def apply(self) -> None:
        """Serve the old and the new version together."""
        self._part.apply()

    def prove(self) -> None:
        """Ask the new version for an inference, then try it on requests.

        Raises:
            GateError: a gate failed.
            InconclusiveError: a gate is undecided.
        """
        self._part.prove()
        before = self._counted()
        self._run_shadow()
        self._count_others(before)
        self._run_steps()

    def finish(self) -> None:
        """Take the weights from config.pbtxt, let the server read it, and serve exactly the planned versions."""
        if self._options.steps:
            self._part.clear()
        self._part.finish()

    def undo(self) -> str:
        """Take the traffic from the new version, and make the server serve its previous versions."""
        published = isinstance(self._weights, PublishedWeights)  # these weights are restored with config.pbtxt
        if self._weights is not None and not published and self._weights.current() > 0:
            self._weights.set_weight(0.0)
        return self._part.undo()

    def by_hand(self) -> str:
        """Tell a person how to repair a failed undo."""
        return self._part.by_hand()

    def result(self) -> ServerResult:
        """Describe the change made, or planned."""
        return self._part.result()

    def _run_shadow(self) -> None:
        """Mirror until the gates are decided.

        Raises:
            GateError: one failed.
            InconclusiveError: one is undecided.
        """
        shadow, mirror = self._options.shadow, self._mirror
        if shadow is None or mirror is None:
            return
        self._context.note(
            f"mirroring {shadow.requests.name} to versions {mirror.old} and {mirror.new}, "
            f"{shadow.rate_per_s:g} pairs a second, for {shadow.duration_s:g} s at most"
        )
        results: tuple[GateResult, ...] = ()
        try:
            results = ShadowWatch(mirror, self._gates, until_decided=True).watch(shadow.duration_s)
        finally:
            self.shadow = mirror.report(results, worst_outcome(results))
            self._options.on_shadow(self.shadow)
        if worst_outcome(results) is not Outcome.PASS:
            raise gate_error(results)

    def _run_steps(self) -> None:
        options, context = self._options, self._context
        if not options.steps:
            return
        shadow = None if self._mirror is None else ShadowWatch(self._mirror, self._gates, until_decided=False)
        watch = TrafficWatch(self._part.client, context.name, context.version, self._gates, shadow)
        self._weights = self._chosen_weights()
        self.steps = run_steps(
            self._weights, options.steps, options.step_s, watch, context.note, on_step=options.on_step
        )

    def _chosen_weights(self) -> Weights:
        options, context = self._options, self._context
        if options.weights is not None:
            return options.weights
        if options.weights_file is not None:
            return FileWeights(options.weights_file, context.name, self._versions)
        return PublishedWeights(context.repository, context.name, self._versions, self._part.client, self._part.load)

    def _counted(self) -> int:
        """Return how many requests the new version has been counted to get."""
        counted = self._part.client.statistics(self._context.name, self._context.version)
        return counted[0].success_count + counted[0].fail_count if counted else 0

    def _count_others(self, before: int) -> None:
        """Note whether others ask for the new version although no one announced it."""
        others = self._counted() - before - (0 if self._mirror is None else self._mirror.sent)
        # Triton counts a decoupled request after its last response, so the proof's request may be counted late.
        late = 1 if self._kind.decoupled else 0
        if self._mirror is not None and others > late:
            self.notes = (
                f"{others} requests of others went to version {self._context.version} during the trial: they name no "
                "version, "
                "and Triton sends these to the highest number served",
            )
