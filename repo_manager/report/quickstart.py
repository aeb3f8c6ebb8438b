"""The end of quickstart: on the terminal, and as one HTML file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import RenderableType
from rich.text import Text

from repo_manager.report import load_charts
from repo_manager.report.layout import make_table
from repo_manager.report.load_tables import format_ms
from repo_manager.report.page import Figure, render_page
from repo_manager.report.tables import format_bytes, format_count, format_share

__all__ = ["quickstart_page", "quickstart_view"]


# The result of quickstart as tables.

_COLUMNS = [
    *("model", "precision", "2:4 layers", "drift", "held-out accuracy", "size"),
    *("load", "inf/s", "p50 ms", "p99 ms"),
]
_DROP = "size,2:4 layers,precision,drift,load"


def quickstart_view(result: Any, page: Path) -> list[RenderableType]:
    """Show a `pipeline.quickstart.Quickstart`: a short table, the report's path, the next commands."""
    rows = []
    for model in result.models:
        added = model.added
        for number, point in enumerate(model.load.points):
            first = [
                f"{added.name}:{added.version}",
                added.conversion.precision,
                f"{len(added.sparsity.valid)} of {len(added.sparsity.layers)}",
                f"{added.conversion.worst_drift:.3g}",
                f"{format_share(model.accuracy)} of {model.images}",
                format_bytes(sum(path.stat().st_size for path in added.path.iterdir() if path.suffix == ".onnx")),
            ]
            rows.append(
                [
                    *(first if number == 0 else [""] * len(first)),
                    point.label,
                    f"{point.throughput_per_s:,.0f}",
                    format_ms(point.latency.p50_ns),
                    format_ms(point.latency.p99_ns),
                ]
            )
    table = make_table(
        "Quickstart", _COLUMNS, rows, right="drift,held-out accuracy,size,inf/s,p50 ms,p99 ms", drop=_DROP
    )
    name = result.models[0].added.name
    where = shlex.quote(str(_shown(result.repository)))
    return [
        table,
        *(Text(decision) for decision in result.decisions),
        Text(f"Report: {_shown(page)}"),
        Text("\nNext:"),
        Text(f"  repo-manager show {name} -r {where}"),
        Text(f"  repo-manager deploy {name} -r {where}  # starts a server that stays"),
        Text(f"  repo-manager loadtest {name} -r {where} --concurrency 1:16 --slo 'p99<20ms'"),
        Text(f"  repo-manager serve --stop -r {where}"),
        Text("  repo-manager inspect YOUR_MODEL.onnx --html sparsity.html"),
    ]


def _shown(path: Path) -> Path:
    """Return a path as the user would write it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# The result of quickstart as one HTML file.


def quickstart_page(result: Any) -> str:
    """Return the page of a `pipeline.quickstart.Quickstart`.

    Returns:
        A complete HTML document without references to the outside.
    """
    return render_page(
        "quickstart.html.j2",
        result=result,
        layers=[_layer(layer) for layer in result.inspection.sparsity.layers],
        totals=result.inspection.sparsity.totals,
        share=format_share,
        count=format_count,
        ms=format_ms,
        models=[(model, _figures(model.load)) for model in result.models],
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
