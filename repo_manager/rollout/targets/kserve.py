"""`--to kserve://namespace/name`: an InferenceService pinned to a snapshot, by steps of canary traffic.

KServe makes a new revision when `storageUri` changes and sends `canaryTrafficPercent` of the traffic to it; the rest
goes to the revision that was rolled out last. Removing the field promotes the new one, 0 takes all traffic from it.
(kserve, `pkg/controller/v1beta1/inferenceservice/reconcilers/knative/ksvc_reconciler.go`.)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from repo_manager.errors import RepositoryError, ServerRefusedError, ServerUnreachableError, UsageError
from repo_manager.gates import Outcome
from repo_manager.repository import Location, find_model, model_state, scan
from repo_manager.rollout.checks import Check
from repo_manager.rollout.options import TrialOptions
from repo_manager.rollout.result import ServerResult, SnapshotChange, TrialResult
from repo_manager.rollout.targets.api import Api, Kind, Object
from repo_manager.rollout.targets.base import Context
from repo_manager.rollout.targets.kserve_status import failure_of, wait_for_service, watch_service
from repo_manager.rollout.targets.snapshot import Snapshot, SnapshotModel, snapshots_of, write_snapshot
from repo_manager.rollout.targets.template import MODELS, SNAPSHOTS, models_text, parse_models, snapshots_beside
from repo_manager.rollout.trial.steps import CanaryStep, untried

__all__ = ["InferenceService", "KServeTarget", "KServeWeights", "previous_on_kserve"]

_TARGET = re.compile(r"kserve://(?P<namespace>[a-z0-9][-a-z0-9]*)/(?P<name>[a-z0-9][-a-z0-9.]*)/?")
_MODE = "serving.kserve.io/deploymentMode"
_WITHOUT_CANARY = frozenset({"RawDeployment", "Standard"})
_ALL = 100


@dataclasses.dataclass(frozen=True)
class InferenceService:
    """An InferenceService in the cluster that the kubeconfig names."""

    namespace: str
    name: str

    @classmethod
    def parse(cls, text: str) -> InferenceService:
        """Read `kserve://namespace/name`.

        Raises:
            UsageError: it is none.
        """
        match = _TARGET.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} is no InferenceService", hint="Write it as kserve://NAMESPACE/NAME.")
        return cls(match["namespace"], match["name"])

    def __str__(self) -> str:
        return f"kserve://{self.namespace}/{self.name}"


def previous_on_kserve(service: InferenceService, repository: Location, name: str, api: Api) -> int:
    """Return the version of a model to go back to: the one deployed before the one that the InferenceService serves.

    Raises:
        RepositoryError: the repository remembers none.
        ServerError: the API server refused or did not answer.
    """
    found = api.custom(Kind.INFERENCE_SERVICE, service.namespace, service.name)
    held = parse_models((found["metadata"].get("annotations") or {}).get(MODELS)) or {}
    current = max(held.get(name, (0,)))
    existing = {entry.version for entry in find_model(repository, name).versions}
    for deployment in reversed(model_state(repository, name).deployments):
        if deployment.version != current and deployment.version in existing:
            return deployment.version
    raise RepositoryError(
        f"{service} has no earlier roll-out of {name} to go back to",
        hint=f"Deploy a version by its number: repo-manager deploy {name}:VERSION --to {service}",
    )


class KServeTarget:
    """An InferenceService: a target of one part, which is itself.

    That the new revision serves is known from KServe's conditions and model status, not from an inference of ours:
    a revision's address is a matter of the cluster's ingress.

    Args:
        context: of the roll-out; `load_timeout_s` bounds the wait for each step.
        service: the InferenceService.
        api: the cluster.
        trial: steps on the way; `None`: all of the traffic at once, when the revision is ready.

    Raises:
        UsageError: the steps are no whole percentages that ascend, or the trial needs servers that can be asked.
    """

    batch = 1

    def __init__(self, context: Context, service: InferenceService, api: Api, trial: TrialOptions | None) -> None:
        self._context, self._service, self._api = context, service, api
        self._options = TrialOptions() if trial is None else trial
        self._percents = _percents_of(self._options)
        self._percent = self._percents[0] if self._percents else _ALL
        self._steps: list[CanaryStep] = []
        self._wanted = trial is not None
        self.parts = (self,)
        self.checks: tuple[Check, ...] = ()
        self.touched = False
        self.changes = False
        self._revision = ""

    @property
    def label(self) -> str:
        """The InferenceService's name."""
        return self._service.name

    @property
    def trial(self) -> TrialResult | None:
        """The steps that were taken."""
        return TrialResult(self._options.steps, steps=tuple(self._steps)) if self._wanted else None

    def describe(self) -> str:
        """Return `kserve://namespace/name`."""
        return str(self._service)

    def look(self) -> None:
        """Check the version, read the InferenceService, and see which snapshot it would serve.

        Raises:
            InconclusiveError: a canary was asked for, and the version has all of the traffic already.
        """
        self.checks = self._context.refused_version()
        self._before = self._read()
        self._known = failure_of(self._before)
        self._format = _format_of(self._before)
        self._uri = str(self._before["spec"]["predictor"][self._format]["storageUri"])
        self._annotations: Mapping[str, str] = self._before["metadata"].get("annotations") or {}
        mode = self._annotations.get(_MODE) or (self._before.get("status") or {}).get("deploymentMode", "")
        if self._percents and mode in _WITHOUT_CANARY:
            raise UsageError(
                f"{self._service} runs in KServe's {mode} mode, which has no canary",
                hint="Leave the percentages out, or weight two services by an HTTPRoute (deploy/gateway).",
            )
        self._models = self._chosen()
        self._planned: Snapshot = write_snapshot(
            snapshots_of(self._context.repository),
            self._models,
            signed_by=self._context.options.signed_by,
            dry_run=True,
        )
        self._after = f"{self._annotations.get(SNAPSHOTS) or snapshots_beside(self._uri)}/{self._planned.id}"
        self.changes = self._after != self._uri or _share_of(self._before) != _ALL
        if self._percents and not self.changes:
            raise untried(self._context.name, self._context.version, self.describe())

    def check(self) -> None:
        """Do nothing more: the version was checked before the cluster was asked."""

    def put_back(self) -> None:
        """Do nothing: there is one part."""

    def apply(self) -> None:
        """Write the snapshot and point the InferenceService at it, with the first share of the traffic."""
        write_snapshot(snapshots_of(self._context.repository), self._models, signed_by=self._context.options.signed_by)
        self._context.note(f"{self._uri} -> {self._after}, {self._percent} % of the traffic")
        predictor: Object = {self._format: {"storageUri": self._after}}
        predictor["canaryTrafficPercent"] = None if self._percent == _ALL else self._percent
        version = self._before["metadata"]["resourceVersion"]
        metadata = {"resourceVersion": version, "annotations": {MODELS: models_text(self._planned.models)}}
        self.touched = True
        try:
            self._patch({"metadata": metadata, "spec": {"predictor": predictor}})
        except ServerRefusedError:  # Nothing was changed: nothing is to be put back, least of all over another's.
            self.touched = False
            raise

    def prove(self) -> None:
        """Wait for the revision, and go through the shares of the traffic below all of it."""
        if not self.touched:
            self._percent = _share_of(self._before)
        self._wait(self._percent)
        for percent in self._percents if self.touched else ():
            if percent != self._percent:
                self._share(percent)
            self._watch(percent, self._options.step_s)
            self._options.on_step(percent / _ALL)

    def finish(self) -> None:
        """Give the new revision all of the traffic."""
        if self._percent != _ALL:
            self._share(_ALL)

    def undo(self) -> str:
        """Take the traffic from the new revision at once, then put everything back."""
        percent = self._before["spec"]["predictor"].get("canaryTrafficPercent")
        annotations = {MODELS: self._annotations.get(MODELS)}
        predictor = {self._format: {"storageUri": self._uri}, "canaryTrafficPercent": percent}
        try:
            now = self._read()
            self._known = failure_of(now)
            if now["spec"]["predictor"].get("canaryTrafficPercent") is not None:
                self._patch({"spec": {"predictor": {"canaryTrafficPercent": 0}}})
            self._patch({"metadata": {"annotations": annotations}, "spec": {"predictor": predictor}})
            self._wait(_share_of(self._before), self._context.options.load_timeout_s)
        except ServerUnreachableError as exc:  # unlike a server that starts again, it does not come back by itself
            raise ServerRefusedError(exc.message, hint=exc.hint) from exc
        return f"it serves {self._uri}"

    def by_hand(self) -> str:
        """Say what a person has to do when the undo failed."""
        return (
            f"By hand: kubectl edit inferenceservice {self._service.name} -n {self._service.namespace}; storageUri was "
            f"{self._uri}"
        )

    def result(self) -> ServerResult:
        """Describe what was done, or what would be."""
        name = self._context.name
        held = parse_models(self._annotations.get(MODELS)) or {}
        return ServerResult(
            name=self.label,
            changed=self.changes,
            ready=self._planned.models[name],
            previous=held.get(name, ()),
            proof="none" if self._context.options.dry_run else "conditions",
            checks=self.checks,
            snapshot=SnapshotChange(self._uri, self._after, self._planned.models, revision=self._revision),
        )

    def _chosen(self) -> list[SnapshotModel]:
        """Return what the snapshot has to hold: what is served, with the new version in its place."""
        repository, name = self._context.repository, self._context.name
        held = parse_models(self._annotations.get(MODELS))
        if held is None:
            entries = scan(repository, deep=False)
            held = {entry.name: entry.served_versions for entry in entries if entry.served_versions}
        others = [SnapshotModel(each, held[each], repository) for each in sorted(held) if each != name]
        return [*others, SnapshotModel(name, (self._context.version,), repository)]

    def _share(self, percent: int) -> None:
        """Change the new revision's share of the traffic, and wait until it has it."""
        self._context.note(f"{percent} % of the traffic")
        self._patch({"spec": {"predictor": {"canaryTrafficPercent": None if percent == _ALL else percent}}})
        self._percent = percent
        self._wait(percent)

    def _watch(self, percent: int, seconds: float) -> None:
        """See that the service stays as it is for a while.

        Raises:
            ServerError: it does not.
        """
        if seconds > 0:
            self._context.note(f"watched at {percent} % for {seconds:g} s")
            watch_service(self._api, self._service.namespace, self._service.name, percent, seconds=seconds)
        self._steps.append(CanaryStep(percent / _ALL, seconds, 0, (), Outcome.PASS))

    def _wait(self, percent: int, timeout_s: float | None = None) -> None:
        """Wait for a share; `None` takes what the deadline leaves."""
        if timeout_s is None:
            timeout_s = self._context.deadline.remaining_s(self._context.options.load_timeout_s)
        self._revision = wait_for_service(
            self._api,
            self._service.namespace,
            self._service.name,
            percent,
            timeout_s=timeout_s,
            report=self._context.note,
            known=self._known,
        )

    def _read(self) -> Object:
        return self._api.custom(Kind.INFERENCE_SERVICE, self._service.namespace, self._service.name)

    def _patch(self, patch: Object) -> None:
        self._api.patch_custom(Kind.INFERENCE_SERVICE, self._service.namespace, self._service.name, patch)


def _share_of(service: Object) -> int:
    """Return the newest revision's share of the traffic in per cent, as it is asked for."""
    percent = service["spec"]["predictor"].get("canaryTrafficPercent")
    return _ALL if percent is None else int(percent)


def _percents_of(options: TrialOptions) -> tuple[int, ...]:
    """Return the shares below all of the traffic, as KServe takes them.

    Raises:
        UsageError: they do not ascend between 1 and 99 %, or the trial needs servers that can be asked.
    """
    if options.shadow is not None or options.gates or options.weights_file is not None or options.weights is not None:
        raise UsageError(
            "--shadow, --gate and --weights-file need servers that can be asked, not kserve://",
            hint="KServe's own conditions are watched at each step; alerts are in deploy/prometheus.",
        )
    percents = [round(step * _ALL) for step in options.steps if step < 1]
    if not all(0 < percent < _ALL for percent in percents) or percents != sorted(set(percents)):
        raise UsageError(f"Canary percentages {percents} do not ascend between 1 and 99")
    return tuple(percents)


def _format_of(service: Object) -> str:
    """Return under which key the predictor names its storage: `model`, or the older `triton`."""
    predictor = service["spec"]["predictor"]
    for key in ("model", "triton"):
        if (predictor.get(key) or {}).get("storageUri"):
            return key
    raise ServerRefusedError(
        f"InferenceService {service['metadata']['name']} names no storageUri under predictor.model",
        hint="deploy/kserve has one that does.",
    )


class KServeWeights:
    """The share of an InferenceService's newest revision, for `repo_manager.rollout.trial.canary`.

    Args:
        service: the InferenceService; its newest revision is the new version.
        api: the cluster.
        timeout_s: how long KServe may take to route so.
    """

    def __init__(self, service: InferenceService, api: Api, *, timeout_s: float = 300.0) -> None:
        self._service, self._api, self._timeout_s = service, api, timeout_s
        self._fraction = 0.0

    def set_weight(self, fraction: float) -> None:
        """Route this share to the newest revision, and wait until it is routed so; 1 promotes it.

        Raises:
            ServerError: KServe does not come to it.
        """
        percent = round(fraction * 100)
        patch = {"spec": {"predictor": {"canaryTrafficPercent": None if percent >= 100 else percent}}}
        self._api.patch_custom(Kind.INFERENCE_SERVICE, self._service.namespace, self._service.name, patch)
        wait_for_service(self._api, self._service.namespace, self._service.name, percent, timeout_s=self._timeout_s)
        self._fraction = fraction

    def current(self) -> float:
        """Return the share that was set last; 0 before."""
        return self._fraction
