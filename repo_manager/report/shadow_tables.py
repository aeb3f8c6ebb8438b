"""Trials of a version as rich renderables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.tables import key_values, make_table

if TYPE_CHECKING:
    from repo_manager.rollout.trial.gates import GateResult
    from repo_manager.rollout.trial.shadow import LatencySummary, ShadowReport

__all__ = ["gates_view", "outcome_text", "shadow_view"]

_STYLES = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def shadow_view(report: ShadowReport) -> list[RenderableType]:
    """Show what mirrored requests showed."""
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
    """Show how each gate stands."""
    rows = [[each.gate, each.source, outcome_text(str(each.outcome)), each.reason] for each in gates]
    return make_table(None, ["gate", "seen in", "outcome", "why"], rows)


def outcome_text(outcome: str) -> Text:
    """Colour an outcome."""
    return Text(outcome, style=_STYLES[outcome])


def _latency(summary: LatencySummary) -> list[str]:
    numbers = (summary.mean_ns, summary.p50_ns, summary.p95_ns, summary.p99_ns)
    return ["-" if number is None else f"{number / 1e6:.2f} ms" for number in numbers]
