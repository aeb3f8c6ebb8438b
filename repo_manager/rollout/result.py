"""The result of a roll-out, on whatever target: one type and one JSON shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from repo_manager.rollout.checks import Check
from repo_manager.rollout.plan import RolloutPlan
from repo_manager.rollout.smoke import SmokeResult
from repo_manager.summary import Summarized

if TYPE_CHECKING:  # keeps a deploy without a trial from importing them
    from repo_manager.rollout.trial.shadow import ShadowReport
    from repo_manager.rollout.trial.steps import CanaryStep

__all__ = ["Action", "PodProof", "Rollout", "ServerResult", "SnapshotChange", "TrialResult"]

Action = Literal["deploy", "rollback", "undeploy"]


@dataclasses.dataclass(frozen=True)
class PodProof:
    """A new pod's answer to the smoke inference.

    Attributes:
        pod: name of the pod, without its namespace.
        url: address the pod was asked at.
        latency_ns: of the inference, or of the index after an undeployment. `None` when the pod was out of reach.
    """

    pod: str
    url: str
    latency_ns: int | None


@dataclasses.dataclass(frozen=True)
class SnapshotChange:
    """The old and new snapshot of a Deployment or an InferenceService.

    Attributes:
        before: the repository or snapshot it served.
        after: the snapshot it serves now.
        models: everything the snapshot serves: model -> versions.
        replicas: how many pods the Deployment wants. `None` for an InferenceService.
        revision: the InferenceService's new revision. Empty without Knative, and for a Deployment.
        pods: the answers, one per pod asked.
    """

    before: str
    after: str
    models: Mapping[str, tuple[int, ...]]
    replicas: int | None = None
    revision: str = ""
    pods: tuple[PodProof, ...] = ()


@dataclasses.dataclass(frozen=True)
class ServerResult:
    """One Triton server, Deployment or InferenceService.

    Attributes:
        name: the server's URL, or the name of the Deployment or InferenceService.
        changed: whether anything had to be done on it. `False` for a dry run of a Triton server.
        ready: versions of the model it serves now, by the server's index or in the snapshot.
        previous: versions it served before. Empty where this is not known.
        proof: `inference`: the version answered one. `readiness`: no pod could be reached from here, so only their
            readiness is known. `conditions`: KServe says so. `index`: the server's index no longer lists the
            undeployed versions as READY. `none`: a dry run, or no pod is wanted.
        smoke: the proof by inference on a Triton server, else `None`.
        plan: the prediction for a Triton server, else `None`.
        checks: the checks made before anything was touched. Empty when nothing had to be done.
        reloaded: the version was READY and did not answer, and was unloaded and loaded again.
        draining: dropped versions still busy with their last requests, or with the end of their process.
        snapshot: the old and new snapshot of a Deployment or InferenceService. `None` for a Triton server.
        started: whether the server was started for this roll-out, and goes on running.
    """

    name: str
    changed: bool
    ready: tuple[int, ...]
    previous: tuple[int, ...]
    proof: str
    smoke: SmokeResult | None = None
    plan: RolloutPlan | None = None
    checks: tuple[Check, ...] = ()
    reloaded: bool = False
    draining: tuple[int, ...] = ()
    snapshot: SnapshotChange | None = None
    started: bool = False


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """A successful trial, or its plan.

    Attributes:
        shares: the shares of the traffic asked for, 0 to 1.
        shadow: result of mirroring recorded requests. `None`: there was no shadow. `None` without.
        steps: shares of the traffic that the canary went through, in order.
        notes: requests of others during the trial, or why there was no trial, as sentences.
    """

    shares: tuple[float, ...] = ()
    shadow: ShadowReport | None = None
    steps: tuple[CanaryStep, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, repr=False)
class Rollout(Summarized):
    """A successful roll-out, or its plan.

    Attributes:
        model: name of the model rolled out.
        version: the version served now. `None`: none is, because the model was undeployed.
        target: address of the roll-out: the servers' URLs, `k8s://...` or `kserve://...`.
        servers: one result for each server, Deployment or InferenceService, in the order given.
        unavailable: silent servers, left unchanged, within `max_unavailable`. They serve the right version after a
            start that loads the model, or after the same roll-out again.
        batch: how many servers at a time.
        changed: whether anything had to be done on any of them. `False` for a dry run.
        dry_run: whether this is the plan alone.
        trial: the shadow and the canary. `None` without.
        seconds: wall time of the roll-out.
        events: the steps made, as lines of text, in order.
        action: `deploy`, `rollback` or `undeploy`, as it was asked for.
    """

    model: str
    version: int | None
    target: str
    servers: tuple[ServerResult, ...]
    unavailable: tuple[str, ...]
    batch: int
    changed: bool
    dry_run: bool
    trial: TrialResult | None
    seconds: float
    events: tuple[str, ...]
    action: Action = "deploy"

    def _summary(self) -> Mapping[str, Any]:
        return {
            "model": self.model if self.version is None else f"{self.model}:{self.version}",
            "target": self.target,
            "changed": "a plan only" if self.dry_run else "yes" if self.changed else "no",
            "ready": ", ".join(map(str, self.ready)) or "none",
            "proof": ", ".join(dict.fromkeys(server.proof for server in self.servers)) or None,
            "seconds": f"{self.seconds:.1f}",
        }

    @property
    def ready(self) -> tuple[int, ...]:
        """Versions of the model every server serves now, ascending."""
        each = [set(server.ready) for server in self.servers]
        return tuple(sorted(set.intersection(*each))) if each else ()
