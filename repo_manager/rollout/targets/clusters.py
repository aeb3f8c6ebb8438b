"""The kinds of targets in clusters, one row each, and the state such a target serves now."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from repo_manager.errors import ServerRefusedError, UsageError
from repo_manager.files import document
from repo_manager.repository.location import Location
from repo_manager.rollout.options import TrialOptions
from repo_manager.rollout.rollout_context import RolloutContext
from repo_manager.rollout.targets.api import Api, Kind
from repo_manager.rollout.targets.api_objects import Object
from repo_manager.rollout.targets.base import Target
from repo_manager.rollout.targets.inference_service import InferenceService, previous_on_kserve, storage_of
from repo_manager.rollout.targets.kserve import KServeTarget
from repo_manager.rollout.targets.kubernetes import KubernetesTarget
from repo_manager.rollout.targets.release import Release, find_deployments, previous_on_kubernetes
from repo_manager.rollout.targets.snapshot import models_served
from repo_manager.rollout.targets.template import SNAPSHOTS, read_template, snapshots_beside
from repo_manager.server.transport import ClientOptions

__all__ = [
    "KINDS",
    "ClusterKind",
    "Pointer",
    "api_of",
    "cluster_kind_of",
    "parse_cluster",
    "pointers",
    "served_models_of",
]


@dataclasses.dataclass(frozen=True)
class Pointer:
    """The snapshot or repository of a Deployment or an InferenceService.

    Attributes:
        item: the Deployment or the InferenceService.
        url: the snapshot, or the repository, as the pods see it.
        snapshots: where snapshots are, as the pods see them.
        load: names of the models its pods load, or `*`.
    """

    item: Object
    url: str
    snapshots: str
    load: tuple[str, ...] = ("*",)

    @property
    def name(self) -> str:
        """The object's name."""
        return str(self.item["metadata"]["name"])


@dataclasses.dataclass(frozen=True)
class ClusterKind:
    """One kind of target in a cluster.

    Attributes:
        parse: reads the address in `--to`. Raises UsageError.
        previous: the version of a model to go back to: target, repository, model, cluster.
        pointers: the snapshots of its objects, from the target and the cluster.
        target: the engine's target, from the context, target, cluster, trial, how to connect to pods.
        resources: custom resources (of `Kind`) with possible names of snapshots, besides Deployments, ReplicaSets and
            pods.
    """

    parse: Callable[[str], Release | InferenceService]
    previous: Callable[[Any, Location, str, Api], int]
    pointers: Callable[[Any, Api], tuple[Pointer, ...]]
    target: Callable[[RolloutContext, Any, Api, TrialOptions | None, ClientOptions], Target]
    resources: tuple[tuple[str, str, str, str], ...] = ()


def _released(
    context: RolloutContext, release: Release, api: Api, trial: TrialOptions | None, connection: ClientOptions
) -> Target:
    if trial is not None:
        raise UsageError(
            f"--shadow and --canary are for single servers and kserve://, not for {release}",
            hint=f"Two releases behind an HTTPRoute make a canary: {document('kubernetes.md')}",
        )
    return KubernetesTarget(context, release, api, connection)


def _deployments(release: Release, api: Api) -> tuple[Pointer, ...]:
    found = []
    for deployment in find_deployments(release, api):
        served = read_template(deployment)
        found.append(Pointer(deployment, served.url, served.snapshots, served.load))
    return tuple(found)


def _storage(service: InferenceService, api: Api) -> tuple[Pointer, ...]:
    found = api.custom(Kind.INFERENCE_SERVICE, service.namespace, service.name)
    url = storage_of(found)
    own = (found["metadata"].get("annotations") or {}).get(SNAPSHOTS)
    return (Pointer(found, url, own or snapshots_beside(url)),)


KINDS: Mapping[str, ClusterKind] = {
    "k8s://": ClusterKind(
        Release.parse, lambda release, _, name, api: previous_on_kubernetes(release, name, api), _deployments, _released
    ),
    "kserve://": ClusterKind(
        InferenceService.parse,
        previous_on_kserve,
        _storage,
        lambda context, service, api, trial, _: KServeTarget(context, service, api, trial),
        (Kind.INFERENCE_SERVICE, Kind.REVISION),
    ),
}
"""Scheme of `--to` -> the kind behind it. The schemes are those of `urls.CLUSTERS`."""


def cluster_kind_of(target: object) -> ClusterKind:
    """Return the kind of a target in a cluster, by its text."""
    return KINDS[str(target).partition("://")[0] + "://"]


def parse_cluster(text: str) -> Release | InferenceService:
    """Read `k8s://namespace/release` or `kserve://namespace/name`.

    Raises:
        UsageError: it is neither.
    """
    return KINDS.get(text.partition("://")[0] + "://", KINDS["k8s://"]).parse(text)


def api_of(text: str, timeout_s: float | None = None) -> Api:
    """Connect to the cluster a target names.

    Args:
        text: `k8s://namespace/release` or `kserve://namespace/name`. Its `?context=` names the cluster.
        timeout_s: deadline of each call in seconds. `None`: the longest that `Api` allows.

    Raises:
        UsageError: the target cannot be read, or no such cluster is configured.
    """
    context = parse_cluster(text).context
    return Api(context=context) if timeout_s is None else Api(timeout_s, context)


def pointers(text: str, api: Api) -> tuple[Pointer, ...]:
    """Return the snapshots or repositories of a target's objects.

    Raises:
        UsageError: the target cannot be read.
        ServerError: the API server refused or did not answer, or there is no such thing.
    """
    target = parse_cluster(text)
    return cluster_kind_of(target).pointers(target, api)


def served_models_of(repository: Location, text: str, api: Api) -> Mapping[str, tuple[int, ...]]:
    """Return a target's served models, model -> versions.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        text: `k8s://namespace/release` or `kserve://namespace/name`. `api` decides the cluster, not its `?context=`.
        api: connected API of the cluster.

    Raises:
        ServerRefusedError: its Deployments do not serve the same.
        RepositoryError: the snapshot it names cannot be read.
        RepoManagerError: as `pointers`.
    """
    first, *others = pointers(text, api)
    differing = [each.name for each in others if each.url != first.url]
    if differing:
        raise ServerRefusedError(
            f"{text}: {first.name} serves {first.url}, and {', '.join(differing)} something else",
            hint="Deploy a version to all of them, or look at repo-manager status.",
        )
    return models_served(repository, first.url, first.snapshots, text, first.load)[0]
