"""The end of quickstart as one HTML file."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from repo_manager.report import load_charts
from repo_manager.report.load_tables import format_ms
from repo_manager.report.page import Figure, environment
from repo_manager.report.tables import format_count, format_share

__all__ = ["quickstart_page"]


def quickstart_page(result: Any) -> str:
    """Return the page of a `pipeline.quickstart.Quickstart`.

    Returns:
        A complete HTML document that refers to nothing outside itself.
    """
    return (
        environment()
        .get_template("quickstart.html.j2")
        .render(
            result=result,
            layers=[_layer(layer) for layer in result.inspection.sparsity.layers],
            totals=result.inspection.sparsity.totals,
            share=format_share,
            count=format_count,
            ms=format_ms,
            models=[(model, _figures(model.load)) for model in result.models],
        )
    )


def _layer(layer: Any) -> dict[str, str]:
    return {
        "node": layer.node,
        "op_type": layer.op_type,
        "shape": "x".join(map(str, layer.shape)),
        "valid": format_share(layer.valid_share) if layer.groups else "-",
        "macs": format_count(layer.macs),
        "reason": layer.reason,
        "verdict": layer.verdict.value,
    }


def _figures(load: Any) -> list[Figure]:
    unit = load_charts.latency_unit(load.points)
    drawn = [
        ("Latency by percentile", load_charts.percentile_curves(load, unit), "Every further nine takes the same room."),
        (
            "Where the mean latency goes",
            load_charts.server_times(load, unit),
            "The server's own mean times; the rest is network, protocol and client.",
        ),
    ]
    return [Figure(title, Markup(svg), caption) for title, svg, caption in drawn if svg is not None]
