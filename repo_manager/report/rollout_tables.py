"""Roll-outs, trials and the served state, as rich renderables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.layout import Moment, key_values, last_deployed, make_table
from repo_manager.report.snapshot_tables import cluster_view
from repo_manager.report.tables import format_bytes

if TYPE_CHECKING:
    from repo_manager.gates import GateResult
    from repo_manager.rollout.checks import Check
    from repo_manager.rollout.plan import RolloutPlan
    from repo_manager.rollout.result import Rollout, ServerResult, TrialResult
    from repo_manager.rollout.status import ModelStatus, RepositoryStatus
    from repo_manager.rollout.traffic import Traffic
    from repo_manager.rollout.trial.shadow import LatencySummary, ShadowReport

__all__ = [
    "checks_view",
    "gates_view",
    "outcome_text",
    "rollout_plan_view",
    "rollout_view",
    "shadow_view",
    "status_view",
    "traffic_view",
]


# Trials of a version as tables.

_STYLES = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def shadow_view(report: ShadowReport) -> list[RenderableType]:
    """Show the result of mirrored requests."""
    pairs: list[tuple[str, object]] = [
        ("pairs", f"{report.pairs} in {report.seconds:.1f} s"),
        ("errors", f"{report.errors_new} of version {report.new}, {report.errors_old} of version {report.old}"),
    ]
    if report.refused_by_both:
        pairs.append(("refused by both", f"{report.refused_by_both} (in no number here)"))
    if report.skipped:
        pairs.append(("skipped", f"{report.skipped} that were due while answers were waited for: ask for a lower rate"))
    if report.first_error is not None:
        pairs.append(("first error", report.first_error))
    latencies = [
        [f"version {version}", *_latency(summary)]
        for version, summary in ((report.old, report.latency_old), (report.new, report.latency_new))
    ]
    drift = [
        [
            each.output,
            f"{each.relative_error:.2g}",
            "-" if each.cosine is None else f"{each.cosine:.6f}",
            f"{each.max_abs_error:.2g}",
            "-" if each.top1_agreement is None else f"{each.top1_agreement:.2%}",
        ]
        for each in report.outputs
    ]
    title = f"Shadow of {report.model}: version {report.new} against {report.old}"
    return [
        Text(title, style="bold"),
        key_values(pairs),
        make_table(None, ["latency", "mean", "p50", "p95", "p99"], latencies),
        make_table(None, ["output", "relative error", "cosine", "largest error", "same top class"], drift),
        gates_view(report.gates),
    ]


def gates_view(gates: tuple[GateResult, ...]) -> RenderableType:
    """Show the result of each gate."""
    rows = [[each.gate, each.level, outcome_text(str(each.outcome)), each.reason] for each in gates]
    return make_table(None, ["gate", "seen in", "outcome", "why"], rows)


def outcome_text(outcome: str) -> Text:
    """Colour an outcome."""
    return Text(outcome, style=_STYLES[outcome])


def _latency(summary: LatencySummary) -> list[str]:
    numbers = (summary.mean_ns, summary.p50_ns, summary.p95_ns, summary.p99_ns)
    return ["-" if number is None else f"{number / 1e6:.2f} ms" for number in numbers]


_PROOFS = {
    "inference": "new pods answered an inference as the reference does",
    "readiness": "readiness only: no pod can be reached from here, so none was asked",
    "index": "new pods no longer list it in their index",
    "conditions": "KServe's conditions; no inference was sent",
    "none": "none",
}


def rollout_plan_view(plan: RolloutPlan, action: str = "deploy") -> list[RenderableType]:
    """Show the plan of a roll-out, version by version."""
    rows = [[step.version, step.action, step.reason] for step in plan.steps]
    leaves = action == "undeploy"
    title = f"Plan: undeploy from {plan.url}" if leaves else f"Plan: {plan.model}:{plan.version} on {plan.url}"
    views: list[RenderableType] = [make_table(title, ["version", "action", "why"], rows, right="version")]
    if not leaves:
        views.append(Text(f"Loaded at the same time, at most: {format_bytes(plan.peak_bytes)} of version folders"))
    for title, relatives in (("Brings along", plan.brings), ("Proven with it", plan.dependents)):
        if relatives:
            rows = [[each.model, ", ".join(map(str, each.versions)), each.reason] for each in relatives]
            views.append(make_table(title, ["model", "version", "why"], rows, right="version"))
    return [*views, *_notes(plan)]


def _notes(*plans: RolloutPlan | None) -> list[RenderableType]:
    """Show the remarks, each once."""
    notes = dict.fromkeys(note for plan in plans if plan is not None for note in plan.notes)
    return [Text(f"Note: {note}") for note in notes]


def checks_view(checks: Sequence[Check]) -> list[RenderableType]:
    """Show the checks made before anything is touched."""
    if not checks:
        return []
    styles = {"warning": "yellow", "refused": "red", "unknown": "dim"}
    rows = [
        [check.name, Text(str(check.outcome), style=styles.get(str(check.outcome), "green")), check.detail]
        for check in checks
    ]
    return [make_table("Checks", ["check", "outcome", "found"], rows)]


def rollout_view(rollout: Rollout, *, back: bool = False) -> list[RenderableType]:
    """Show the changes, made or planned, and their proof. The plan of made changes was shown before them.

    Args:
        rollout: the roll-out, planned or made.
        back: it was a roll-back: the heading of a single target names both versions.
    """
    first = rollout.servers[0]
    if first.snapshot is not None:
        views = _cluster_view(rollout, back)
    elif len(rollout.servers) == 1 and not rollout.unavailable:
        views = _server_view(rollout, first, back)
    else:
        views = _fleet_view(rollout)
    return views if rollout.trial is None else [*views, *_trial_view(rollout.trial)]


def _server_view(rollout: Rollout, server: ServerResult, back: bool) -> list[RenderableType]:
    if rollout.dry_run:
        plan = [] if server.plan is None or not server.plan.steps else rollout_plan_view(server.plan, rollout.action)
        if rollout.action == "undeploy" and not plan:
            plan = [Text(_no_plan(rollout, server))]
        return [*plan, *checks_view(server.checks), Text("Dry run: nothing was changed.")]
    where = server.name if rollout.action == "undeploy" else f"{_serves(rollout)} on {server.name}"
    pairs: list[tuple[str, object]] = [
        ("server" if rollout.action == "undeploy" else "serves", where),
        ("ready", _versions(server.ready)),
        ("before", _versions(server.previous)),
        ("proof", _proof(server)),
        ("took", f"{rollout.seconds:.2f} s"),
    ]
    if server.draining:
        pairs.append(("draining", _versions(server.draining)))
    if server.reloaded:
        pairs.append(("reloaded", "it was READY and did not answer; it was unloaded and loaded again"))
    doubts = tuple(check for check in server.checks if str(check.outcome) != "passed")
    return [_head(rollout, back), key_values(pairs), *_notes(server.plan), *checks_view(doubts)]


def _no_plan(rollout: Rollout, server: ServerResult) -> str:
    """Describe the effect of undeploying where no server serves the model."""
    if server.plan is not None:
        return f"{rollout.model} is not served on {server.name}."
    if not server.previous:
        return f"No server runs, and {rollout.model} is not recorded as deployed: there is nothing to do."
    return f"No server runs: {rollout.model} would be recorded as undeployed, and `serve` would not load it any more."


def _fleet_view(rollout: Rollout) -> list[RenderableType]:
    """Show several servers, one row each."""
    count = len(rollout.servers)
    where = f"{'1 server' if count == 1 else f'{count} servers'}, {rollout.batch} at a time"
    head = f"{_serves(rollout)} on {where}, {rollout.seconds:.1f} s"
    if rollout.dry_run:
        head = f"Dry run, nothing was changed: {head}"
    elif not rollout.changed:
        head = f"Nothing to do, it is {'not served' if rollout.action == 'undeploy' else 'served already'}: {head}"
    rows: list[list[object]] = []
    for server in rollout.servers:
        steps = () if server.plan is None else server.plan.steps
        plan = ", ".join(f"{step.action} {step.version}" for step in steps)
        rows.append([server.name, _versions(server.previous), plan, _versions(server.ready), _short_proof(server)])
    rows += [[url, "-", "-", Text("does not answer", style="yellow"), "-"] for url in rollout.unavailable]
    views: list[RenderableType] = [Text(head, style="green")]
    views.append(make_table(None, ["server", "before", "plan", "ready", "proof"], rows))
    if rollout.unavailable and rollout.action != "undeploy":
        views.append(
            Text(
                "A silent server is left unchanged. Run the same command again once it answers, unless a new start "
                "loaded the model."
            )
        )
    checks = (check for server in rollout.servers for check in server.checks)
    seen = dict.fromkeys(check for check in checks if str(check.outcome) != "passed")
    return [*views, *_notes(*(server.plan for server in rollout.servers)), *checks_view(tuple(seen))]


def _cluster_view(rollout: Rollout, back: bool) -> list[RenderableType]:
    """Show the snapshots of Deployments or an InferenceService."""
    pairs: list[tuple[str, object]] = [("serves", f"{_serves(rollout)} on {rollout.target}")]
    rows: list[list[object]] = []
    proofs: dict[str, None] = {}
    for server in rollout.servers:
        change = server.snapshot
        if change is None:
            continue
        proofs[_PROOFS[server.proof]] = None
        revision = f" ({change.revision})" if change.revision else ""
        after = change.after + revision if server.changed else "as before"
        answers = [f"{each.pod} {each.latency_ns / 1e6:.1f} ms" for each in change.pods if each.latency_ns is not None]
        pods = "-" if change.replicas is None else change.replicas
        rows.append([server.name, change.before, after, pods, ", ".join(answers) or "-"])
        if len(rows) == 1:
            others = [f"{n}:{','.join(map(str, v))}" for n, v in change.models.items() if n != rollout.model]
            pairs += [("besides", ", ".join(others))] if others else []
            pairs.append(("snapshot", change.after))
    pairs += [("proof", "; ".join(proofs)), ("took", f"{rollout.seconds:.1f} s")]
    table = make_table(None, ["name", "served", "serves", "pods", "answered"], rows, right="pods")
    return [_head(rollout, back), key_values(pairs), table]


def _trial_view(trial: TrialResult) -> list[RenderableType]:
    views: list[RenderableType] = []
    if trial.shares and not trial.steps and not trial.notes:
        views.append(Text("Canary: " + ", ".join(map(_percent, trial.shares))))
    if trial.steps:
        rows = [[_percent(step.fraction), step.requests, outcome_text(str(step.outcome))] for step in trial.steps]
        views.append(make_table("Canary", ["share", "requests", "gates"], rows))
        if trial.steps[-1].gates:
            views.append(gates_view(trial.steps[-1].gates))
    return [*views, *(Text(f"Note: {note}") for note in trial.notes)]


def _head(rollout: Rollout, back: bool) -> Text:
    if rollout.dry_run:
        return Text("Dry run: nothing was changed.")
    if rollout.action == "undeploy":
        return Text("Undeployed" if rollout.changed else "Nothing to do: it is not served", style="green")
    if not rollout.changed:
        return Text("Nothing to do: it is served already", style="green")
    before = rollout.servers[0].previous
    if not back or not before:
        return Text("Deployed", style="green")
    text = f"Rolled back from version {_versions(before)} to version {rollout.version}"
    return Text(f"{text}. Another rollback deploys version {before[-1]} again.", style="green")


def _serves(rollout: Rollout) -> str:
    return f"no version of {rollout.model}" if rollout.version is None else f"{rollout.model}:{rollout.version}"


def status_view(found: RepositoryStatus) -> list[RenderableType]:
    """Show the served state beside the repository's."""
    clusters = [view for cluster in found.clusters for view in cluster_view(cluster)]
    if clusters and not (found.models or found.unreachable):
        return clusters
    if not found.models and not found.unreachable and not found.strangers:
        return [Text("No model is loaded, and none was deployed.")]
    rows: list[list[object]] = [
        [
            *(model.model, model.url, _versions(model.ready), _versions(model.selected)),
            last_deployed(model.deployed, model.deployed_at),
            _restarts(model),
            Text("; ".join(model.differences), style="yellow") if model.differences else Text("-"),
        ]
        for model in found.models
    ]
    for url, reason in found.unreachable.items():
        rows.append(["-", url, "-", "-", "-", "-", Text(f"does not answer: {reason}", style="red")])
    for url, names in found.strangers.items():
        for name in names:
            what = Text("it is loaded and not of this repository", style="yellow")
            rows.append([name, url, "-", "-", "-", "-", what])
    columns = ["model", "server", "ready", "selected", "last deployed", "restarts", "differs"]
    return [*clusters, make_table(None, columns, rows, drop="restarts,selected,last deployed,server")]


def _restarts(model: ModelStatus) -> str | Moment:
    """Say how often the server came back, and whether it did after the last deployment."""
    if model.restarts is None:
        return "not known"
    if not model.restarted or model.started_at is None:
        return str(model.restarts)
    return Moment(model.started_at, f"{model.restarts}, {'last' if model.restarts else 'started'} ")


def _versions(versions: tuple[int, ...]) -> str:
    return ", ".join(map(str, versions)) or "none"


def _short_proof(server: ServerResult) -> str:
    if server.proof == "index":
        return "index"
    if server.smoke is None:
        return "-"
    reloaded = "reloaded, " if server.reloaded else ""
    against = server.smoke.describe_reference() if server.smoke.reference == "none" else server.smoke.reference
    return f"{reloaded}{against}, {server.smoke.latency_ns / 1e6:.1f} ms"


def _proof(server: ServerResult) -> str:
    smoke = server.smoke
    if server.proof == "index":
        return f"the server's index lists {_versions(server.ready)} as READY"
    if smoke is None:
        return "none"
    if smoke.reference == "readiness":
        return f"readiness only, no inference: {smoke.note}"
    worst = max(smoke.outputs, key=lambda output: output.error, default=None)
    compared = (
        "outputs have the promised shapes and types"
        if worst is None
        else f"{len(smoke.outputs)} output(s) compared, largest error {worst.error:.1e} <= {worst.tolerance:.1e}"
    )
    if smoke.note:
        compared = f"{compared}; {smoke.note}"
    asked = "one inference" if smoke.requests == 1 else f"{smoke.requests} requests"
    if smoke.responses != smoke.requests:
        asked += f" ({smoke.responses} responses)"
    against = f", {smoke.describe_reference()}" if smoke.reference == "none" else f" against {smoke.reference}"
    return f"{asked} in {smoke.latency_ns / 1e6:.1f} ms{against}: {compared}"


def traffic_view(traffic: Traffic) -> list[RenderableType]:
    """Show the shares of the two Services, and of before."""
    stable, canary = traffic.services
    pairs: list[tuple[str, object]] = [("route", f"{traffic.route} at {traffic.cluster}")]
    would = "would be " if traffic.dry_run else ""
    if traffic.steps:
        pairs.append(("before", f"{canary} {_percent(traffic.before)}, {stable} {_percent(1 - traffic.before)}"))
    pairs.append(("traffic", f"{would}{canary} {_percent(traffic.share)}, {stable} {_percent(1 - traffic.share)}"))
    if len(traffic.steps) > 1:
        pairs.append(("steps", ", ".join(map(_percent, traffic.steps))))
    return [key_values(pairs)]


def _percent(share: float) -> str:
    return f"{share * 100:g} %"
