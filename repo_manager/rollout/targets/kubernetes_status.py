"""Waiting for a Deployment to follow its template. Judged from its status and its pods."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

from repo_manager.errors import ServerRefusedError
from repo_manager.rollout.calls import OutOfTimeError
from repo_manager.rollout.targets.api import Api, patiently, pause
from repo_manager.rollout.targets.api_objects import Object
from repo_manager.rollout.targets.template import read_template, url_of_pod

__all__ = ["RolloutProgress", "Trouble", "is_ready", "judge", "new_pods", "wait_for_rollout"]

# Permanent waiting reasons. A first ErrImagePull may pass; the back-off after it does not.
_FATAL = frozenset(
    {
        *("ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"),
        *("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff"),
    }
)
_RESTARTS = 2


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Why a roll-out will not end well.

    Attributes:
        what: the problem, as a sentence.
        pod: whose log says more. `None` when none does.
        container: the container of `pod` whose log says more. `None` as for `pod`.
    """

    what: str
    pod: str | None = None
    container: str | None = None


@dataclasses.dataclass(frozen=True)
class RolloutProgress:
    """Where a roll-out is.

    Attributes:
        done: every pod is new and available, and no old one is left.
        trouble: set when it cannot become done.
        note: one line for a person.
        pods: new ones and available ones less the old ones: it grows as the roll-out goes on.
    """

    done: bool
    trouble: Trouble | None
    note: str
    pods: int = 0


def new_pods(pods: Sequence[Object], url: str) -> tuple[Object, ...]:
    """Return a snapshot's pods, except for those on their way out."""
    return tuple(pod for pod in pods if url_of_pod(pod) == url and not pod["metadata"].get("deletionTimestamp"))


def is_ready(pod: Object) -> bool:
    """Return whether a pod is in service."""
    return any(
        condition["type"] == "Ready" and condition["status"] == "True"
        for condition in pod.get("status", {}).get("conditions") or ()
    )


def judge(deployment: Object, pods: Sequence[Object]) -> RolloutProgress:
    """Judge a roll-out.

    Args:
        deployment: as the API server has it now.
        pods: pods of the new template.

    The rules are those of `kubectl rollout status` (kubernetes/kubectl, `polymorphichelpers/rollout_status.go`), plus
    the pods' own errors, long before the progress deadline passes.
    """
    status, spec = deployment.get("status") or {}, deployment["spec"]
    wanted = spec.get("replicas", 1)
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 0):
        return RolloutProgress(False, None, "the controller has not seen the change yet")
    updated, total = status.get("updatedReplicas") or 0, status.get("replicas") or 0
    available = status.get("availableReplicas") or 0
    note = f"{updated} of {wanted} pods new, {available} available, {max(0, total - updated)} old"
    come = updated + available - max(0, total - updated)
    trouble = next(_of_deployment(deployment), None) or next(_of_pods(pods), None)
    if trouble is not None:
        return RolloutProgress(False, trouble, note, come)
    done = updated >= wanted and total <= updated and available >= updated
    return RolloutProgress(done, None, note if done else "; ".join([note, *_waiting(pods)]), come)


def _of_deployment(deployment: Object) -> Iterator[Trouble]:
    name = deployment["metadata"]["name"]
    for condition in (deployment.get("status") or {}).get("conditions") or ():
        message = condition.get("message", "")
        if condition["type"] == "Progressing" and condition.get("reason") == "ProgressDeadlineExceeded":
            yield Trouble(f"Deployment {name} made no progress within its deadline: {message}")
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            yield Trouble(f"Deployment {name} cannot make pods: {condition.get('reason')}: {message}")


def _of_pods(pods: Sequence[Object]) -> Iterator[Trouble]:
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status") or {}
        if status.get("phase") == "Failed":
            yield Trouble(f"pod {name} failed: {status.get('reason')}: {status.get('message')}")
        every = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
        for container in every:
            state = container.get("state") or {}
            waiting = state.get("waiting") or {}
            reason = waiting.get("reason", "")
            ended = state.get("terminated") or (container.get("lastState") or {}).get("terminated") or {}
            crashed = container.get("restartCount", 0) >= _RESTARTS and ended.get("exitCode", 0) != 0
            if reason not in _FATAL and not crashed:
                continue
            what = f"pod {name}, container {container['name']}: {reason or 'it keeps ending'}"
            if waiting.get("message"):
                what += f": {waiting['message']}"
            if ended:
                what += f" (last end: {ended.get('reason', 'Error')}, exit code {ended.get('exitCode')})"
            yield Trouble(what, name if ended else None, container["name"] if ended else None)


def _waiting(pods: Sequence[Object]) -> Iterator[str]:
    """Describe what pods still wait for: a node, an image."""
    for pod in pods:
        status = pod.get("status") or {}
        for condition in status.get("conditions") or ():
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                yield f"pod {pod['metadata']['name']} is not scheduled: {condition.get('message', '')}"
        for container in status.get("containerStatuses") or ():
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                yield f"pod {pod['metadata']['name']}: {waiting['reason']} {waiting.get('message', '')}".rstrip()


def wait_for_rollout(
    api: Api,
    namespace: str,
    deployment: Object,
    url: str,
    *,
    timeout_s: float,
    report: Callable[[str], None],
    look: Callable[[Sequence[Object]], None] = lambda _: None,
    progressed: Callable[[], None] = lambda: None,
) -> Object:
    """Wait until every pod of a Deployment serves a snapshot. Return the Deployment as it is then.

    Args:
        api: connected API of the cluster.
        namespace: namespace of the Deployment and its pods.
        deployment: as it was read before.
        url: the snapshot its pods must serve.
        timeout_s: how long it may take until one pod more is new, available or gone: a large Deployment is no slower
            for each of its pods than a small one.
        report: called with a line of text at each change.
        look: shown the new pods at every turn. An exception from it ends the wait.
        progressed: called when a pod more is new, available or gone.

    Raises:
        ServerRefusedError: it will not come to an end, made no progress within `timeout_s`, or another process has
            changed it.
        ServerUnreachableError: the API server gave no answer for a minute, or no time is left of --timeout.
    """
    name = deployment["metadata"]["name"]
    labels = deployment["spec"]["selector"].get("matchLabels") or {}
    deadline, best, told = time.monotonic() + timeout_s, -(10**9), ""
    while True:
        now, pods = _seen(api, (namespace, name), labels, until=deadline, told=told)
        if now is None:
            raise ServerRefusedError(f"Deployment {namespace}/{name} was deleted during the roll-out")
        pods = new_pods(pods, url)
        _still_ours(now, url)
        progress = judge(now, pods)
        if progress.note != told:
            report(f"{name}: {progress.note}")
            told = progress.note
        if progress.trouble is not None:
            raise _failure(api, namespace, progress.trouble)
        look(pods)
        if progress.done:
            return now
        if progress.pods > best:
            deadline, best = time.monotonic() + timeout_s, progress.pods
            progressed()
        if time.monotonic() > deadline:
            raise ServerRefusedError(
                f"Deployment {name} made no progress within {timeout_s:g} s: {progress.note}",
                hint="--timeout allows each pod longer.",
            )
        pause()


def _seen(
    api: Api, place: tuple[str, str], labels: Object, *, until: float, told: str
) -> tuple[Object | None, Sequence[Object]]:
    """Return a Deployment, by namespace and name, and its pods; with no time left, repeat the last report."""
    try:
        return patiently(lambda: (api.deployment(*place), api.pods(place[0], labels)), until=until)
    except OutOfTimeError as exc:
        raise (exc.waiting_for(f"{place[1]}: {told}") if told else exc) from exc


def _still_ours(deployment: Object, url: str) -> None:
    found = read_template(deployment).url
    if found != url:
        name = deployment["metadata"]["name"]
        raise ServerRefusedError(f"Somebody else changed Deployment {name} during the roll-out: it is to serve {found}")


def _failure(api: Api, namespace: str, trouble: Trouble) -> ServerRefusedError:
    text = trouble.what
    if trouble.pod is not None and trouble.container is not None:
        tail = api.log_tail(namespace, trouble.pod, trouble.container)
        text += f"; its log ends:\n{tail}" if tail else ""
    return ServerRefusedError(text)
