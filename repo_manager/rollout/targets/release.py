"""The release behind `k8s://namespace/release`: its Deployments of Triton, and their past snapshots."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import ClassVar

from repo_manager.errors import RepositoryError, ServerRefusedError
from repo_manager.files import document
from repo_manager.rollout.targets.address import ClusterAddress, form_of
from repo_manager.rollout.targets.api import Api
from repo_manager.rollout.targets.api_objects import Object
from repo_manager.rollout.targets.template import history_of, parse_models, read_template

__all__ = ["Release", "find_deployments", "previous_on_kubernetes"]

_DNS_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"


@dataclasses.dataclass(frozen=True)
class Release(ClusterAddress):
    """A Helm release of deploy/helm/triton, or a single Deployment: `k8s://namespace/release`."""

    SCHEME: ClassVar[str] = "k8s"
    FORM: ClassVar[re.Pattern[str]] = form_of("k8s", _DNS_LABEL, rf"{_DNS_LABEL}(?:\.{_DNS_LABEL})*")
    IS_NOT: ClassVar[tuple[str, str]] = (
        "Kubernetes target",
        "Write it as k8s://NAMESPACE/RELEASE, or with ?context=NAME.",
    )


def previous_on_kubernetes(release: Release, name: str, api: Api) -> int:
    """Return the version of a model the release served before the current one.

    Args:
        release: address of the release. Of several Deployments, the first one's history counts.
        name: name of the model to look for in the history of snapshots.
        api: connected API of the cluster.

    Raises:
        RepositoryError: the release's history has none.
        ServerError: the API server refused or did not answer.
    """
    deployment = find_deployments(release, api)[0]
    history, url = history_of(deployment), read_template(deployment).url
    places = [index for index, entry in enumerate(history) if entry.get("url") == url]
    if places:  # `kubectl rollout undo` does not update the history: later entries are not served
        history = history[: places[-1] + 1]
    served = [parse_models(json.dumps(entry.get("models"))) or {} for entry in history]
    versions = [max(models[name]) for models in served if models.get(name)]
    if versions and not served[-1].get(name):  # undeployed
        return versions[-1]
    earlier = [version for version in versions if version != versions[-1]]
    if not earlier:
        raise RepositoryError(
            f"{release} has no earlier roll-out of {name} to go back to",
            hint=f"Deploy a version by its number: repo-manager deploy {name}:VERSION --to {release}",
        )
    return earlier[-1]


def find_deployments(release: Release, api: Api) -> tuple[Object, ...]:
    """Return a release's Deployments of Triton, or the one of that name.

    Raises:
        ServerRefusedError: the release has no such Deployment.
    """
    labels = {"app.kubernetes.io/instance": release.name, "app.kubernetes.io/component": "server"}
    found = api.deployments(release.namespace, labels)
    if found:
        return found
    try:
        single = api.deployment(release.namespace, release.name)
    except ServerRefusedError as exc:
        if "(403)" not in exc.message:
            raise
        raise ServerRefusedError(
            f"Namespace {release.namespace} has no release named {release.name}, and a Deployment of that name may not "
            f"be read: {exc.message}",
            hint="Check the name first: helm list -n NAMESPACE. The chart's Role allows its own release only.",
        ) from exc
    if single is None:
        raise ServerRefusedError(
            f"Namespace {release.namespace} has neither a release nor a Deployment named {release.name}",
            hint=f"helm list -n NAMESPACE shows the releases. How to install one: {document('kubernetes.md')}",
        )
    return (single,)
