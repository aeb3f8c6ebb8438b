"""The result of `prune` as tables: the layers pruned and left alone, the front of a budget, and the drift."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.layout import make_table
from repo_manager.report.tables import format_share

if TYPE_CHECKING:
    from pathlib import Path

    from repo_manager.sparsity import PruneReport
    from repo_manager.sparsity.prune_report import BudgetEvidence, PruneEvidence, SkippedLayer

__all__ = ["prune_view"]

_FEW = 3
_OWN_NUMBER = re.compile(r"(?<=reduction size )\d+|(?<=\()\d+(?= groups)")


def prune_view(report: PruneReport, output: Path | None) -> list[RenderableType]:
    """Show pruning's effect on each layer, the layers left alone, and with data the cost.

    Args:
        report: layers changed by pruning or left alone.
        output: path of the written model. `None`: a dry run.
    """
    solved = report.evidence is not None
    columns = ["layer", "weight", "shape", "values removed", "magnitude lost"]
    columns += ["error", "error by magnitude"] if solved else []
    rows = []
    for layer in report.pruned:
        row = [layer.node, layer.weight, "x".join(map(str, layer.shape)), layer.removed]
        row.append(format_share(layer.lost_magnitude))
        rows.append([*row, _error(layer.error), _error(layer.magnitude_error)] if solved else row)
    views: list[RenderableType] = [make_table("Pruned to 2:4", columns, rows, right=",".join(columns[3:]))]
    if report.skipped:
        skipped = [row for layers in _by_kind(report.skipped).values() for row in _skipped_rows(layers)]
        views.append(make_table("Left alone", ["layer", "weight", "why"], skipped))
    if report.evidence is not None:
        views += _evidence_views(report.evidence)
    if report.accuracy is not None:
        views.append(Text(f"Accuracy on {report.accuracy.data}: {report.accuracy.detail}"))
    views.append(Text("Dry run: nothing was written." if output is None else f"Written to {output}"))
    return views


def _by_kind(skipped: Sequence[SkippedLayer]) -> dict[str, list[SkippedLayer]]:
    """Group layers by why they were left alone, whatever their own sizes."""
    found: dict[str, list[SkippedLayer]] = {}
    for layer in skipped:
        found.setdefault(_OWN_NUMBER.sub("N", layer.reason), []).append(layer)
    return found


def _skipped_rows(layers: Sequence[SkippedLayer]) -> list[list[str]]:
    """Return a row a layer, or one row where many have the same kind of reason."""
    if len(layers) <= _FEW:
        return [[layer.node, layer.weight, layer.reason] for layer in layers]
    names = ", ".join(layer.node for layer in layers[:_FEW])
    reasons = {layer.reason for layer in layers}
    reason = layers[0].reason if len(reasons) == 1 else _OWN_NUMBER.sub("N", layers[0].reason)
    return [[f"{names}, ...", f"{len(layers)} weights", reason]]


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.3g}"


def _evidence_views(evidence: PruneEvidence) -> list[RenderableType]:
    where = f"{evidence.judged_samples} {evidence.judged_on} sample(s)"
    by_magnitude = {item.output: item for item in evidence.magnitude_drift}
    rows = [
        [
            item.output,
            f"{item.relative_error:.3g}",
            _error(None if evidence.drift_upper is None else evidence.drift_upper[item.output]),
            format_share(item.top1_agreement),
            f"{by_magnitude[item.output].relative_error:.3g}",
            format_share(by_magnitude[item.output].top1_agreement),
        ]
        for item in evidence.drift
    ]
    columns = ["output", "relative error", "at most (95 %)", "same top class", "by magnitude", "top class by magnitude"]
    share = evidence.sparse_macs / evidence.macs if evidence.macs else None
    worst = max((item.relative_error for item in evidence.drift), default=0.0)
    line = f"{format_share(share)} of the multiply-accumulates can run sparse, at drift {worst:.3g}. Solved on "
    line += f"{evidence.samples} sample(s)."
    if evidence.drift_upper is None:
        line += " Too few samples to hold some out: the drift on other inputs is not known, and is larger."
    if (found := evidence.permutation) is not None:
        line += f" {found.channels} channels changed places: in {len(found.layers)} layer(s) 2:4 keeps "
        line += f"{format_share(found.kept_after)} of the magnitude, {format_share(found.kept_before)} before."
    if (trained := evidence.distillation) is not None:
        line += (
            f" Distilled: epoch {trained.kept_epoch} of {trained.epochs}, on {trained.choosing_samples} sample(s) to "
        )
        line += f"choose by, drift {trained.errors[0]:.3g} became {min(trained.errors):.3g}."
    return [
        *([] if evidence.budget is None else _budget_views(evidence.budget)),
        make_table(f"Drift against the dense model, on {where}", columns, rows, right=",".join(columns[1:])),
        Text(line),
    ]


def _budget_views(budget: BudgetEvidence) -> list[RenderableType]:
    """Show the front, and the data behind the choice."""
    rows = [
        [
            point.layers,
            "solved one behind the other" if point.final else ", ".join(point.added),
            format_share(point.macs_share),
            *(
                [f"{point.metric:.4g}"]
                if point.metric is not None
                else [_error(point.drift), _error(point.drift_upper)]
            ),
        ]
        for point in budget.front
    ]
    if budget.kind == "metric":
        columns, by = ["layers", "added", "compute that can run sparse", "metric"], "your metric"
        loss = (budget.dense_metric or 0.0) - (budget.metric or 0.0)
        line = f"Metric: {budget.metric:.4g}, dense {budget.dense_metric:.4g}: it falls by {loss:.3g}"
        line += f", of {budget.limit:.3g} allowed."
        if budget.shared:
            line += " The same data chose the layers: on other data the loss is larger."
    else:
        columns = ["layers", "added", "compute that can run sparse", "drift", "at most (95 %)"]
        by, line = f"{budget.samples} samples that no layer was solved on", ""
    if budget.looks > 1:
        line = f"{line} {budget.looks} sets were measured on the held-out samples: the first ones exceeded the limit."
        if budget.kind == "drift":
            line += " The bound below is corrected for that."
    table = make_table(f"The front, by {by}", columns, rows, right=",".join(columns[2:]))
    return [table, *([Text(line.strip())] if line else [])]
