"""What `k8s://namespace/release` names: its Deployments of Triton, and what they served before."""

from __future__ import annotations

import dataclasses
import json
import re

from repo_manager.errors import RepositoryError, ServerRefusedError, UsageError
from repo_manager.rollout.targets.api import Api
from repo_manager.rollout.targets.api_objects import Object
from repo_manager.rollout.targets.template import CONTEXT, history_of, in_context, parse_models, read_template

__all__ = ["Release", "find_deployments", "previous_on_kubernetes"]

_DNS_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_TARGET = re.compile(rf"k8s://(?P<namespace>{_DNS_LABEL})/(?P<name>{_DNS_LABEL}(?:\.{_DNS_LABEL})*)/?{CONTEXT}")


@dataclasses.dataclass(frozen=True)
class Release:
    """A Helm release of deploy/helm/triton, or a single Deployment, in the cluster that the kubeconfig names.

    Attributes:
        namespace: where it is.
        name: the release's name, or the Deployment's.
        context: of the kubeconfig; `None`: its current one.
    """

    namespace: str
    name: str
    context: str | None = None

    @classmethod
    def parse(cls, text: str) -> Release:
        """Read `k8s://namespace/release`, or `k8s://namespace/release?context=NAME`.

        Raises:
            UsageError: it is none.
        """
        match = _TARGET.fullmatch(text)
        if match is None:
            raise UsageError(
                f"{text!r} is no Kubernetes target", hint="Write it as k8s://NAMESPACE/RELEASE, or with ?context=NAME."
            )
        return cls(match["namespace"], match["name"], match["context"])

    def __str__(self) -> str:
        return f"k8s://{self.namespace}/{self.name}{in_context(self.context)}"


def previous_on_kubernetes(release: Release, name: str, api: Api) -> int:
    """Return the version of a model that the release served before the current one.

    Raises:
        RepositoryError: the release's history has none.
        ServerError: the API server refused or did not answer.
    """
    deployment = find_deployments(release, api)[0]
    history, url = history_of(deployment), read_template(deployment).url
    places = [index for index, entry in enumerate(history) if entry.get("url") == url]
    if places:  # `kubectl rollout undo` goes back without a word to the history: what comes after is not served
        history = history[: places[-1] + 1]
    served = [parse_models(json.dumps(entry.get("models"))) or {} for entry in history]
    versions = [max(models[name]) for models in served if models.get(name)]
    if versions and not served[-1].get(name):  # it was undeployed
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
        ServerRefusedError: there is none.
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
            hint="helm list -n NAMESPACE shows the releases; deploy/README.md installs one.",
        )
    return (single,)
