"""The snapshot of a Triton Deployment, read out of its pod template, and the patches to change it and put it back."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from repo_manager.errors import ServerRefusedError
from repo_manager.files import document
from repo_manager.rollout.targets.api_objects import Object

__all__ = [
    "HISTORY",
    "MODELS",
    "SNAPSHOT",
    "SNAPSHOTS",
    "ServedTemplate",
    "history_of",
    "is_snapshot",
    "keeper_of",
    "models_text",
    "parse_models",
    "patch_back",
    "patch_for",
    "read_template",
    "snapshots_beside",
    "url_of_pod",
]

SNAPSHOT = "repo-manager/snapshot"
MODELS = "repo-manager/models"
SNAPSHOTS = "repo-manager/snapshots"
HISTORY = "repo-manager/history"
_FLAGS = ("--model-repository", "--model-store")
_SUFFIX = ".snapshots"
_KEPT = 10
_VARIABLE = "MODEL_REPOSITORY"
_GRPC_PORT = 8001


@dataclasses.dataclass(frozen=True)
class ServedTemplate:
    """The served state in a Deployment's pod template.

    Attributes:
        deployment: name of the Deployment, without its namespace.
        container: the name of the container with the repository's URL: Triton's, or the one for snapshots on the node.
        containers: the list of the pod's spec it is in: `containers` or `initContainers`.
        variable: the environment variable for the repository's URL. `None`: it is in the arguments.
        url: the repository's URL, as the pods see it.
        load: names of the models the pods load at the start, or `*`.
        snapshots: where snapshots are, as the pods see it.
        grpc_port: port of the pods for gRPC.
    """

    deployment: str
    container: str
    containers: str
    variable: str | None
    url: str
    load: tuple[str, ...]
    snapshots: str
    grpc_port: int


def read_template(deployment: Object) -> ServedTemplate:
    """Read a Deployment.

    Raises:
        ServerRefusedError: no container of it has a `--model-repository`, or it cannot be changed safely.
    """
    name = deployment["metadata"]["name"]
    template = deployment["spec"]["template"]
    found = [each for each in template["spec"]["containers"] if _repository_argument(each) is not None]
    if len(found) != 1:
        raise ServerRefusedError(
            f"Deployment {name}: {len(found)} of its containers have a {_FLAGS[0]} argument; expected one",
            hint=f"The Helm chart makes such a Deployment: {document('kubernetes.md')}",
        )
    container, told, containers = found[0], found[0], "containers"
    argument = str(_repository_argument(container))
    variable = argument[2:-1] if argument.startswith("$(") and argument.endswith(")") else None
    keepers = [each for each in template["spec"].get("initContainers") or () if _has(each, _VARIABLE)]
    if variable is None and keepers:
        told, containers, variable = keepers[0], "initContainers", _VARIABLE
    url = argument if variable is None else _value_of(told, variable, name)
    own = (deployment["metadata"].get("annotations") or {}).get(SNAPSHOTS)
    return ServedTemplate(
        deployment=name,
        container=told["name"],
        containers=containers,
        variable=variable,
        url=url,
        load=_loaded(container),
        snapshots=own or snapshots_beside(url),
        grpc_port=next(
            (p["containerPort"] for p in container.get("ports") or () if p.get("name") == "grpc"), _GRPC_PORT
        ),
    )


def patch_for(
    deployment: Object,
    served: ServedTemplate,
    after: tuple[str, Mapping[str, tuple[int, ...]]],
    *,
    before: Mapping[str, tuple[int, ...]],
) -> Object:
    """Return the strategic merge patch by which a Deployment's pods serve a snapshot.

    It holds the `resourceVersion` read before, so it changes nothing when another process was faster. It owns one
    field of the pod template, the URL: helm and GitOps controllers conflict there alone. Annotations of earlier
    repo-manager versions beside it go.

    Args:
        deployment: the Deployment as it was read. Its resource version and history go into the patch.
        served: models and snapshot of the pods.
        after: the snapshot's URL and models.
        before: the models it serves, the first entry of its history.
    """
    url, models = after
    history = history_of(deployment) or [{"url": served.url, "models": before}]
    return {
        "metadata": {
            "resourceVersion": deployment["metadata"]["resourceVersion"],
            "annotations": {HISTORY: json.dumps([*history, {"url": url, "models": models}][-_KEPT:])},
        },
        "spec": {
            "template": {
                "metadata": {"annotations": dict.fromkeys(_copies_in(deployment))},
                "spec": {served.containers: [_container_patch(deployment, served, url)]},
            }
        },
    }


def patch_back(before: Object, served: ServedTemplate) -> Object:
    """Return the patch back to the very same pod template, whose pods are still there."""
    history = (before["metadata"].get("annotations") or {}).get(HISTORY)
    return {
        "metadata": {"annotations": {HISTORY: history}},
        "spec": {
            "template": {
                "metadata": {"annotations": _copies_in(before)},
                "spec": {served.containers: [_container_patch(before, served, served.url)]},
            }
        },
    }


def url_of_pod(pod: Object) -> str:
    """Return a pod's served state. Empty when it is no pod of Triton's."""
    try:
        template = {"metadata": {"name": pod["metadata"].get("name", "")}, "spec": {"template": {"spec": pod["spec"]}}}
        return read_template(template).url
    except (ServerRefusedError, KeyError):
        return ""


def _copies_in(deployment: Object) -> dict[str, str]:
    """Return the pod template's annotations that repeat the pods' models."""
    annotations = deployment["spec"]["template"].get("metadata", {}).get("annotations") or {}
    return {key: annotations[key] for key in (SNAPSHOT, MODELS) if key in annotations}


def history_of(deployment: Object) -> list[dict[str, Any]]:
    """Return the roll-outs so far, oldest first. A damaged annotation counts as none."""
    try:
        found = json.loads((deployment["metadata"].get("annotations") or {}).get(HISTORY) or "[]")
    except (ValueError, RecursionError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def is_snapshot(url: str, snapshots: str) -> bool:
    """Return whether a served URL is a snapshot's, rather than the repository's itself."""
    above, _, _ = url.rstrip("/").rpartition("/")
    return above in (snapshots.rstrip("/"), snapshots_beside(url))


def snapshots_beside(url: str) -> str:
    """Return the place of the snapshots of `url`, possibly one itself."""
    above, _, _ = url.rstrip("/").rpartition("/")
    return above if above.endswith(_SUFFIX) else url.rstrip("/") + _SUFFIX


# Prefixes of the labels and annotations set by GitOps controllers -> the controller's name.
_KEEPERS = {
    "argocd.argoproj.io/": "Argo CD",
    "helm.toolkit.fluxcd.io/": "Flux",
    "kustomize.toolkit.fluxcd.io/": "Flux",
}


def keeper_of(item: Object) -> str | None:
    """Return the GitOps controller of an object. It may revert changes of it. `None`: none known."""
    marks = [*(item["metadata"].get("labels") or {}), *(item["metadata"].get("annotations") or {})]
    return next((name for mark, name in _KEEPERS.items() if any(each.startswith(mark) for each in marks)), None)


def models_text(models: Mapping[str, tuple[int, ...]]) -> str:
    """Return models and versions as an annotation holds them."""
    return json.dumps({name: list(versions) for name, versions in sorted(models.items())})


def parse_models(text: str | None) -> dict[str, tuple[int, ...]] | None:
    """Read such an annotation. `None` when there is none, or it is damaged.

    Args:
        text: text of the annotation. `None`: there is none.
    """
    try:
        found = json.loads(text or "null")
        return None if found is None else {str(name): tuple(int(v) for v in held) for name, held in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _repository_argument(container: Object) -> str | None:
    words = [*(container.get("command") or ()), *(container.get("args") or ())]
    for index, word in enumerate(words):
        flag, separator, value = word.partition("=")
        if flag in _FLAGS:
            return value if separator else next(iter(words[index + 1 : index + 2]), None)
    return None


def _has(container: Object, variable: str) -> bool:
    return any(entry["name"] == variable for entry in container.get("env") or ())


def _value_of(container: Object, variable: str, name: str) -> str:
    for entry in container.get("env") or ():
        if entry["name"] == variable and isinstance(entry.get("value"), str):
            return str(entry["value"])
    raise ServerRefusedError(
        f"Deployment {name}: $({variable}) holds the model repository, and is not set in the pod template",
        hint="Set it as a plain value: a roll-out changes it there.",
    )


def _loaded(container: Object) -> tuple[str, ...]:
    words = [*(container.get("command") or ()), *(container.get("args") or ())]
    named = tuple(word.partition("=")[2] for word in words if word.startswith("--load-model="))
    return named or ("*",)


def _container_patch(deployment: Object, served: ServedTemplate, url: str) -> Object:
    """Name the URL where the container takes it from: its environment, or its arguments."""
    if served.variable is not None:
        return {"name": served.container, "env": [{"name": served.variable, "value": url}]}
    containers = deployment["spec"]["template"]["spec"]["containers"]
    container = next(each for each in containers if each["name"] == served.container)
    patch: Object = {"name": served.container}
    for key in ("command", "args"):
        words = copy.copy(list(container.get(key) or ()))
        for index, word in enumerate(words):
            flag, separator, _ = word.partition("=")
            if flag in _FLAGS and separator:
                words[index] = f"{flag}={url}"
            elif flag in _FLAGS and index + 1 < len(words):
                words[index + 1] = url
        if words:
            patch[key] = words
    return patch
