"""What pruning did, as a part of the sparsity page: the front as a chart, the drift, and each layer's error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from repo_manager.report.page import render_part
from repo_manager.report.svg import Axis, Chart

__all__ = ["pruning_facts", "pruning_section"]


def pruning_facts(pruned: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what pruning cost, as name and value, from a report as it is in a manifest or in JSON."""
    found = pruned.get("evidence")
    if not found:
        return [("layers pruned", str(len(pruned["pruned"])))]
    drift, by_magnitude = (
        max((item["relative_error"] for item in found[name]), default=0.0) for name in ("drift", "magnitude_drift")
    )
    uppers = (found.get("drift_upper") or {}).values()
    bound = f", at most {max(uppers):.3g} (95 %)" if uppers else ""
    budget = found.get("budget")
    facts = [
        ("layers pruned", str(len(pruned["pruned"]))),
        ("compute that can run sparse", _percent(found["sparse_macs"] / found["macs"]) if found["macs"] else "unknown"),
        ("drift", f"{drift:.3g}{bound} on {found['judged_samples']} {found['judged_on']} samples"),
        ("by magnitude", f"{by_magnitude:.3g}"),
        (
            "solved on",
            f"{found['samples']} samples of {found['data']} ({found['data_digest'][:19]}, seed {found['seed']})",
        ),
    ]
    if permutation := found.get("permutation"):
        kept = f"2:4 keeps {_percent(permutation['kept_after'])}, before {_percent(permutation['kept_before'])}"
        facts.append(("channels permuted", f"{permutation['channels']}; of the magnitude {kept}"))
    if budget:
        facts.append(("budget", f"{budget['kind']} {budget['limit']:g}"))
        if budget["metric"] is not None:
            facts.append(("metric", f"{budget['metric']:.4g}, dense {budget['dense_metric']:.4g}"))
    return facts


def pruning_section(pruned: Mapping[str, Any]) -> Markup:
    """Return the section; every name from the model is escaped.

    Args:
        pruned: a `PruneReport` as it is in a manifest or in JSON.
    """
    budget = (pruned.get("evidence") or {}).get("budget")
    front: Sequence[Mapping[str, Any]] = budget["front"] if budget else ()
    return render_part(
        "pruning_section.html.j2",
        pruned=pruned,
        facts=pruning_facts(pruned),
        front=front,
        measure="Metric" if budget and budget["kind"] == "metric" else "Drift",
        chart=Markup(_chart(budget)) if budget else "",
        percent=_percent,
        number=lambda value: "" if value is None else f"{value:.3g}",
    )


def _chart(budget: Mapping[str, Any]) -> str:
    """Draw the share of the compute against what it costs."""
    is_metric = budget["kind"] == "metric"

    def points(*, final: bool) -> list[tuple[float, float, str]]:
        found = []
        for point in budget["front"]:
            value = point["metric"] if is_metric else point["drift"]
            if bool(point["final"]) == final and isinstance(value, int | float):
                text = f"{point['layers']} layers, {_percent(point['macs_share'])} of the compute: {value:.3g}"
                found.append((100 * point["macs_share"], float(value), text))
        return found

    front, final = points(final=False), points(final=True)
    values = [value for _, value, _ in (*front, *final)]
    y = Axis.around("metric", values, zero=False) if is_metric else Axis.around("drift", [*values, budget["limit"]])
    chart = Chart(
        "Compute that can run sparse against its cost",
        "A point for each set of layers that was measured, and for those that were solved one behind the other.",
        Axis.around("share of the compute that can run sparse, %", [0.0, 100.0]),
        y,
    )
    chart.line("each layer solved by itself", [(x, value) for x, value, _ in front], 0).marks(front, 0).marks(final, 1)
    if not is_metric:
        chart.limit(budget["limit"], f"limit {budget['limit']:g}")
    return chart.render()


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
