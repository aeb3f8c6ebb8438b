"""Whether an InferenceService has reached its spec: judged by the objects it owns, its conditions and its traffic.

`status.observedGeneration` says nothing about the InferenceService: KServe copies it from the Deployment or the
Knative Service it owns (kserve, `pkg/apis/serving/v1beta1/inference_service_status.go`, `PropagateRawStatus` and
`PropagateStatus`). So a status counts only when the owned objects have changed with the spec: with Knative a new
revision, else a Deployment whose pods are made from the wanted `storageUri`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

from repo_manager.errors import ServerRefusedError
from repo_manager.rollout.calls import OutOfTimeError
from repo_manager.rollout.targets.api import Api, Kind, patiently, pause
from repo_manager.rollout.targets.api_objects import Object
from repo_manager.rollout.targets.kubernetes_status import RolloutProgress, judge

__all__ = [
    "STANDARD",
    "Sight",
    "WantedState",
    "failure_of",
    "missing",
    "mode_of",
    "owned_by",
    "see",
    "wait_for_service",
    "watch_service",
]

_STILL = "If nothing changes at all, check whether KServe's controller runs."
KNATIVE = "Knative"
STANDARD = "Standard"
_MODE = "serving.kserve.io/deploymentMode"
_MODES = {"Serverless": KNATIVE, "Knative": KNATIVE, "RawDeployment": STANDARD, "Standard": STANDARD}
_OWNER = "serving.kserve.io/inferenceservice"
_SOURCE = "internal.serving.kserve.io/storage-initializer-sourceuri"
_FAILED_TRANSITIONS = frozenset({"BlockedByFailedLoad", "InvalidSpec"})


@dataclasses.dataclass(frozen=True)
class Sight:
    """An InferenceService and its owned objects, at one moment.

    Attributes:
        service: the InferenceService as the API server gave it, its status included.
        deployments: those it owns in Standard mode. Empty with Knative.
    """

    service: Object
    deployments: tuple[Object, ...] = ()

    @property
    def revision(self) -> str:
        """The newest Knative revision. Empty in Standard mode, and before there is one."""
        return str(_component(self.service).get("latestCreatedRevision") or "")


@dataclasses.dataclass(frozen=True)
class WantedState:
    """The state an InferenceService must reach.

    Attributes:
        uri: the `storageUri` it must serve.
        percent: its share of the traffic. 100: it is rolled out.
        canary: the name of the serving canary in Standard mode. Empty: the predictor itself does.
        not_revision: a Knative revision with another snapshot. Empty: any may be the one.
        known: a failure from before the change. KServe may go on reporting it for a while.
    """

    uri: str
    percent: int = 100
    canary: str = ""
    not_revision: str = ""
    known: str | None = None


def mode_of(service: Object) -> str:
    """Return `Knative` or `Standard`. Empty until a controller has reported."""
    annotation = (service["metadata"].get("annotations") or {}).get(_MODE)
    told = str(annotation or (service.get("status") or {}).get("deploymentMode") or "")
    return _MODES.get(told, KNATIVE if _component(service).get("latestCreatedRevision") else told)


def owned_by(name: str) -> dict[str, str]:
    """Return the labels of an InferenceService's objects: pods, and Deployments or revisions."""
    return {_OWNER: name}


def see(api: Api, namespace: str, name: str) -> Sight:
    """Read an InferenceService and, in Standard mode, the Deployments it owns.

    Args:
        api: connected API of the cluster.
        namespace: namespace of the InferenceService and of its Deployments.
        name: name of the InferenceService, also the value of its Deployments' owner label.

    Raises:
        ServerRefusedError: it does not exist, or the Deployments may not be listed.
        ServerUnreachableError: the API server gave no answer for a minute.
    """
    service = patiently(lambda: api.custom(Kind.INFERENCE_SERVICE, namespace, name))
    if mode_of(service) != STANDARD:
        return Sight(service)
    return Sight(service, patiently(lambda: api.deployments(namespace, owned_by(name))))


def wait_for_service(
    api: Api,
    namespace: str,
    name: str,
    wanted: WantedState,
    *,
    timeout_s: float,
    report: Callable[[str], None] = lambda _: None,
) -> str:
    """Wait until an InferenceService serves the wanted snapshot, with the wanted share of the traffic.

    Args:
        api: connected API of the cluster.
        namespace: namespace of the InferenceService and of its Deployments.
        name: name of the InferenceService. Without such an object the wait ends at once.
        wanted: the snapshot and share to reach.
        timeout_s: longest time to reach it, in seconds.
        report: called with a line of text at each change.

    Returns:
        The newest revision's name. Empty without Knative.

    Raises:
        ServerRefusedError: KServe or a Deployment says it failed, or it was not ready within `timeout_s`.
        ServerUnreachableError: the API server gave no answer for a minute.
    """
    deadline, told = time.monotonic() + timeout_s, ""
    while True:
        try:
            now = see(api, namespace, name)
        except OutOfTimeError as exc:
            raise (exc.waiting_for(f"{name}: {told}", _STILL) if told else exc) from exc
        lacking = list(missing(now, wanted))
        failure = None if _not_begun(now, wanted) else failure_of(now.service) or _stuck(now, wanted)
        if failure is not None and failure != wanted.known:
            raise ServerRefusedError(f"InferenceService {name}: {failure}")
        if not lacking:
            return str(_component(now.service).get("latestReadyRevision") or "")
        note = "; ".join(lacking)
        if note != told:
            report(f"{name}: {note}")
            told = note
        if time.monotonic() > deadline:
            raise ServerRefusedError(
                f"InferenceService {name} was not ready within {timeout_s:g} s: {note}",
                hint=f"--timeout allows it longer. {_STILL}",
            )
        pause()


def watch_service(api: Api, namespace: str, name: str, wanted: WantedState, *, seconds: float) -> None:
    """See for a while an InferenceService stays ready with its newest revision's share.

    Args:
        api: connected API of the cluster.
        namespace: namespace of the InferenceService and of its Deployments.
        name: name of the InferenceService. It is read about once a second.
        wanted: snapshot and share to hold.
        seconds: how long the state must hold. 0 checks nothing.

    Raises:
        ServerRefusedError: it did not stay ready with that snapshot and share.
        ServerUnreachableError: the API server gave no answer for a minute.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        now = see(api, namespace, name)
        trouble = failure_of(now.service) or "; ".join(missing(now, wanted))
        if trouble:
            raise ServerRefusedError(f"InferenceService {name} at {wanted.percent} % of the traffic: {trouble}")
        pause()


def failure_of(service: Object) -> str | None:
    """Return why KServe has given up, as its model status says, or `None` while it has not."""
    model = (service.get("status") or {}).get("modelStatus") or {}
    state = (model.get("states") or {}).get("targetModelState")
    if model.get("transitionStatus") in _FAILED_TRANSITIONS or state == "FailedToLoad":
        info = model.get("lastFailureInfo") or {}
        told = ": ".join(str(info[key]) for key in ("reason", "message") if info.get(key))
        code = f" (exit code {info['exitCode']})" if info.get("exitCode") is not None else ""
        return f"{model.get('transitionStatus') or state}: {told or 'no reason is given'}{code}"
    return None


def missing(now: Sight, wanted: WantedState) -> Iterator[str]:
    """Yield the conditions still open. None: the InferenceService serves the wanted snapshot."""
    begun = _not_begun(now, wanted)
    if begun:
        yield begun
        return
    status = now.service.get("status") or {}
    conditions = {each["type"]: each for each in status.get("conditions") or ()}
    for kind in ("PredictorReady", "Ready"):
        found = conditions.get(kind) or {}
        if found.get("status") != "True":
            why = found.get("message") or found.get("reason") or ""
            yield f"{kind} is {found.get('status', 'not reported')} {why}".rstrip()
    model = status.get("modelStatus") or {}
    if model and model.get("transitionStatus") != "UpToDate":
        yield f"the model is {model.get('transitionStatus')}"
    if mode_of(now.service) == STANDARD:
        yield from _pods_missing(now, wanted)
    else:
        yield from _revision_missing(now, wanted)


def _not_begun(now: Sight, wanted: WantedState) -> str:
    """Say why the status is still of the old snapshot. Empty: it is of the wanted one."""
    if mode_of(now.service) == STANDARD:
        if any(_source_of(each) == wanted.uri for each in now.deployments):
            return ""
        found = ", ".join(f"{each['metadata']['name']} serves {_source_of(each)}" for each in now.deployments)
        return f"the controller has not changed the Deployment yet ({found or 'there is none'})"
    if not now.revision:
        return "the controller has made no revision yet"
    if now.revision == wanted.not_revision:
        return f"the controller has made no revision after {now.revision} yet"
    return ""


def _serving(now: Sight, wanted: WantedState) -> Iterator[tuple[Object, RolloutProgress]]:
    """Yield the Deployments of the wanted snapshot, and the progress of each."""
    for deployment in now.deployments:
        if _source_of(deployment) == wanted.uri:
            yield deployment, judge(deployment, ())


def _stuck(now: Sight, wanted: WantedState) -> str | None:
    return next((progress.trouble.what for _, progress in _serving(now, wanted) if progress.trouble is not None), None)


def _pods_missing(now: Sight, wanted: WantedState) -> Iterator[str]:
    for deployment, progress in _serving(now, wanted):
        if not progress.done:
            yield f"Deployment {deployment['metadata']['name']}: {progress.note}"
    statuses = (now.service.get("status") or {}).get("canaryStatuses") or ()
    if not wanted.canary and statuses:
        yield f"the controller still has the canary {', '.join(str(each.get('name')) for each in statuses)}"
    if wanted.canary:
        found: Object = next((each for each in statuses if each.get("name") == wanted.canary), {})
        if not found.get("ready"):
            yield f"canary {wanted.canary} is not ready"
        elif found.get("trafficPercent") != wanted.percent:
            yield f"canary {wanted.canary} gets {found.get('trafficPercent')} %, {wanted.percent} % are wanted"


def _revision_missing(now: Sight, wanted: WantedState) -> Iterator[str]:
    component = _component(now.service)
    newest = component.get("latestReadyRevision")
    if now.revision != newest:
        yield f"revision {now.revision} is not ready"
    routed = sum(
        entry.get("percent") or 0
        for entry in component.get("traffic") or ()
        if entry.get("latestRevision") or entry.get("revisionName") == newest
    )
    if routed != wanted.percent:
        yield f"{newest} gets {routed} % of the traffic, {wanted.percent} % are wanted"


def _source_of(deployment: Object) -> str:
    """Return the `storageUri` a Deployment's pods are made from, as KServe's own annotation of them says."""
    annotations = (deployment["spec"]["template"].get("metadata") or {}).get("annotations") or {}
    return str(annotations.get(_SOURCE, "nothing"))


def _component(service: Object) -> Object:
    return dict(((service.get("status") or {}).get("components") or {}).get("predictor") or {})
