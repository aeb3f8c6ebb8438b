"""Roll-outs as rich renderables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.tables import format_bytes, key_values, make_table

if TYPE_CHECKING:
    from repo_manager.rollout import Check, FleetRollout, ModelStatus, Rollout, RolloutPlan

__all__ = ["checks_view", "fleet_view", "plan_view", "rollout_view", "status_view"]


def plan_view(plan: RolloutPlan) -> list[RenderableType]:
    """Show what a roll-out will do, version by version."""
    rows = [[step.version, step.action, step.reason] for step in plan.steps]
    title = f"Plan: {plan.model}:{plan.version} on {plan.url}"
    views: list[RenderableType] = [make_table(title, ["version", "action", "why"], rows, right="version")]
    views.append(Text(f"Loaded at the same time, at most: {format_bytes(plan.peak_bytes)} of version folders"))
    return [*views, *(Text(f"Note: {note}") for note in plan.notes)]


def checks_view(checks: Sequence[Check]) -> list[RenderableType]:
    """Show what was looked at before anything is touched."""
    if not checks:
        return []
    styles = {"warning": "yellow", "refused": "red", "unknown": "dim"}
    rows = [
        [check.name, Text(str(check.outcome), style=styles.get(str(check.outcome), "green")), check.detail]
        for check in checks
    ]
    return [make_table("Checks", ["check", "outcome", "found"], rows)]


def fleet_view(fleet: FleetRollout) -> list[RenderableType]:
    """Show what was done on each server, one row each."""
    where = f"{_servers(len(fleet.servers))}, {fleet.batch} at a time"
    head = f"{fleet.model}:{fleet.version} on {where}, {fleet.seconds:.1f} s"
    if fleet.dry_run:
        head = f"Dry run, nothing was changed: {head}"
    elif not fleet.changed:
        head = f"Nothing to do, it is served already: {head}"
    rows: list[list[object]] = []
    for server in fleet.servers:
        steps = ", ".join(f"{step.action} {step.version}" for step in server.plan.steps)
        rows.append([server.url, _versions(server.previous), steps, _versions(server.ready), _short_proof(server)])
    rows += [[url, "-", "-", Text("does not answer", style="yellow"), "-"] for url in fleet.unavailable]
    views: list[RenderableType] = [Text(head, style="green")]
    views.append(make_table(None, ["server", "before", "plan", "ready", "proof"], rows))
    if fleet.unavailable:
        views.append(Text("What does not answer serves the version when it starts again: the repository says so."))
    seen = dict.fromkeys(check for server in fleet.servers for check in server.checks if str(check.outcome) != "passed")
    return [*views, *checks_view(tuple(seen))]


def _servers(count: int) -> str:
    return "1 server" if count == 1 else f"{count} servers"


def _short_proof(rollout: Rollout) -> str:
    if rollout.smoke is None:
        return "-"
    mended = "mended, " if rollout.mended else ""
    return f"{mended}{rollout.smoke.reference}, {rollout.smoke.latency_ns / 1e6:.1f} ms"


def rollout_view(rollout: Rollout) -> list[RenderableType]:
    """Show what was done, and how it was proven."""
    if rollout.dry_run:
        return [*plan_view(rollout.plan), *checks_view(rollout.checks), Text("Dry run: nothing was changed.")]
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
    doubts = tuple(check for check in rollout.checks if str(check.outcome) != "passed")
    return [Text(head, style="green"), key_values(pairs), *plan_view(rollout.plan), *checks_view(doubts)]


def status_view(models: Sequence[ModelStatus], silent: Mapping[str, str] | None = None) -> list[RenderableType]:
    """Show what servers serve beside what the repository says."""
    if not models and not silent:
        return [Text("No model is loaded, and none was deployed.")]
    rows: list[list[object]] = [
        [
            *(model.model, model.url, _versions(model.ready), _versions(model.wanted)),
            "never" if model.deployed is None else f"{model.deployed} at {model.deployed_at}",
            _restarts(model),
            Text("; ".join(model.drift), style="yellow") if model.drift else Text("-"),
        ]
        for model in models
    ]
    for url, reason in (silent or {}).items():
        rows.append(["-", url, "-", "-", "-", "-", Text(f"does not answer: {reason}", style="red")])
    columns = ["model", "server", "ready", "repository serves", "last deployed", "restarts", "drift"]
    return [make_table(None, columns, rows)]


def _restarts(model: ModelStatus) -> str:
    """Say how often the server came back, and whether it did after the last deployment."""
    if model.restarts is None:
        return "not known"
    since = f", last at {model.started_at} (after the deployment)" if model.restarted and model.restarts else ""
    started = f", started at {model.started_at}" if model.restarted and not model.restarts else ""
    return f"{model.restarts}{since}{started}"


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
