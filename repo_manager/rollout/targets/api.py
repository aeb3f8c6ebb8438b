"""The few requests to a Kubernetes API server that a roll-out makes, on plain objects, by lightkube."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from repo_manager.errors import ServerRefusedError, ServerUnreachableError, UsageError
from repo_manager.optional import require

__all__ = ["Api", "ConflictError", "Kind", "Object", "change_unless_changed", "patiently", "pause", "using"]

Object = dict[str, Any]
"""A Kubernetes object as JSON."""

_POLL_S = 1.0
_SILENCE_S = 60.0
_CONFLICTS = 20
_FIELD_MANAGER = "repo-manager"
_LOG_LINES = 15

Answer = TypeVar("Answer")


class ConflictError(ServerRefusedError):
    """Somebody has changed the object since it was read."""


def pause() -> None:
    """Sleep between two looks at an object that is waited for."""
    time.sleep(_POLL_S)


def patiently(call: Callable[[], Answer], *, until: float | None = None) -> Answer:
    """Ask an API server, and ask again for up to a minute while it gives no answer: it may be restarting.

    Args:
        call: the request.
        until: moment of `time.monotonic` after which it is not asked again; `None`: a minute from now.

    Raises:
        ServerUnreachableError: there was no answer for a minute, or until then.
        ServerRefusedError: it refused.
    """
    silence = time.monotonic() + _SILENCE_S
    end = silence if until is None else min(silence, until)
    while True:
        try:
            return call()
        except ServerUnreachableError:
            if time.monotonic() > end:
                raise
        pause()


def change_unless_changed(
    seen: Object, read: Callable[[], Object | None], send: Callable[[Object], Object], patch: Object
) -> Object:
    """Patch an object that nobody has changed since it was read.

    A status that moves, a pod that dies and an autoscaler that scales make new resource versions too: on a conflict the
    object is read again, and the patch is sent again while `spec` is the same but for the number of replicas.

    Args:
        seen: the object as it was read.
        read: reads it again; `None`: it is gone.
        send: sends a patch.
        patch: the patch; its `resourceVersion` is set here.

    Raises:
        ConflictError: somebody has changed the spec.
        ServerRefusedError: the API server refused the patch.
        ServerUnreachableError: it gave no answer.
    """
    now: Object | None = seen
    for _ in range(_CONFLICTS):
        if now is None or _asked_for(now) != _asked_for(seen):
            break
        metadata = {**patch.get("metadata", {}), "resourceVersion": now["metadata"]["resourceVersion"]}
        try:
            return send({**patch, "metadata": metadata})
        except ConflictError:
            now = patiently(read)
    kind, name = seen.get("kind", "The object"), seen["metadata"]["name"]
    raise ConflictError(
        f"{kind} {name} was changed by somebody else since it was read, so it was not changed (409)",
        hint="Look at it with kubectl get, and run the command again.",
    )


def _asked_for(item: Object) -> Object:
    return {key: value for key, value in item["spec"].items() if key != "replicas"}


@contextlib.contextmanager
def using(api: Api | None) -> Iterator[Api]:
    """Give this cluster; `None`: the configured one, closed afterwards."""
    if api is not None:
        yield api
        return
    made = Api()
    try:
        yield made
    finally:
        made.close()


class Kind:
    """The custom resources that are spoken to: group, version, kind, plural."""

    INFERENCE_SERVICE = ("serving.kserve.io", "v1beta1", "InferenceService", "inferenceservices")
    HTTP_ROUTE = ("gateway.networking.k8s.io", "v1", "HTTPRoute", "httproutes")


class Api:
    """One cluster, as `$KUBECONFIG`, `~/.kube/config` or the pod's own service account names it.

    Raises, from every call, ServerUnreachableError when no answer came, and ServerRefusedError with the API server's
    reason when it refused.
    """

    def __init__(self) -> None:
        self._lightkube = require("lightkube")
        self._errors = require("lightkube.core.exceptions")
        self._apps = require("lightkube.resources.apps_v1")
        self._core = require("lightkube.resources.core_v1")
        self._generic = require("lightkube.generic_resource")
        self._patch_type = require("lightkube.types").PatchType
        self._allowed: set[str] = set()
        try:
            self._client = self._lightkube.Client(field_manager=_FIELD_MANAGER)
        except (self._errors.ConfigError, OSError) as exc:
            raise UsageError(
                f"No Kubernetes cluster is configured: {exc}",
                hint="Set KUBECONFIG, or run inside the cluster under a service account.",
            ) from exc

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def deployments(self, namespace: str, labels: Mapping[str, str]) -> tuple[Object, ...]:
        """Return the Deployments with these labels, by name."""
        with self._translated(f"list the Deployments in {namespace}"):
            found = [
                item.to_dict()
                for item in self._client.list(self._apps.Deployment, namespace=namespace, labels=dict(labels))
            ]
        return tuple(sorted(found, key=lambda item: str(item["metadata"]["name"])))

    def deployment(self, namespace: str, name: str) -> Object | None:
        """Return one Deployment; `None` when there is none of that name."""
        with self._translated(f"read Deployment {namespace}/{name}"):
            try:
                return dict(self._client.get(self._apps.Deployment, name, namespace=namespace).to_dict())
            except self._errors.ApiError as exc:
                if exc.status.code == 404:
                    return None
                raise

    def patch_deployment(self, namespace: str, name: str, patch: Object) -> Object:
        """Change a Deployment by a strategic merge patch; if it has a `resourceVersion`, only while that is current."""
        with self._translated(f"change Deployment {namespace}/{name}"):
            made = self._client.patch(
                self._apps.Deployment, name, patch, namespace=namespace, patch_type=self._patch_type.STRATEGIC
            )
            return dict(made.to_dict())

    def pods(self, namespace: str, labels: Mapping[str, str]) -> tuple[Object, ...]:
        """Return the pods with these labels, oldest first."""
        with self._translated(f"list the pods in {namespace}"):
            found = [
                item.to_dict() for item in self._client.list(self._core.Pod, namespace=namespace, labels=dict(labels))
            ]
        return tuple(sorted(found, key=lambda item: str(item["metadata"].get("creationTimestamp", ""))))

    def log_tail(self, namespace: str, pod: str, container: str) -> str:
        """Return the last lines that a container wrote; empty when they cannot be had."""
        try:
            with self._translated(f"read the log of {pod}"):
                lines = self._client.log(pod, namespace=namespace, container=container, tail_lines=_LOG_LINES)
                return "\n".join(line.rstrip("\n") for line in lines)
        except (ServerRefusedError, ServerUnreachableError):
            return ""

    def custom(self, kind: tuple[str, str, str, str], namespace: str, name: str) -> Object:
        """Return one custom resource."""
        with self._translated(f"read {kind[2]} {namespace}/{name}"):
            return dict(self._client.get(self._resource(kind), name, namespace=namespace).to_dict())

    def patch_custom(self, kind: tuple[str, str, str, str], namespace: str, name: str, patch: Object) -> Object:
        """Change a custom resource by a JSON merge patch; with a `resourceVersion` only if it is still that one."""
        with self._translated(f"change {kind[2]} {namespace}/{name}"):
            made = self._client.patch(
                self._resource(kind), name, patch, namespace=namespace, patch_type=self._patch_type.MERGE
            )
            return dict(made.to_dict())

    def _resource(self, kind: tuple[str, str, str, str]) -> Any:
        return self._generic.create_namespaced_resource(*kind)

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        # lightkube 1.x speaks through httpx2 and 0.x through httpx; it imports either under this name.
        transport = self._errors.httpx
        try:
            yield
            self._allowed.add(what)
        except self._errors.ApiError as exc:
            named = exc.status.details is not None and bool(exc.status.details.name)
            if what in self._allowed and _may_pass(exc.status.code, named=named):
                raise ServerUnreachableError(
                    f"The Kubernetes API server could not {what}, which it did before: {exc.status.message} "
                    f"({exc.status.code})",
                    hint="While it starts it refuses what it allows later. Check the rights if it goes on.",
                ) from exc
            raise _refused(what, exc.status.code, exc.status.message or str(exc)) from exc
        except transport.HTTPStatusError as exc:
            raise _refused(what, exc.response.status_code, exc.response.text[:300]) from exc
        except transport.HTTPError as exc:
            raise ServerUnreachableError(
                f"The Kubernetes API server gave no answer to: {what} ({exc or type(exc).__name__})",
                hint="kubectl cluster-info shows whether it can be reached from here.",
            ) from exc


def _may_pass(code: int | None, *, named: bool) -> bool:
    """Say whether an API server that has just started may answer so until its rights and kinds are read.

    A 404 that names the object is an answer: the object is gone.
    """
    return code in (401, 403) or (code == 404 and not named)


def _refused(what: str, code: int | None, reason: str) -> ServerRefusedError | ServerUnreachableError:
    if code is not None and (code >= 500 or code == 429):  # It may be another answer in a moment.
        return ServerUnreachableError(f"The Kubernetes API server could not {what}: {reason} ({code})")
    hints = {
        401: "The credentials in the kubeconfig are not valid (any more).",
        403: "Bind a Role that allows it: the chart's `deployer` values make one for its release, "
        "deploy/kserve/role.yaml one for an InferenceService. Where a Role names its objects, a mistyped name is "
        "forbidden too.",
        404: "Check the namespace and the name; kubectl get shows what is there.",
        409: "Somebody else has changed it; run the command again.",
    }
    kind = ConflictError if code == 409 else ServerRefusedError
    return kind(f"The Kubernetes API server refused to {what}: {reason} ({code})", hint=hints.get(code or 0))
