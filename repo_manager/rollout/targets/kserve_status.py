"""Whether an InferenceService has come to what its spec says: judged from its conditions, model status and traffic."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.rollout.targets.api import Api, Kind, Object

__all__ = ["failure_of", "is_there", "wait_for_service", "watch_service"]

_POLL_S = 1.0
_SILENCE_S = 60.0
_FAILED_TRANSITIONS = frozenset({"BlockedByFailedLoad", "InvalidSpec"})


def wait_for_service(
    api: Api,
    namespace: str,
    name: str,
    percent: int,
    *,
    timeout_s: float,
    report: Callable[[str], None] = lambda _: None,
    known: str | None = None,
) -> str:
    """Wait until an InferenceService is ready and its newest revision has its share of the traffic.

    Args:
        api: the cluster.
        namespace: of the InferenceService.
        name: of the InferenceService.
        percent: the share; 100: the newest revision is rolled out.
        timeout_s: how long it may take.
        report: told whenever something changes.
        known: a failure from before the change, which KServe may go on telling for a while.

    Returns:
        The newest revision's name; empty without Knative.

    Raises:
        ServerRefusedError: KServe says that it failed, or it did not come to it within `timeout_s`.
        ServerUnreachableError: the API server gave no answer for a minute.
    """
    deadline, heard, told = time.monotonic() + timeout_s, time.monotonic(), ""
    while True:
        try:
            service = api.custom(Kind.INFERENCE_SERVICE, namespace, name)
            heard = time.monotonic()
        except ServerUnreachableError:
            if time.monotonic() > min(deadline, heard + _SILENCE_S):
                raise
            time.sleep(_POLL_S)
            continue
        failure = failure_of(service)
        if failure is not None and failure != known:
            raise ServerRefusedError(f"InferenceService {name}: {failure}")
        if is_there(service, percent):
            return str(_component(service).get("latestReadyRevision") or "")
        note = "; ".join(_missing(service, percent))
        if note != told:
            report(f"{name}: {note}")
            told = note
        if time.monotonic() > deadline:
            raise ServerRefusedError(
                f"InferenceService {name} was not ready within {timeout_s:g} s: {note}",
                hint="--timeout allows it longer.",
            )
        time.sleep(_POLL_S)


def watch_service(api: Api, namespace: str, name: str, percent: int, *, seconds: float) -> None:
    """See for a while that an InferenceService stays ready with its newest revision's share.

    Raises:
        ServerRefusedError: it did not.
        ServerUnreachableError: the API server gave no answer.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        service = api.custom(Kind.INFERENCE_SERVICE, namespace, name)
        trouble = failure_of(service) or "; ".join(_missing(service, percent))
        if trouble:
            raise ServerRefusedError(f"InferenceService {name} at {percent} % of the traffic: {trouble}")
        time.sleep(_POLL_S)


def is_there(service: Object, percent: int) -> bool:
    """Say whether nothing is missing."""
    return not list(_missing(service, percent))


def failure_of(service: Object) -> str | None:
    """Return why KServe has given up; `None` while it has not."""
    if not _seen(service):
        return None
    model = (service.get("status") or {}).get("modelStatus") or {}
    state = (model.get("states") or {}).get("targetModelState")
    if model.get("transitionStatus") in _FAILED_TRANSITIONS or state == "FailedToLoad":
        info = model.get("lastFailureInfo") or {}
        told = ": ".join(str(info[key]) for key in ("reason", "message") if info.get(key))
        code = f" (exit code {info['exitCode']})" if info.get("exitCode") is not None else ""
        return f"{model.get('transitionStatus') or state}: {told or 'no reason is given'}{code}"
    return None


def _missing(service: Object, percent: int) -> Iterator[str]:
    """Yield what is still to come."""
    if not _seen(service):
        yield "the controller has not seen the change yet"
        return
    status = service.get("status") or {}
    conditions = {each["type"]: each for each in status.get("conditions") or ()}
    for kind in ("PredictorReady", "Ready"):
        found = conditions.get(kind) or {}
        if found.get("status") != "True":
            why = found.get("message") or found.get("reason") or ""
            yield f"{kind} is {found.get('status', 'not told')} {why}".rstrip()
    model = status.get("modelStatus") or {}
    if model and model.get("transitionStatus") != "UpToDate":
        yield f"the model is {model.get('transitionStatus')}"
    component = _component(service)
    newest = component.get("latestReadyRevision")
    if component.get("latestCreatedRevision") != newest:
        yield f"revision {component.get('latestCreatedRevision')} is not ready"
    if newest is None:  # KServe without Knative routes nothing.
        return
    routed = sum(
        entry.get("percent") or 0
        for entry in component.get("traffic") or ()
        if entry.get("latestRevision") or entry.get("revisionName") == newest
    )
    if routed != percent:
        yield f"{newest} gets {routed} % of the traffic, {percent} % are wanted"


def _seen(service: Object) -> bool:
    seen = (service.get("status") or {}).get("observedGeneration")
    return seen is not None and seen >= service["metadata"].get("generation", 0)


def _component(service: Object) -> Object:
    return dict(((service.get("status") or {}).get("components") or {}).get("predictor") or {})
