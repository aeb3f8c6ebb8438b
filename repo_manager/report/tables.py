"""Results on ONNX models as rich renderables. `terminal.py` prints them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.layout import key_values, make_table

if TYPE_CHECKING:
    from repo_manager.precision import Check, Conversion, KeptNode
    from repo_manager.sparsity import LayerSparsity, SparsityReport

__all__ = [
    "calibration_view",
    "conversion_facts",
    "conversion_view",
    "format_bytes",
    "format_count",
    "format_share",
    "inspection_view",
    "pruning_facts",
    "sparsity_view",
]


# Columns of the layers dropped first on a narrow terminal.
_DROP = "axis,groups of 4,zeros,MACs,shape,weight,operator"
_FEW = 3
_OWN_SIZE = re.compile(r"\b([CK]) = \d+")
_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_count(value: float | None) -> str:
    """Format a count with three digits: `1.23 M`.

    Args:
        value: the count. `None`: unknown, shown as `-`.
    """
    if value is None:
        return "-"
    for step, suffix in _STEPS:
        if abs(value) >= step:
            return f"{value / step:.3g} {suffix}"
    return f"{value:g}"


def format_bytes(value: int) -> str:
    """Format a size in binary units: `1.2 MiB`."""
    size = float(value)
    for suffix in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or suffix == "GiB":
            return f"{size:.0f} {suffix}" if suffix == "B" else f"{size:.1f} {suffix}"
        size /= 1024
    raise AssertionError("unreachable: GiB takes everything")


def format_share(value: float | None) -> str:
    """Format a share of one as a percentage. Never rounds up to 100 %.

    Args:
        value: the share, 0 to 1. `None`: unknown.
    """
    if value is None:
        return "-"
    if value < 1 and round(value * 100, 1) == 100.0:
        return "<100 %"
    return f"{value * 100:.1f} %"


def inspection_view(inspection: Any) -> list[RenderableType]:
    """Show a `pipeline.Inspection`."""
    signature = inspection.signature
    facts = key_values(
        [
            ("model", inspection.path),
            ("digest", inspection.digest),
            ("size", format_bytes(inspection.size_bytes)),
            ("opset", f"{signature.opset} (IR version {signature.ir_version})"),
            ("parameters", f"{inspection.parameters:,}"),
            *[("input", spec) for spec in signature.inputs],
            *[("output", spec) for spec in signature.outputs],
            *(pruning_facts(inspection.pruned) if inspection.pruned is not None else []),
        ]
    )
    return [facts, *sparsity_view(inspection.sparsity)]


def sparsity_view(report: SparsityReport) -> list[RenderableType]:
    """Show the 2:4 state of every weight."""
    if not report.layers:
        return [Text("No Conv, Gemm or MatMul weights found.")]
    columns = ["layer", "operator", "weight", "shape", "axis", "groups of 4", "valid", "zeros", "MACs", "verdict"]
    rows = [_layer_row(layer) for layer in report.layers]
    table = make_table("2:4 sparsity", columns, rows, right="axis,groups of 4,valid,zeros,MACs", drop=_DROP)
    return [table, *_hints(report), _totals(report)]


def _hints(report: SparsityReport) -> list[RenderableType]:
    """List each hint once, with the layers it is about. Hints with a difference in a layer's sizes only are one."""
    layers: dict[str, list[str]] = {}
    for layer in report.layers:
        for hint in layer.hints:
            layers.setdefault(_OWN_SIZE.sub(r"\1", hint), []).append(layer.node)
    if not layers:
        return []
    rows = [
        [hint, len(names), ", ".join(names[:_FEW]) + (", ..." if len(names) > _FEW else "")]
        for hint, names in layers.items()
    ]
    return [make_table("Hints (not verdicts)", ["hint", "layers", "which"], rows, right="layers")]


def _totals(report: SparsityReport) -> RenderableType:
    totals = report.totals
    pairs: list[tuple[str, object]] = [
        ("parameters in 2:4 layers", f"{format_count(totals.valid_parameters)} of {format_count(totals.parameters)}"),
        ("compute in 2:4 layers", f"{format_count(totals.valid_macs)} of {format_count(totals.macs)} MACs"),
    ]
    if totals.uncounted_layers:
        pairs.append(("not counted", f"{totals.uncounted_layers} layer(s) of unknown size; give sizes with --shape"))
    if totals.speedup_bound is not None and totals.speedup_bound_if_pruned is not None:
        now, pruned = totals.speedup_bound, totals.speedup_bound_if_pruned
        pairs.append(
            ("speed-up by sparsity", f"{now:.2f}x at most (Amdahl), {pruned:.2f}x if all that could be 2:4 were")
        )
    return key_values(pairs)


def _layer_row(layer: LayerSparsity) -> list[object]:
    style = "green" if layer.verdict.value == "valid" else ""
    return [
        layer.node,
        layer.op_type,
        f"{layer.weight} ({layer.dtype})",
        "x".join(map(str, layer.shape)),
        "-" if layer.axis is None else layer.axis,
        layer.groups or "-",
        format_share(layer.valid_share) if layer.groups else "-",
        format_share(layer.zeros / layer.size) if layer.size else "-",
        format_count(layer.macs),
        Text(layer.reason, style=style),
    ]


def conversion_view(conversion: Conversion) -> list[RenderableType]:
    """Show the checks, the drift of the outputs, and the layers left in higher precision."""
    checks = make_table(
        f"Checks of the {conversion.precision} model",
        ["check", "result", "detail"],
        [[check.name, _result(check), check.detail] for check in conversion.checks],
    )
    views: list[RenderableType] = [checks]
    if conversion.drift:
        views.append(drift_table(conversion.drift, conversion.samples))
    if conversion.kept:
        views.append(_kept_table(conversion.kept))
    return views


def conversion_facts(conversion: Conversion) -> list[tuple[str, object]]:
    """Return the checks in a few lines, for a command about more than the conversion."""
    passed = [check.name for check in conversion.checks if check.passed and not check.is_empty]
    pairs: list[tuple[str, object]] = [("checked", ", ".join(passed))]
    pairs += [(check.name, check.detail) for check in conversion.checks if check.name in ("drift", "accuracy")]
    for check in conversion.checks:
        if check.is_empty and check.name != "drift":
            pairs.append(("no evidence", Text(f"{check.name}: {check.detail}", style="yellow")))
    if conversion.kept:
        reasons = _by_reason(conversion.kept)
        pairs += [("left alone", f"{len(found)} operators: {reason}") for reason, found in reasons.items()]
    return pairs


def _by_reason(kept: Sequence[KeptNode]) -> dict[str, list[KeptNode]]:
    """Group the layers left alone by the reason: a normalisation comes as a dozen operators of one reason."""
    found: dict[str, list[KeptNode]] = {}
    for node in kept:
        found.setdefault(node.reason, []).append(node)
    return found


def _kept_table(kept: Sequence[KeptNode]) -> RenderableType:
    rows = []
    for reason, nodes in _by_reason(kept).items():
        operators = ", ".join(dict.fromkeys(node.op_type for node in nodes))
        names = ", ".join(node.node for node in nodes[:_FEW]) + (", ..." if len(nodes) > _FEW else "")
        rows.append([reason, len(nodes), operators, names])
    columns = ["why", "layers", "operators", "which"]
    return make_table("Left in higher precision", columns, rows, right="layers", drop="which")


def drift_table(drift: Sequence[Any], samples: int) -> RenderableType:
    """Show how far each output moved from the source model's."""
    rows = [
        [
            _drift_label(item),
            "-" if item.cosine is None else f"{item.cosine:.6f}",
            f"{item.worst:.3g}",
            f"{item.max_abs_error:.3g}",
            format_share(item.top1_agreement),
        ]
        for item in drift
    ]
    columns = ["output", "cosine", "relative error", "largest error", "top-1 agreement"]
    title = f"Drift against the source, on {samples} sample(s)"
    return make_table(title, columns, rows, right=",".join(columns[1:]), drop="cosine,top-1 agreement")


def _drift_label(item: Any) -> str:
    if not getattr(item, "is_output", True):
        return f"  {item.output} (what it is chosen from)"
    return f"{item.output} (a selection)" if getattr(item, "judged_by", ()) else str(item.output)


def calibration_view(made: Any) -> list[RenderableType]:
    """Show the contents of calibration data (`MadeCalibration`, of a layer above this one)."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    facts = key_values(
        [
            ("from", made.source),
            ("samples", f"{made.samples} of {made.available}"),
            ("digest", made.digest),
            ("written", made.path),
        ]
    )
    rows = [
        [item.name, item.dtype, "-" if item.shape is None else "x".join(map(str, item.shape)) or "scalar"]
        + [number(value) for value in (item.low, item.high, item.mean)]
        for item in made.inputs
    ]
    columns = ["input", "type", "sample", "smallest", "largest", "mean"]
    return [facts, make_table("Inputs", columns, rows, right="smallest,largest,mean")]


def _result(check: Check) -> Text:
    if check.is_empty and check.passed:
        return Text("no evidence", style="yellow")
    return Text("ok", style="green") if check.passed else Text("FAILED", style="red")


def pruning_facts(pruned: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the cost of pruning, as name and value, from a report in a manifest or in JSON."""
    found = pruned.get("evidence")
    if not found:
        return [("layers pruned", str(len(pruned["pruned"])))]
    drift, by_magnitude = (
        max((item["relative_error"] for item in found[name]), default=0.0) for name in ("drift", "magnitude_drift")
    )
    bound = f", at most {max(uppers.values()):.3g} (95 %)" if (uppers := found.get("drift_upper")) else ""
    budget = found.get("budget")
    facts = [
        ("layers pruned", str(len(pruned["pruned"]))),
        (
            "compute that can run sparse",
            format_share(found["sparse_macs"] / found["macs"]) if found["macs"] else "unknown",
        ),
        ("drift", f"{drift:.3g}{bound} on {found['judged_samples']} {found['judged_on']} samples"),
        ("by magnitude", f"{by_magnitude:.3g}"),
        (
            "solved on",
            f"{found['samples']} samples of {found['data']} ({found['data_digest'][:19]}, seed {found['seed']})",
        ),
    ]
    if permutation := found.get("permutation"):
        kept = f"2:4 keeps {format_share(permutation['kept_after'])}, before {format_share(permutation['kept_before'])}"
        facts.append(("channels permuted", f"{permutation['channels']}; of the magnitude {kept}"))
    if trained := found.get("distillation"):
        facts.append(("distilled", f"epoch {trained['kept_epoch']} of {trained['epochs']} is kept"))
    if budget:
        looks = f"; {budget['looks']} sets measured on the held-out samples" if budget["looks"] > 1 else ""
        facts.append(("budget", f"{budget['kind']} {budget['limit']:g}{looks}"))
        if budget["metric"] is not None:
            shared = ", on the data that chose the layers" if budget.get("shared") else ""
            facts.append(("metric", f"{budget['metric']:.4g}, dense {budget['dense_metric']:.4g}{shared}"))
    return facts
