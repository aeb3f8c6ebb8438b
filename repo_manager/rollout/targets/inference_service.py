"""The object behind `kserve://namespace/name`: its storage, its shares of the traffic, and its past snapshots."""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar

from repo_manager.errors import RepositoryError, ServerRefusedError
from repo_manager.files import document
from repo_manager.repository.location import Location
from repo_manager.repository.scan import find_model
from repo_manager.repository.tags import model_state
from repo_manager.rollout.targets.address import ClusterAddress, form_of
from repo_manager.rollout.targets.api import Api, Kind
from repo_manager.rollout.targets.api_objects import Object
from repo_manager.rollout.targets.kserve_status import WantedState, wait_for_service
from repo_manager.rollout.targets.template import MODELS, parse_models

__all__ = [
    "ALL_TRAFFIC",
    "InferenceService",
    "KServeWeights",
    "canaries_of",
    "format_of",
    "previous_on_kserve",
    "share_of",
    "storage_of",
]

ALL_TRAFFIC = 100


@dataclasses.dataclass(frozen=True)
class InferenceService(ClusterAddress):
    """An InferenceService: `kserve://namespace/name`."""

    SCHEME: ClassVar[str] = "kserve"
    FORM: ClassVar[re.Pattern[str]] = form_of("kserve", "[a-z0-9][-a-z0-9]*", "[a-z0-9][-a-z0-9.]*")
    IS_NOT: ClassVar[tuple[str, str]] = ("InferenceService", "Write it as kserve://NAMESPACE/NAME.")


def previous_on_kserve(service: InferenceService, repository: Location, name: str, api: Api) -> int:
    """Return the version of a model to go back to: the one deployed before the one the InferenceService serves.

    Args:
        service: address of the InferenceService. An annotation of it tells the versions served now.
        repository: the model repository: a folder, or a place in object storage.
        name: name of the model whose recorded deployments are searched, latest first.
        api: connected API of the cluster.

    Raises:
        RepositoryError: no earlier snapshot is recorded.
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


def share_of(service: Object) -> int:
    """Return the newest revision's share of the traffic in per cent, as it is asked for."""
    percent = service["spec"]["predictor"].get("canaryTrafficPercent")
    return ALL_TRAFFIC if percent is None else int(percent)


def canaries_of(service: Object) -> tuple[str, ...]:
    """Return the names of the canaries of Standard mode."""
    return tuple(str(each["predictor"].get("name")) for each in service["spec"].get("canary") or ())


def format_of(service: Object) -> str:
    """Return the key of the predictor's storage: `model`, or the older `triton`."""
    predictor = service["spec"]["predictor"]
    for key in ("model", "triton"):
        if (predictor.get(key) or {}).get("storageUri"):
            return key
    raise ServerRefusedError(
        f"InferenceService {service['metadata']['name']} names no storageUri under predictor.model",
        hint=f"Such a service: {document('kubernetes.md')}",
    )


def storage_of(service: Object) -> str:
    """Return the `storageUri` an InferenceService names.

    Raises:
        ServerRefusedError: it names no `storageUri`.
    """
    return str(service["spec"]["predictor"][format_of(service)]["storageUri"])


class KServeWeights:
    """The share of an InferenceService's newest revision, for `repo_manager.rollout.trial.canary`.

    Args:
        service: the InferenceService. Its newest revision is the new version.
        api: connected API of the cluster.
        timeout_s: how long KServe may take to route so.
    """

    def __init__(self, service: InferenceService, api: Api, *, timeout_s: float = 300.0) -> None:
        self._service, self._api, self._timeout_s = service, api, timeout_s
        self._fraction = 0.0

    def set_weight(self, fraction: float) -> None:
        """Route this share to the newest revision, and wait until it is routed so. 1 promotes it.

        Raises:
            ServerError: KServe does not come to it.
        """
        percent = round(fraction * 100)
        patch = {"spec": {"predictor": {"canaryTrafficPercent": None if percent >= 100 else percent}}}
        made = self._api.patch_custom(Kind.INFERENCE_SERVICE, self._service.namespace, self._service.name, patch)
        wanted = WantedState(str(made["spec"]["predictor"][format_of(made)]["storageUri"]), percent)
        wait_for_service(self._api, self._service.namespace, self._service.name, wanted, timeout_s=self._timeout_s)
        self._fraction = fraction

    def current(self) -> float:
        """Return the latest share. 0 before."""
        return self._fraction
