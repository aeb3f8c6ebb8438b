"""The release that `k8s://namespace/release` names: its Deployments, and what it served before."""

from __future__ import annotations

import dataclasses
import json
import re

from repo_manager.errors import RepositoryError, ServerRefusedError, UsageError
from repo_manager.rollout.targets.api import Api, Object, using
from repo_manager.rollout.targets.template import history_of, parse_models

__all__ = ["KubernetesTarget", "find_deployments", "parse_kubernetes_target", "previous_on_kubernetes"]

_DNS_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_TARGET = re.compile(rf"(?P<namespace>{_DNS_LABEL})/(?P<name>{_DNS_LABEL}(?:\.{_DNS_LABEL})*)/?")


@dataclasses.dataclass(frozen=True)
class KubernetesTarget:
    """A Helm release of deploy/helm/triton, or a single Deployment, in the cluster that the kubeconfig names.

    Attributes:
        namespace: where it is.
        release: the release's name, or the Deployment's.
    """

    namespace: str
    release: str

    def __str__(self) -> str:
        return f"k8s://{self.namespace}/{self.release}"


def parse_kubernetes_target(text: str) -> KubernetesTarget:
    """Read `k8s://namespace/release`.

    Raises:
        UsageError: it is none.
    """
    match = _TARGET.fullmatch(text.removeprefix("k8s://")) if text.startswith("k8s://") else None
    if match is None:
        raise UsageError(f"{text!r} is no Kubernetes target", hint="Write it as k8s://NAMESPACE/RELEASE.")
    return KubernetesTarget(match["namespace"], match["name"])


def previous_on_kubernetes(target: KubernetesTarget, name: str, *, api: Api | None = None) -> int:
    """Return the version of a model that the release served before the current one.

    Raises:
        RepositoryError: the release's history has none.
        ServerError: as `deploy_kubernetes`.
    """
    with using(api) as cluster:
        found = find_deployments(target, cluster)
    served = [parse_models(json.dumps(entry.get("models"))) or {} for entry in history_of(found[0])]
    versions = [max(models[name]) for models in served if models.get(name)]
    earlier = [version for version in versions if version != versions[-1]]
    if not earlier:
        raise RepositoryError(
            f"{target} has no earlier roll-out of {name} to go back to",
            hint=f"Deploy a version by its number: repo-manager deploy {name}:VERSION --to {target}",
        )
    return earlier[-1]


def find_deployments(target: KubernetesTarget, api: Api) -> tuple[Object, ...]:
    """Return a release's Deployments of Triton, or the one of that name.

    Raises:
        ServerRefusedError: there is none.
    """
    labels = {"app.kubernetes.io/instance": target.release, "app.kubernetes.io/component": "server"}
    found = api.deployments(target.namespace, labels)
    if found:
        return found
    single = api.deployment(target.namespace, target.release)
    if single is None:
        raise ServerRefusedError(
            f"Namespace {target.namespace} has neither a release nor a Deployment named {target.release}",
            hint="helm list -n NAMESPACE shows the releases; deploy/README.md installs one.",
        )
    return (single,)
