"""The end of quickstart as rich renderables."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.load_tables import format_ms
from repo_manager.report.tables import format_bytes, format_share, make_table

__all__ = ["quickstart_view"]

_COLUMNS = [
    *("model", "precision", "2:4 layers", "drift", "held-out accuracy", "size"),
    *("load", "inf/s", "p50 ms", "p99 ms"),
]


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
                f"{max(drift.relative_error for drift in added.conversion.drift):.1e}",
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
    table = make_table("Quickstart", _COLUMNS, rows, right="drift,held-out accuracy,size,inf/s,p50 ms,p99 ms")
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
