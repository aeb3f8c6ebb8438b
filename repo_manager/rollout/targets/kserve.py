"""`--to kserve://namespace/name`: an InferenceService pinned to a snapshot, by steps of canary traffic.

With Knative, KServe makes a new revision when `storageUri` changes and sends `canaryTrafficPercent` of the traffic to
it. The rest goes to the revision rolled out last. Removing the field promotes the new one, 0 takes all traffic from it
(kserve, `pkg/controller/v1beta1/inferenceservice/reconcilers/knative/ksvc_reconciler.go`). In Standard mode, from
KServe 0.20 on, `spec.canary` lists Deployments beside the predictor's, each with its share. Naming the predictor after
one of them promotes it without a restart (kserve#5672).
"""

from __future__ import annotations

from collections.abc import Mapping

from repo_manager.errors import ServerRefusedError, ServerUnreachableError, UsageError
from repo_manager.files import document
from repo_manager.gates import Outcome
from repo_manager.repository.scan import find_model
from repo_manager.rollout.checks import Check
from repo_manager.rollout.options import TrialOptions
from repo_manager.rollout.result import ServerResult, SnapshotChange, TrialResult
from repo_manager.rollout.rollout_context import RolloutContext
from repo_manager.rollout.targets.api import Api, Kind, change_unless_changed, patiently
from repo_manager.rollout.targets.api_objects import Object
from repo_manager.rollout.targets.events import Events
from repo_manager.rollout.targets.inference_service import (
    ALL_TRAFFIC,
    InferenceService,
    canaries_of,
    format_of,
    share_of,
)
from repo_manager.rollout.targets.kserve_status import (
    STANDARD,
    Sight,
    WantedState,
    failure_of,
    mode_of,
    see,
    wait_for_service,
    watch_service,
)
from repo_manager.rollout.targets.snapshot import (
    check_leaving,
    check_relatives,
    models_after,
    models_served,
    versions_brought,
    versions_needed,
)
from repo_manager.rollout.targets.snapshot_files import Snapshot, snapshots_of, write_snapshot
from repo_manager.rollout.targets.template import MODELS, SNAPSHOTS, models_text, snapshots_beside
from repo_manager.rollout.trial.steps import CanaryStep, check_kind, untried
from repo_manager.triton_config.config import takes_sequences

__all__ = ["KServeTarget"]

_CANARY = "snapshot-"


class KServeTarget:
    """An InferenceService: target and only part in one.

    The new revision's proof comes from KServe's conditions and model status, not from an inference of ours: a
    revision's address is a matter of the cluster's ingress.

    Args:
        context: of the roll-out. `load_timeout_s` bounds the wait for each step.
        service: address of the InferenceService. `look` reads the object.
        api: connected API of the cluster.
        trial: steps on the way. `None`: all of the traffic at once, when the revision is ready.

    Raises:
        UsageError: the steps are no ascending whole percentages, or the trial needs reachable servers.
    """

    batch = 1

    def __init__(
        self, context: RolloutContext, service: InferenceService, api: Api, trial: TrialOptions | None
    ) -> None:
        self._context, self._service, self._api = context, service, api
        self._options = TrialOptions() if trial is None else trial
        self._percents = _percents_of(self._options)
        self._percent = self._percents[0] if self._percents else ALL_TRAFFIC
        self._steps: list[CanaryStep] = []
        self._wanted = trial is not None
        self.parts = (self,)
        self.checks: tuple[Check, ...] = ()
        self.brought: Mapping[str, tuple[int, ...]] = {}
        self.touched = False
        self.changes = False
        self._revision = self._canary = ""

    @property
    def label(self) -> str:
        """The InferenceService's name, with its context where named."""
        context = self._service.context
        return self._service.name if context is None else f"{self._service.name} in {context}"

    @property
    def trial(self) -> TrialResult | None:
        """The steps taken."""
        return TrialResult(self._options.steps, steps=tuple(self._steps)) if self._wanted else None

    def describe(self) -> str:
        """Return `kserve://namespace/name`."""
        return str(self._service)

    def look(self) -> None:
        """Check the version, read the InferenceService, and find the snapshot to serve.

        Raises:
            InconclusiveError: a canary was asked for, and the version has all of the traffic already.
            UsageError: a model of this kind cannot have one.
        """
        if not self._context.leaves:
            self.checks = self._context.refused_version(versions_needed(self._context))
        if self._percents:
            self._check_kind()
        self.seen: Sight = see(self._api, self._service.namespace, self._service.name)
        self._before = self.seen.service
        self._events = Events(self._api, self._before, self._context)
        self._known = failure_of(self._before)
        self._format = format_of(self._before)
        self._uri = str(self._before["spec"]["predictor"][self._format]["storageUri"])
        self._annotations: Mapping[str, str] = self._before["metadata"].get("annotations") or {}
        self._standard = mode_of(self._before) == STANDARD
        strange = [name for name in canaries_of(self._before) if not name.startswith(_CANARY)]
        if strange:
            raise ServerRefusedError(
                f"{self._service} has a canary that repo-manager did not make: {', '.join(strange)}",
                hint="Promote it or remove it first.",
            )
        self._held, source = models_served(self._context.repository, self._uri, self._snapshots, str(self._service))
        self._models = models_after(self._context, self._held, source)
        self.brought = versions_brought(self._context, self._held)
        if self._context.leaves:
            self.checks = check_leaving(self._context, self._held, str(self._service))
        else:
            self.checks += check_relatives(self._context, self._models, str(self._service))
        self._planned: Snapshot = write_snapshot(
            snapshots_of(self._context.repository),
            self._models,
            signed_by=self._context.options.signed_by,
            dry_run=True,
        )
        self._after = f"{self._snapshots}/{self._planned.id}"
        self.changes = (
            self._after != self._uri or share_of(self._before) != ALL_TRAFFIC or bool(canaries_of(self._before))
        )
        if self._context.leaves:
            served = self._held.get(self._context.name, ())
            self.changes = self._context.remaining(served) != served
        if self._percents and not self.changes:
            raise untried(self._context.name, self._context.version, self.describe())

    def _check_kind(self) -> None:
        """Refuse shares of the traffic where the model or a needed one keeps sequences."""
        name, repository = self._context.name, self._context.repository
        configs = [find_model(repository, each).config() for each in (name, *self._context.needs)]
        messages = [config.message() for config in configs if config is not None]
        sequence = any(takes_sequences(message) for message in messages)
        check_kind(name, self._options, sequence=sequence)

    def check(self) -> None:
        """Do nothing more: the version was checked before the cluster was asked."""

    @property
    def before(self) -> None:
        """Nothing: the repository's config.pbtxt stays as it is."""
        return

    def put_back(self) -> None:
        """Do nothing: there is one part."""

    def apply(self) -> None:
        """Write the snapshot and point the InferenceService at it, with the first share of the traffic.

        Raises:
            UsageError: this KServe has no canary in Standard mode. Nothing was changed.
        """
        if not self.changes:  # with several services, only some of them change
            return
        write_snapshot(snapshots_of(self._context.repository), self._models, signed_by=self._context.options.signed_by)
        self._context.note(f"{self._uri} -> {self._after}, {self._percent} % of the traffic")
        self._canary = f"{_CANARY}{self._planned.id[:8]}" if self._standard and self._percent != ALL_TRAFFIC else ""
        metadata = {} if self._canary else {"annotations": {MODELS: models_text(self._planned.models)}}
        self.touched = True
        try:
            made = change_unless_changed(
                self._before, self._read, self._patch, {"metadata": metadata, "spec": self._spec(self._percent)}
            )
        except ServerRefusedError:  # nothing was changed, so an undo must not touch another's change
            self.touched = False
            raise
        if self._canary and not canaries_of(made):  # the API server drops fields unknown to the CRD
            self.touched = False
            raise UsageError(
                f"{self._service} runs in KServe's Standard mode, which has no canary before KServe 0.20",
                hint=f"Leave the percentages out, or weight two services by an HTTPRoute: {document('kubernetes.md')}",
            )
        self._events.tell("RolloutStarted", f"{self._uri} -> {self._after}, {self._percent} % of the traffic")

    def prove(self) -> None:
        """Wait until it serves the wanted snapshot, and go through the shares of the traffic below all of it."""
        if not self.touched and self._context.leaves:
            return
        if not self.touched:
            self._percent = share_of(self._before)
        self._wait()
        for percent in self._percents if self.touched else ():
            if percent != self._percent:
                self._share(percent)
            self._watch(percent, self._options.step_s)
            self._options.on_step(percent / ALL_TRAFFIC)

    def finish(self) -> None:
        """Give the new version all of the traffic."""
        if self._percent != ALL_TRAFFIC:
            self._share(ALL_TRAFFIC)
        if self.touched:
            self._events.tell("RolloutDone", f"it serves {self._after}")

    def undo(self) -> str:
        """Take the traffic from the new version at once, then put everything back."""
        spec: Object = {"predictor": {self._format: {"storageUri": self._uri}}}
        spec["predictor"]["canaryTrafficPercent"] = self._before["spec"]["predictor"].get("canaryTrafficPercent")
        if self._standard:
            spec["predictor"]["name"] = self._before["spec"]["predictor"].get("name")
            spec["canary"] = self._before["spec"].get("canary")
        patch = {"metadata": {"annotations": {MODELS: self._annotations.get(MODELS)}}, "spec": spec}
        try:
            now = see(self._api, self._service.namespace, self._service.name)
            if now.service["spec"]["predictor"].get("canaryTrafficPercent") is not None:
                patiently(lambda: self._patch({"spec": {"predictor": {"canaryTrafficPercent": 0}}}))
            patiently(lambda: self._patch(patch))
            made_since = "" if now.revision == self.seen.revision else now.revision
            wanted = WantedState(
                self._uri, share_of(self._before), not_revision=made_since, known=failure_of(now.service)
            )
            self._wait(wanted)
        except ServerUnreachableError as exc:  # the API server stays unreachable, unlike a restarting server
            raise ServerRefusedError(exc.message, hint=exc.hint) from exc
        self._events.tell("RolloutUndone", f"put back, it serves {self._uri}", warning=True)
        return f"it serves {self._uri}"

    def by_hand(self) -> str:
        """Tell a person how to repair a failed undo."""
        self._events.tell("RolloutFailed", f"not put back; before, it served {self._uri}", warning=True)
        where = self._service.namespace
        if self._service.context is not None:
            where += f" --context {self._service.context}"
        return f"By hand: kubectl edit inferenceservice {self._service.name} -n {where}; storageUri was {self._uri}"

    def result(self) -> ServerResult:
        """Describe the change made, or planned."""
        name = self._context.name
        return ServerResult(
            name=self.label,
            changed=self.changes,
            ready=self._planned.models.get(name, ()),
            previous=self._held.get(name, ()),
            proof="none" if self._context.options.dry_run else "conditions",
            checks=self.checks,
            snapshot=SnapshotChange(self._uri, self._after, self._planned.models, revision=self._revision),
        )

    @property
    def _snapshots(self) -> str:
        """Where snapshots are, as the cluster sees them."""
        return self._annotations.get(SNAPSHOTS) or snapshots_beside(self._uri)

    def _spec(self, percent: int) -> Object:
        """Return the part of the spec for a share of the traffic on the new version."""
        if not self._standard:
            share = None if percent == ALL_TRAFFIC else percent
            return {"predictor": {self._format: {"storageUri": self._after}, "canaryTrafficPercent": share}}
        if percent != ALL_TRAFFIC:
            block = {**self._before["spec"]["predictor"][self._format], "storageUri": self._after}
            return {"canary": [{"trafficPercent": percent, "predictor": {"name": self._canary, self._format: block}}]}
        promoted = {"name": self._canary} if self._canary else {}
        gone = {"canary": None} if self._canary or canaries_of(self._before) else {}
        return {**gone, "predictor": {**promoted, self._format: {"storageUri": self._after}}}

    def _share(self, percent: int) -> None:
        """Change the new version's share of the traffic, and wait until it has it."""
        self._context.note(f"{percent} % of the traffic")
        metadata = {"annotations": {MODELS: models_text(self._planned.models)}} if percent == ALL_TRAFFIC else {}
        self._patch({"metadata": metadata, "spec": self._spec(percent)})
        self._percent = percent
        self._wait()

    def _watch(self, percent: int, seconds: float) -> None:
        """Check that the service stays as it is for a while.

        Raises:
            ServerError: the service changes or fails meantime.
        """
        if seconds > 0:
            self._context.note(f"watched at {percent} % for {seconds:g} s")
            watch_service(self._api, self._service.namespace, self._service.name, self._wanted_now(), seconds=seconds)
        self._steps.append(CanaryStep(percent / ALL_TRAFFIC, seconds, 0, (), Outcome.PASS))

    def _wanted_now(self) -> WantedState:
        new = self.touched and self._after != self._uri
        return WantedState(
            self._after,
            self._percent,
            canary=self._canary if self._percent != ALL_TRAFFIC else "",
            not_revision=self.seen.revision if new else "",
            known=self._known,
        )

    def _wait(self, wanted: WantedState | None = None) -> None:
        """Wait for the share. `None` takes the new version's. Every look ends at the deadline, with the same words."""
        self._revision = wait_for_service(
            self._api,
            self._service.namespace,
            self._service.name,
            self._wanted_now() if wanted is None else wanted,
            timeout_s=self._context.options.load_timeout_s,
            report=self._context.note,
        )

    def _read(self) -> Object:
        return self._api.custom(Kind.INFERENCE_SERVICE, self._service.namespace, self._service.name)

    def _patch(self, patch: Object) -> Object:
        return self._api.patch_custom(Kind.INFERENCE_SERVICE, self._service.namespace, self._service.name, patch)


def _percents_of(options: TrialOptions) -> tuple[int, ...]:
    """Return the shares below all of the traffic, as KServe takes them.

    Raises:
        UsageError: they do not ascend between 1 and 99 %, or the trial needs reachable servers.
    """
    if options.shadow is not None or options.gates or options.weights_file is not None or options.weights is not None:
        raise UsageError(
            "--shadow, --gate and --weights-file need servers that can be asked, not kserve://",
            hint=f"KServe's own conditions are watched at each step; alerts: {document('runbooks/README.md')}",
        )
    percents = [round(step * ALL_TRAFFIC) for step in options.steps if step < 1]
    if not all(0 < percent < ALL_TRAFFIC for percent in percents) or percents != sorted(set(percents)):
        raise UsageError(f"Canary percentages {percents} do not ascend between 1 and 99")
    return tuple(percents)
