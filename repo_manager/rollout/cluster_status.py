"""The models a release or an InferenceService serves, pod by pod, and who pointed it there. Nothing is changed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

from repo_manager.errors import RepoManagerError
from repo_manager.repository.location import Location
from repo_manager.rollout.targets.api import Api
from repo_manager.rollout.targets.api_objects import Object
from repo_manager.rollout.targets.clusters import Pointer, api_of, parse_cluster, pointers
from repo_manager.rollout.targets.kserve_status import failure_of, owned_by
from repo_manager.rollout.targets.kubernetes_status import is_ready, judge
from repo_manager.rollout.targets.snapshot import models_served
from repo_manager.rollout.targets.template import history_of, is_snapshot, keeper_of, read_template, url_of_pod

__all__ = ["ClusterStatus", "PartStatus", "PodStatus", "api_of", "cluster_status"]


@dataclasses.dataclass(frozen=True)
class PodStatus:
    """One pod.

    Attributes:
        name: name of the pod, without its namespace.
        ready: whether it is in service: Triton is ready when every model of the snapshot has loaded.
        url: the snapshot or repository it serves. Empty when its containers do not say so.
        models: model -> the READY versions. Empty when it is not ready, or its repository cannot be read.
        node: where it runs. Empty before it is scheduled.
        restarts: how often its containers were started again.
        note: why it is not ready, as Kubernetes says. Empty otherwise.
        ending: whether it is terminating: it finishes its requests and gets no new ones.
    """

    name: str
    ready: bool
    url: str
    models: Mapping[str, tuple[int, ...]]
    node: str
    restarts: int
    note: str
    ending: bool


@dataclasses.dataclass(frozen=True)
class PartStatus:
    """One Deployment, or the InferenceService.

    Attributes:
        name: name of the Deployment or the InferenceService.
        kind: `Deployment`, or `InferenceService` (then `wanted` and `observed` are `None`).
        url: the snapshot, or the repository, it points at.
        models: model -> versions of it. Empty when it cannot be read.
        wanted: how many pods there will be. `None` when it does not say so.
        generation: `metadata.generation`, which rises with each change of the spec.
        observed: the generation its controller has seen. `None` when it does not say so.
        owners: field of a roll-out or an upgrade (`snapshot`, `replicas`, `image`) -> its latest field manager, as in
            `metadata.managedFields`. Fields without a manager are left out.
        keeper: the GitOps controller it is applied by. `None`: none known.
        pods: its pods, oldest first, terminating ones included.
    """

    name: str
    kind: str
    url: str
    models: Mapping[str, tuple[int, ...]]
    wanted: int | None
    generation: int
    observed: int | None
    owners: Mapping[str, str]
    keeper: str | None
    pods: tuple[PodStatus, ...]


@dataclasses.dataclass(frozen=True)
class ClusterStatus:
    """A target in a cluster.

    Attributes:
        target: the address as given: `k8s://namespace/release` or `kserve://namespace/name`.
        cluster: the API server's address and the context of the kubeconfig.
        parts: its Deployments, or the InferenceService.
        differences: deviations from the declared state, in words. Empty when all is.
    """

    target: str
    cluster: str
    parts: tuple[PartStatus, ...]
    differences: tuple[str, ...]


def cluster_status(repository: Location, target: str, api: Api) -> ClusterStatus:
    """Look at a target in a cluster.

    Args:
        repository: the repository its snapshots were made from.
        target: `k8s://namespace/release` or `kserve://namespace/name`. `api` decides the cluster, not its `?context=`.
        api: connected API of the cluster.

    Raises:
        UsageError: the target cannot be read.
        ServerError: the API server refused or did not answer, or there is no such thing.
    """
    reader = _Reader(repository, target, api)
    found = pointers(target, api)
    parts = tuple(reader.part(pointer) for pointer in found)
    return ClusterStatus(target, api.where, parts, tuple(dict.fromkeys(reader.differences(found, parts))))


class _Reader:
    def __init__(self, repository: Location, target: str, api: Api) -> None:
        self._repository, self._target, self._api = repository, target, api
        self._unreadable: dict[str, str] = {}

    def part(self, pointer: Pointer) -> PartStatus:
        item = pointer.item
        kind, status = str(item.get("kind") or "Deployment"), item.get("status") or {}
        is_deployment = kind == "Deployment"
        observed = status.get("observedGeneration") if is_deployment else None
        return PartStatus(
            name=pointer.name,
            kind=kind,
            url=pointer.url,
            models=self._held(pointer.url, pointer),
            wanted=item["spec"].get("replicas", 1) if is_deployment else None,
            generation=item["metadata"].get("generation", 0),
            observed=observed,
            owners=_owners(item),
            keeper=keeper_of(item),
            pods=tuple(self._pod(pod, pointer) for pod in self._pods(pointer)),
        )

    def _pods(self, pointer: Pointer) -> Sequence[Object]:
        namespace = parse_cluster(self._target).namespace
        if "selector" in pointer.item["spec"]:
            return self._api.pods(namespace, pointer.item["spec"]["selector"].get("matchLabels") or {})
        return self._api.pods(namespace, owned_by(pointer.name))

    def _pod(self, pod: Object, pointer: Pointer) -> PodStatus:
        status, ending = pod.get("status") or {}, bool(pod["metadata"].get("deletionTimestamp"))
        ready = is_ready(pod) and not ending
        notes = pod["metadata"].get("annotations") or {}
        url = str(url_of_pod(pod) or notes.get("internal.serving.kserve.io/storage-initializer-sourceuri") or "")
        every = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
        return PodStatus(
            name=str(pod["metadata"]["name"]),
            ready=ready,
            url=url,
            models=self._held(url, pointer) if ready and url else {},
            node=str((pod.get("spec") or {}).get("nodeName") or ""),
            restarts=sum(int(each.get("restartCount") or 0) for each in every),
            note="" if ready else "it is ending" if ending else next(_why(pod, every), "not ready"),
            ending=ending,
        )

    def _held(self, url: str, pointer: Pointer) -> Mapping[str, tuple[int, ...]]:
        """Return the contents of a URL. Nothing, and a difference, when it cannot be read."""
        try:
            return self._read(url, pointer.snapshots, pointer.load)
        except RepoManagerError as exc:
            self._unreadable[url] = exc.message
            return {}

    @functools.cache  # noqa: B019  # hundreds of pods name one snapshot; the reader lives for one look
    def _read(self, url: str, snapshots: str, load: tuple[str, ...]) -> Mapping[str, tuple[int, ...]]:
        return models_served(self._repository, url, snapshots, self._target, load)[0]

    def differences(self, found: Sequence[Pointer], parts: Sequence[PartStatus]) -> Iterator[str]:
        """Describe the deviations from the declared state."""
        yield from self._unreadable.values()
        if len({part.url for part in parts}) > 1:
            yield "its Deployments do not serve the same: " + ", ".join(f"{part.name} {part.url}" for part in parts)
        for pointer, part in zip(found, parts, strict=True):
            if not is_snapshot(part.url, pointer.snapshots):
                yield f"{part.name}: pods load the repository itself, as it is when they start; deploy pins a snapshot"
            staying = [pod for pod in part.pods if not pod.ending]
            others = [pod.name for pod in staying if pod.url and pod.url != part.url]
            if others:
                some = ", ".join(others[:5])
                yield f"{part.name}: {len(others)} of {len(staying)} pods serve something else: {some}"
            if part.kind == "Deployment":
                yield from _of_deployment(pointer)
            elif (failed := failure_of(pointer.item)) is not None:
                yield f"{part.name}: {failed}"


def _of_deployment(pointer: Pointer) -> Iterator[str]:
    progress = judge(pointer.item, ())
    if not progress.done:
        trouble = "" if progress.trouble is None else f": {progress.trouble.what}"
        yield f"{pointer.name}: {progress.note}{trouble}"
    history = history_of(pointer.item)
    if history and history[-1].get("url") != pointer.url:
        yield f"{pointer.name}: the last roll-out was of {history[-1].get('url')}; somebody has changed it since"


def _why(pod: Object, containers: Sequence[Object]) -> Iterator[str]:
    """Yield why a pod is not ready: the state of its waiting containers, else its conditions."""
    status = pod.get("status") or {}
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason"):
            yield f"{waiting['reason']} {waiting.get('message', '')}".strip()
    for condition in status.get("conditions") or ():
        if condition["status"] == "False" and condition.get("message"):
            yield str(condition["message"])


def _owners(item: Object) -> dict[str, str]:
    """Return the latest manager of each field shared by helm, GitOps, autoscalers and roll-outs."""
    found: dict[str, str] = {}
    for name, path in _paths(item).items():
        for entry in item["metadata"].get("managedFields") or ():
            fields = entry.get("fieldsV1") or {}
            for step in path:
                fields = fields.get(step) if isinstance(fields, dict) else None
            if fields is not None:
                found[name] = str(entry.get("manager") or "unknown")
    return found


def _paths(item: Object) -> dict[str, tuple[str, ...]]:
    """Return where `managedFields` keeps the fields subject to change."""
    if "template" not in item["spec"]:
        predictor = item["spec"]["predictor"]
        key = next((each for each in ("model", "triton") if each in predictor), "model")
        return {"snapshot": ("f:spec", "f:predictor", f"f:{key}", "f:storageUri")}
    served = read_template(item)
    spec = ("f:spec", "f:template", "f:spec")
    container = (*spec, f"f:{served.containers}", f'k:{{"name":"{served.container}"}}')
    where = ("f:env", f'k:{{"name":"{served.variable}"}}', "f:value") if served.variable else ("f:args",)
    return {
        "snapshot": (*container, *where),
        "replicas": ("f:spec", "f:replicas"),
        "image": (*container, "f:image"),
    }
