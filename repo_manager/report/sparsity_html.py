"""A sparsity report as one HTML file: the network as a strip of layers, the table, the result of pruning. No
JavaScript."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from repo_manager.report.page import render_page, render_part
from repo_manager.report.svg import Chart, ChartAxis
from repo_manager.report.tables import format_share, pruning_facts
from repo_manager.sparsity import LayerSparsity, SparsityReport, SparsityVerdict

if TYPE_CHECKING:
    from repo_manager.engine.evidence import LayerEvidence

__all__ = ["sparsity_page", "sparsity_part"]

_STRIP_WIDTH = 1200.0
# Okabe and Ito's palette for colour-blind readers. A letter gives the same information without colour.
_STYLE_OF = {
    SparsityVerdict.VALID: ("valid", "#009e73", "holds 2:4: sparse Tensor Cores can take it"),
    SparsityVerdict.NOT_24: ("dense", "#e69f00", "could be 2:4, and is not"),
    SparsityVerdict.GROUPED: ("grouped", "#cc79a7", "group convolution: never sparse"),
    SparsityVerdict.INDIVISIBLE: ("odd", "#999999", "its size does not divide by 4"),
    SparsityVerdict.DYNAMIC: ("dynamic", "#56b4e9", "its weight is computed at run time"),
    SparsityVerdict.UNSUPPORTED: ("other", "#555555", "the operator cannot run sparse"),
}


@dataclass(frozen=True)
class _Bar:
    x: str
    width: str
    colour: str
    title: str


@dataclass(frozen=True)
class _Key:
    label: str
    colour: str
    meaning: str
    count: int
    macs: int


def sparsity_page(
    report: SparsityReport,
    *,
    title: str,
    evidence: Sequence[LayerEvidence] = (),
    pruned: Mapping[str, Any] | None = None,
) -> str:
    """Return the whole page. Every name from the model is escaped.

    Args:
        report: from `sparsity_report`. A layer of unknown `macs` has no bar.
        title: the model's name or file, put behind `2:4 sparsity of`.
        evidence: of an engine built of it. Empty for none.
        pruned: result of pruning, in the form of a manifest or of JSON. `None`: nothing is known of it.
    """
    return render_page(
        "sparsity.html.j2",
        title=title,
        **_values(report, evidence),
        pruning="" if pruned is None else _pruning_section(pruned),
    )


def sparsity_part(
    report: SparsityReport, *, evidence: Sequence[LayerEvidence] = (), pruned: Mapping[str, Any] | None = None
) -> Markup:
    """Return the sections of the page, as a part of another one. Its arguments are those of `sparsity_page`.

    Args:
        report: from `sparsity_report`. A layer of unknown `macs` has no bar.
        evidence: the engine builder's treatment of each layer. Empty: there is no engine.
        pruned: result of pruning, from the manifest. `None`: unknown.
    """
    section = render_part("sparsity_section.html.j2", **_values(report, evidence))
    return section if pruned is None else section + _pruning_section(pruned)


def _values(report: SparsityReport, evidence: Sequence[LayerEvidence]) -> dict[str, Any]:
    """Return the values for the section's template."""
    return {
        "report": report,
        "totals": report.totals,
        "shapes": "; ".join(f"{name}: {list(shape)}" for name, shape in report.shapes.items()),
        "width": f"{_STRIP_WIDTH:g}",
        "bars": _bars(report),
        "keys": _keys(report),
        "percent": _percent,
        "si": _si,
        "factor": _factor,
        "colour_of": lambda layer: _STYLE_OF[layer.verdict][1],
        "evidence": evidence,
        "timed": any(row.time_sparse_ns is not None or row.time_dense_ns is not None for row in evidence),
        "said": {True: "yes", False: "no", None: "not reported"},
        "time": lambda time_ns: "" if time_ns is None else f"{time_ns / 1e3:.3g} µs",
    }


def _bars(report: SparsityReport) -> list[_Bar]:
    bars: list[_Bar] = []
    done = 0
    for layer in report.layers:
        if not layer.macs:
            continue
        start, end = (_STRIP_WIDTH * macs / report.totals.macs for macs in (done, done + layer.macs))
        done += layer.macs
        text = f"{layer.node} ({layer.op_type}, {_percent(layer.macs, report.totals.macs)}): {layer.reason}"
        bars.append(_Bar(f"{start:.2f}", f"{end - start:.2f}", _STYLE_OF[layer.verdict][1], text))
    return bars


def _keys(report: SparsityReport) -> list[_Key]:
    keys = []
    for verdict, (label, colour, meaning) in _STYLE_OF.items():
        layers: list[LayerSparsity] = [layer for layer in report.layers if layer.verdict is verdict]
        if layers:
            keys.append(_Key(label, colour, meaning, len(layers), sum(layer.macs or 0 for layer in layers)))
    return keys


def _percent(part: int, whole: int) -> str:
    return f"{100.0 * part / whole:.1f} %" if whole else "none"


def _si(number: int) -> str:
    for limit, suffix in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {suffix}"
    return str(number)


def _factor(bound: float | None) -> str:
    return "unknown" if bound is None else f"{bound:.2f}x"


def _pruning_section(pruned: Mapping[str, Any]) -> Markup:
    """Return the section. Every name from the model is escaped.

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
        chart=Markup(_pruning_chart(budget)) if budget else "",
        percent=format_share,
        number=lambda value: "" if value is None else f"{value:.3g}",
    )


def _pruning_chart(budget: Mapping[str, Any]) -> str:
    """Draw the share of the compute against its cost."""
    is_metric = budget["kind"] == "metric"

    def points(*, final: bool) -> list[tuple[float, float, str]]:
        found = []
        for point in budget["front"]:
            value = point["metric"] if is_metric else point["drift"]
            if bool(point["final"]) == final and isinstance(value, int | float):
                text = f"{point['layers']} layers, {format_share(point['macs_share'])} of the compute: {value:.3g}"
                found.append((100 * point["macs_share"], float(value), text))
        return found

    front, final = points(final=False), points(final=True)
    values = [value for _, value, _ in (*front, *final)]
    y = (
        ChartAxis.around("metric", values, zero=False)
        if is_metric
        else ChartAxis.around("drift", [*values, budget["limit"]])
    )
    chart = Chart(
        "Compute able to run sparse against its cost",
        "A point for each measured set of layers, and for those solved one behind the other.",
        ChartAxis.around("share of the compute able to run sparse, %", [0.0, 100.0]),
        y,
    )
    chart.line("each layer solved by itself", [(x, value) for x, value, _ in front], 0).marks(front, 0).marks(final, 1)
    if not is_metric:
        chart.limit(budget["limit"], f"limit {budget['limit']:g}")
    return chart.render()
