"""What a roll-out on Kubernetes did, or would do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["DeploymentRollout", "KubernetesRollout", "PodProof"]


@dataclasses.dataclass(frozen=True)
class PodProof:
    """A new pod's answer to the smoke inference.

    Attributes:
        pod: its name.
        url: where it was asked.
        latency_ns: of the inference; `None` when the pod could not be reached from here.
    """

    pod: str
    url: str
    latency_ns: int | None


@dataclasses.dataclass(frozen=True)
class DeploymentRollout:
    """One Deployment of the release.

    Attributes:
        name: the Deployment.
        before: the repository or snapshot that its pods served.
        after: the snapshot that they serve now.
        replicas: how many pods it wants.
        changed: whether its pod template was changed.
        proofs: one per pod that was asked.
    """

    name: str
    before: str
    after: str
    replicas: int
    changed: bool
    proofs: tuple[PodProof, ...]


@dataclasses.dataclass(frozen=True)
class KubernetesRollout:
    """A roll-out that succeeded, or its plan.

    Attributes:
        target: `k8s://namespace/release`.
        model: the model.
        version: the version that is served now.
        snapshot: where the snapshot is, as the pods see it.
        models: everything that it serves.
        deployments: one or more, of different kinds of GPU.
        changed: whether anything had to be done; `False` for a dry run.
        dry_run: whether this is the plan alone.
        proof: `inference`: new pods answered; `readiness`: no pod could be reached from here, so their
            readiness is all that is known; `none`: a dry run, or no pod is wanted.
        seconds: duration.
        events: what was done, in order.
    """

    target: str
    model: str
    version: int
    snapshot: str
    models: Mapping[str, tuple[int, ...]]
    deployments: tuple[DeploymentRollout, ...]
    changed: bool
    dry_run: bool
    proof: str
    seconds: float
    events: tuple[str, ...]
