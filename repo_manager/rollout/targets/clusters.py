"""What a target in a cluster serves now: read from its objects and from the snapshots that they name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from repo_manager.errors import ServerRefusedError
from repo_manager.repository.location import Location
from repo_manager.rollout.targets.api import Api, Kind
from repo_manager.rollout.targets.api_objects import Object
from repo_manager.rollout.targets.inference_service import InferenceService, storage_of
from repo_manager.rollout.targets.release import Release, find_deployments
from repo_manager.rollout.targets.snapshot import models_served
from repo_manager.rollout.targets.template import SNAPSHOTS, read_template, snapshots_beside

__all__ = ["Pointer", "api_of", "models_of", "parse_cluster", "pointers"]


@dataclasses.dataclass(frozen=True)
class Pointer:
    """What a Deployment or an InferenceService points at.

    Attributes:
        item: the object.
        url: the snapshot, or the repository, as the pods see it.
        snapshots: where snapshots are, as the pods see them.
        load: what the pods load of it: model names, or `*`.
    """

    item: Object
    url: str
    snapshots: str
    load: tuple[str, ...] = ("*",)

    @property
    def name(self) -> str:
        """The object's name."""
        return str(self.item["metadata"]["name"])


def parse_cluster(text: str) -> Release | InferenceService:
    """Read `k8s://namespace/release` or `kserve://namespace/name`.

    Raises:
        UsageError: it is neither.
    """
    return InferenceService.parse(text) if text.startswith("kserve://") else Release.parse(text)


def api_of(text: str, timeout_s: float | None = None) -> Api:
    """Connect to the cluster that a target names.

    Raises:
        UsageError: the target cannot be read, or no such cluster is configured.
    """
    context = parse_cluster(text).context
    return Api(context=context) if timeout_s is None else Api(timeout_s, context)


def pointers(text: str, api: Api) -> tuple[Pointer, ...]:
    """Return what a target's objects point at.

    Raises:
        UsageError: the target cannot be read.
        ServerError: the API server refused or did not answer, or there is no such thing.
    """
    target = parse_cluster(text)
    if isinstance(target, InferenceService):
        service = api.custom(Kind.INFERENCE_SERVICE, target.namespace, target.name)
        url = storage_of(service)
        own = (service["metadata"].get("annotations") or {}).get(SNAPSHOTS)
        return (Pointer(service, url, own or snapshots_beside(url)),)
    found = []
    for deployment in find_deployments(target, api):
        served = read_template(deployment)
        found.append(Pointer(deployment, served.url, served.snapshots, served.load))
    return tuple(found)


def models_of(repository: Location, text: str, api: Api) -> Mapping[str, tuple[int, ...]]:
    """Return what a target serves, model -> versions.

    Raises:
        ServerRefusedError: its Deployments do not serve the same.
        RepositoryError: the snapshot that it names cannot be read.
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
