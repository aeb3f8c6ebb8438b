"""The few requests to a Kubernetes API server a roll-out makes, on plain objects, by lightkube."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from repo_manager.errors import RepoManagerError, ServerRefusedError, ServerUnreachableError, UsageError
from repo_manager.optional import require
from repo_manager.rollout.calls import OutOfTimeError
from repo_manager.rollout.targets.api_objects import REACH, ConflictError, Object, limited, may_pass, refused, seen
from repo_manager.sockets import Deputies

__all__ = ["Api", "Kind", "change_unless_changed", "patiently", "pause", "using"]

_POLL_S = 1.0
_SILENCE_S = 60.0
_CONFLICTS = 20
_FIELD_MANAGER = "repo-manager"
_CALL_S = 15.0
_LOG_LINES = 15
_MOST_ITEMS = 20_000

Result = TypeVar("Result")

Answer = TypeVar("Answer")


def pause() -> None:
    """Sleep between two looks at an object waited for."""
    time.sleep(_POLL_S)


def patiently(call: Callable[[], Answer], *, until: float | None = None) -> Answer:
    """Ask an API server, and ask again for up to a minute while it gives no answer: it may be restarting.

    Args:
        call: the request to the API server.
        until: moment of `time.monotonic` that ends the asking. `None`: a minute from now.

    Raises:
        ServerUnreachableError: there was no answer for a minute, or until then.
        OutOfTimeError: no time is left of --timeout; with the reason why there was no answer.
        ServerRefusedError: the API server refused, or the object is missing.
    """
    silent: ServerUnreachableError | None = None
    silence = time.monotonic() + _SILENCE_S
    end = silence if until is None else min(silence, until)
    while True:
        try:
            return call()
        except OutOfTimeError as exc:
            if silent is None:
                raise
            raise exc.waiting_for(silent.message) from silent
        except ServerUnreachableError as exc:
            if time.monotonic() > end:
                raise
            silent = exc
        pause()


def change_unless_changed(
    seen: Object, read: Callable[[], Object | None], send: Callable[[Object], Object], patch: Object
) -> Object:
    """Patch an object nobody has changed since it was read.

    A new status, a dead pod and an autoscaler also make new resource versions. On a conflict the object is read again.
    The patch is sent again while `spec` is the same except for the number of replicas.

    Args:
        seen: the object as it was read.
        read: reads it again. `None`: it is gone.
        send: function that sends the patch.
        patch: the patch. Its `resourceVersion` is set here.

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
    """Give this cluster. `None`: the configured one, closed afterwards.

    Args:
        api: the cluster's API. `None`: the configured cluster, closed afterwards.
    """
    if api is not None:
        yield api
        return
    made = Api()
    try:
        yield made
    finally:
        made.close()


class Kind:
    """The custom resources in use: group, version, kind, plural."""

    INFERENCE_SERVICE = ("serving.kserve.io", "v1beta1", "InferenceService", "inferenceservices")
    REVISION = ("serving.knative.dev", "v1", "Revision", "revisions")
    HTTP_ROUTE = ("gateway.networking.k8s.io", "v1", "HTTPRoute", "httproutes")


class Api:
    """One cluster, as `$KUBECONFIG`, `~/.kube/config` or the pod's own service account names it.

    Raises, from every call, ServerUnreachableError when no answer came, and ServerRefusedError with the API server's
    reason when it refused.

    Args:
        timeout_s: deadline of one call, its last byte included. At most `_CALL_S`.
        context: of the kubeconfig. `None` takes its current one, or the pod's own service account.
    """

    def __init__(self, timeout_s: float = _CALL_S, context: str | None = None) -> None:
        self._timeout_s, self._context = min(_CALL_S, timeout_s), context
        self._limit: Callable[[float], float] = _own_deadline
        self._deputies = Deputies()
        self._lightkube = require("lightkube")
        self._errors = require("lightkube.core.exceptions")
        self._apps = require("lightkube.resources.apps_v1")
        self._core = require("lightkube.resources.core_v1")
        self._generic = require("lightkube.generic_resource")
        self._patch_type = require("lightkube.types").PatchType
        self._allowed: set[str] = set()
        self._client = self._connected()

    def _connected(self) -> Any:
        try:
            timeout = self._errors.httpx.Timeout(self._timeout_s)
            config = self._config()
            self.where = f"{config.cluster.server} (context {config.context_name})"
            made = self._lightkube.Client(config, field_manager=_FIELD_MANAGER, timeout=timeout)
        except Exception as exc:  # a kubeconfig can fail in any way
            raise UsageError(
                f"No Kubernetes cluster is configured: {' '.join(str(exc).split())[:300] or type(exc).__name__}",
                hint="Set KUBECONFIG, or run inside the cluster under a service account.",
            ) from exc
        with contextlib.suppress(AttributeError):  # the library has no public limit on the size of an answer
            made._client._client.event_hooks = {"response": [self._limit_size]}
        return made

    def _config(self) -> Any:
        """Read the cluster's name and credentials.

        Raises:
            Exception: the kubeconfig cannot be read, or has no such context.
        """
        if self._context is None:
            return self._lightkube.KubeConfig.from_env().get()
        # A context needs a kubeconfig: a pod's service account has none.
        place = os.environ.get("KUBECONFIG") or "~/.kube/config"
        return self._lightkube.KubeConfig.from_file(place).get(self._context)

    def _limit_size(self, response: Any) -> None:
        """Let an answer be read up to a size."""
        response.stream = limited(self._errors.httpx, response.stream)

    @contextlib.contextmanager
    def within(self, limit: Callable[[float], float]) -> Iterator[Api]:
        """Hold all calls together to one deadline, as `TritonClient.within`."""
        previous, self._limit = self._limit, limit
        try:
            yield self
        finally:
            self._limit = previous

    def close(self) -> None:
        """Close the connections."""
        self._deputies.close()
        self._client.close()

    def _ask(self, what: str, call: Callable[[], Result]) -> Result:
        """Call the API server, and translate errors.

        Raises:
            OutOfTimeError: no answer in time, and --timeout is over.
            ServerUnreachableError: no answer in time, or no connection.
            ServerRefusedError: it refuses, or its answer is none.
        """
        timeout_s = self._limit(self._timeout_s)
        with self._translated(what, timeout_s):
            try:
                return self._deputies.call(call, timeout_s)
            except TimeoutError:
                late, self._client = self._client, self._connected()
                late.close()  # the abandoned call must not read from it any more
                raise

    def deployments(self, namespace: str, labels: Mapping[str, str]) -> tuple[Object, ...]:
        """Return the Deployments with these labels, by name."""
        found = self._listed(f"list the Deployments in {namespace}", self._apps.Deployment, namespace, labels)
        return tuple(sorted(found, key=lambda item: str(item["metadata"]["name"])))

    def deployment(self, namespace: str, name: str) -> Object | None:
        """Return one Deployment, or `None` without one of that name."""

        def read() -> Object | None:
            try:
                return seen(self._client.get(self._apps.Deployment, name, namespace=namespace).to_dict())
            except self._errors.ApiError as exc:
                if exc.status.code == 404 and _names(exc):
                    return None
                raise

        return self._ask(f"read Deployment {namespace}/{name}", read)

    def patch_deployment(self, namespace: str, name: str, patch: Object) -> Object:
        """Change a Deployment by a strategic merge patch. If it has a `resourceVersion`, only while it is current.

        Args:
            namespace: namespace of the Deployment, where the account needs the right to patch it.
            name: name of an existing Deployment. None is made.
            patch: strategic merge patch of the object.
        """

        def change() -> Object:
            made = self._client.patch(
                self._apps.Deployment, name, patch, namespace=namespace, patch_type=self._patch_type.STRATEGIC
            )
            return seen(made.to_dict())

        return self._ask(f"change Deployment {namespace}/{name}", change)

    def pods(self, namespace: str, labels: Mapping[str, str]) -> tuple[Object, ...]:
        """Return the pods with these labels, oldest first."""
        found = self._listed(f"list the pods in {namespace}", self._core.Pod, namespace, labels)
        return tuple(sorted(found, key=lambda item: str(item["metadata"].get("creationTimestamp", ""))))

    def replica_sets(self, namespace: str, labels: Mapping[str, str]) -> tuple[Object, ...]:
        """Return the ReplicaSets with these labels, with those kept for `kubectl rollout undo`."""
        return tuple(self._listed(f"list the ReplicaSets in {namespace}", self._apps.ReplicaSet, namespace, labels))

    def create_event(self, namespace: str, event: Object) -> None:
        """Write an Event."""
        made = self._core.Event.from_dict(event)
        self._ask(f"write an Event in {namespace}", lambda: self._client.create(made, namespace=namespace))

    def log_tail(self, namespace: str, pod: str, container: str) -> str:
        """Return the last lines a container wrote. Empty when they cannot be had.

        Args:
            namespace: namespace of the pod. Without the right to read logs there, the answer is empty.
            pod: name of the pod. A missing one gives an empty text.
            container: name of one of its containers, or of its init containers.
        """

        def read() -> str:
            lines = self._client.log(pod, namespace=namespace, container=container, tail_lines=_LOG_LINES)
            return "\n".join(line.rstrip("\n") for line in itertools.islice(lines, _LOG_LINES))

        try:
            return self._ask(f"read the log of {pod}", read)
        except (ServerRefusedError, ServerUnreachableError):
            return ""

    def custom(self, kind: tuple[str, str, str, str], namespace: str, name: str) -> Object:
        """Return one custom resource.

        Args:
            kind: group, version, kind and plural of the resource: an entry of `Kind`.
            namespace: namespace of the resource. Kinds without namespaces cannot be read.
            name: name of the resource. A missing one is refused.
        """
        return self._ask(
            f"read {kind[2]} {namespace}/{name}",
            lambda: seen(self._client.get(self._resource(kind), name, namespace=namespace).to_dict()),
        )

    def customs(self, kind: tuple[str, str, str, str], namespace: str, labels: Mapping[str, str]) -> tuple[Object, ...]:
        """Return the custom resources with these labels. None where the cluster does not know the kind.

        Args:
            kind: group, version, kind and plural of the resource: an entry of `Kind`.
            namespace: the only namespace searched.
            labels: labels the resources must have.
        """
        try:
            return tuple(self._listed(f"list {kind[3]} in {namespace}", self._resource(kind), namespace, labels))
        except ServerRefusedError as exc:
            if "(404)" in exc.message:
                return ()
            raise

    def patch_custom(self, kind: tuple[str, str, str, str], namespace: str, name: str, patch: Object) -> Object:
        """Change a custom resource by a JSON merge patch. With a `resourceVersion` only if it is still current.

        Args:
            kind: group, version, kind and plural of the resource: an entry of `Kind`.
            namespace: namespace of the resource, where the account needs the right to patch it.
            name: name of an existing resource. None is made.
            patch: JSON merge patch of the object.
        """

        def change() -> Object:
            made = self._client.patch(
                self._resource(kind), name, patch, namespace=namespace, patch_type=self._patch_type.MERGE
            )
            return seen(made.to_dict())

        return self._ask(f"change {kind[2]} {namespace}/{name}", change)

    def _listed(self, what: str, kind: Any, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        def read() -> list[Object]:
            items = self._client.list(kind, namespace=namespace, labels=dict(labels))
            return [seen(item.to_dict()) for item in itertools.islice(items, _MOST_ITEMS)]

        return self._ask(what, read)

    def _resource(self, kind: tuple[str, str, str, str]) -> Any:
        return self._generic.create_namespaced_resource(*kind)

    def _refusal(self, what: str, code: int | None, reason: str, *, named: bool) -> RepoManagerError:
        if what in self._allowed and may_pass(code, named=named):
            return ServerUnreachableError(
                f"The Kubernetes API server could not {what}, which it did before: {reason.strip()} ({code})",
                hint="While it starts it refuses calls it allows later. Check the rights if it goes on.",
            )
        return refused(what, code, reason, named=named)

    @contextlib.contextmanager
    def _translated(self, what: str, timeout_s: float) -> Iterator[None]:
        # lightkube 1.x uses httpx2 and 0.x uses httpx. It imports either under this name.
        transport = self._errors.httpx
        try:
            yield
            self._allowed.add(what)
        except RepoManagerError:
            raise
        except TimeoutError as exc:
            silent = f"The Kubernetes API server did not answer within {timeout_s:.3g} s: {what}"
            try:
                self._limit(self._timeout_s)
            except OutOfTimeError as out:  # the call had only what was left of --timeout
                raise out.waiting_for(silent) from exc
            raise ServerUnreachableError(silent, hint=REACH) from exc
        except self._errors.ApiError as exc:
            raise self._refusal(what, exc.status.code, exc.status.message or str(exc), named=_names(exc)) from exc
        except transport.HTTPStatusError as exc:  # a plain-text answer: the path is not served, or not yet
            raise self._refusal(what, exc.response.status_code, exc.response.text[:300], named=False) from exc
        except transport.HTTPError as exc:
            raise ServerUnreachableError(
                f"The Kubernetes API server gave no answer to: {what} ({exc or type(exc).__name__})",
                hint=REACH,
            ) from exc
        except Exception as exc:  # an unknown server's answer can fail in any way
            found = " ".join(str(exc).split())[:200] or "it breaks off"
            raise ServerRefusedError(
                f"The answer to {what} is not what the Kubernetes API server's is: {type(exc).__name__}: {found}",
                hint=REACH,
            ) from exc


def _names(exc: Any) -> bool:
    """Say whether an API server's refusal names the object."""
    return exc.status.details is not None and bool(exc.status.details.name)


def _own_deadline(timeout_s: float) -> float:
    """Leave a call the time it has on its own."""
    return timeout_s
