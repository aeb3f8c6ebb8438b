"""Roll-outs on Kubernetes and KServe as rich renderables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.tables import key_values, make_table

if TYPE_CHECKING:
    from repo_manager.rollout.targets.kserve import KServeRollout
    from repo_manager.rollout.targets.kubernetes import KubernetesRollout

__all__ = ["kserve_view", "kubernetes_view"]

_PROOFS = {
    "inference": "new pods answered an inference as the reference does",
    "readiness": "readiness only: no pod can be reached from here, so none was asked",
    "none": "none",
}


def kubernetes_view(rollout: KubernetesRollout) -> list[RenderableType]:
    """Show what was rolled out where, and how it was proven."""
    rows = [
        [
            *(each.name, each.before, each.after if each.changed else "as before", each.replicas),
            ", ".join(f"{p.pod} {p.latency_ns / 1e6:.1f} ms" for p in each.proofs if p.latency_ns is not None) or "-",
        ]
        for each in rollout.deployments
    ]
    table = make_table(None, ["deployment", "served", "serves", "pods", "answered"], rows, right="pods")
    pairs = _pairs(rollout.target, rollout.model, rollout.version, rollout.models)
    pairs += [("snapshot", rollout.snapshot), ("proof", _PROOFS[rollout.proof]), ("took", f"{rollout.seconds:.1f} s")]
    return [_head(rollout.changed, rollout.dry_run), key_values(pairs), table]


def kserve_view(rollout: KServeRollout) -> list[RenderableType]:
    """Show what an InferenceService was pointed at."""
    pairs = _pairs(rollout.target, rollout.model, rollout.version, rollout.models)
    pairs += [("served", rollout.before), ("serves", rollout.after)]
    if rollout.steps:
        pairs.append(("canary", ", ".join(f"{step} %" for step in rollout.steps)))
    if rollout.revision:
        pairs.append(("revision", rollout.revision))
    pairs += [("proof", "KServe's conditions; no inference was sent"), ("took", f"{rollout.seconds:.1f} s")]
    return [_head(rollout.changed, rollout.dry_run), key_values(pairs)]


def _pairs(target: str, model: str, version: int, models: Mapping[str, tuple[int, ...]]) -> list[tuple[str, object]]:
    others = ", ".join(f"{name}:{','.join(map(str, held))}" for name, held in models.items() if name != model)
    pairs: list[tuple[str, object]] = [("serves", f"{model}:{version} on {target}")]
    return [*pairs, ("besides", others)] if others else pairs


def _head(changed: bool, dry_run: bool) -> Text:
    if dry_run:
        return Text("Dry run: nothing was changed.")
    return Text("Deployed" if changed else "Nothing to do: it is served already", style="green")
