"""Roll-outs as rich renderables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.tables import format_bytes, key_values, make_table

if TYPE_CHECKING:
    from repo_manager.rollout import ModelStatus, Rollout, RolloutPlan

__all__ = ["plan_view", "rollout_view", "status_view"]


def plan_view(plan: RolloutPlan) -> list[RenderableType]:
    """Show what a roll-out will do, version by version."""
    rows = [[step.version, step.action, step.reason] for step in plan.steps]
    title = f"Plan: {plan.model}:{plan.version} on {plan.url}"
    views: list[RenderableType] = [make_table(title, ["version", "action", "why"], rows, right="version")]
    views.append(Text(f"Loaded at the same time, at most: {format_bytes(plan.peak_bytes)} of version folders"))
    return [*views, *(Text(f"Note: {note}") for note in plan.notes)]


def rollout_view(rollout: Rollout) -> list[RenderableType]:
    """Show what was done, and how it was proven."""
    if rollout.dry_run:
        return [*plan_view(rollout.plan), Text("Dry run: nothing was changed.")]
    pairs: list[tuple[str, object]] = [
        ("serves", f"{rollout.model}:{rollout.version} on {rollout.url}"),
        ("ready", _versions(rollout.ready)),
        ("before", _versions(rollout.previous)),
        ("proof", _proof(rollout)),
        ("took", f"{rollout.seconds:.2f} s"),
    ]
    if rollout.draining:
        pairs.append(("draining", _versions(rollout.draining)))
    if rollout.mended:
        pairs.append(("mended", "it was READY and did not answer; it was unloaded and loaded again"))
    head = "Deployed" if rollout.changed else "Nothing to do: it is served already"
    return [Text(head, style="green"), key_values(pairs), *plan_view(rollout.plan)]


def status_view(models: Sequence[ModelStatus]) -> list[RenderableType]:
    """Show what servers serve beside what the repository says."""
    if not models:
        return [Text("No model is loaded, and none was deployed.")]
    rows = [
        [
            *(model.model, model.url, _versions(model.ready), _versions(model.wanted)),
            "never" if model.deployed is None else f"{model.deployed} at {model.deployed_at}",
            Text("; ".join(model.drift), style="yellow") if model.drift else Text("-"),
        ]
        for model in models
    ]
    return [make_table(None, ["model", "server", "ready", "repository serves", "last deployed", "drift"], rows)]


def _versions(versions: tuple[int, ...]) -> str:
    return ", ".join(map(str, versions)) or "none"


def _proof(rollout: Rollout) -> str:
    smoke = rollout.smoke
    if smoke is None:
        return "none"
    worst = max(smoke.outputs, key=lambda output: output.error, default=None)
    compared = (
        "outputs have the promised shapes and types"
        if worst is None
        else f"{len(smoke.outputs)} output(s) compared, largest error {worst.error:.1e} <= {worst.tolerance:.1e}"
    )
    return f"one inference in {smoke.latency_ns / 1e6:.1f} ms against {smoke.reference}: {compared}"
