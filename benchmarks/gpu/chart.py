"""The headline chart: sparse over dense throughput by batch, one line a model and precision, as SVG."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

__all__ = ["speedup_chart"]

_COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d5a97", "#edae49", "#00798c", "#6c584c", "#444444")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 760, 420, 60, 60


def speedup_chart(cells: Mapping[str, Any], title: str) -> str:
    """Draw the ratio of every cell, with its interval.

    Args:
        cells: `model/precision/batch` -> cell, as in the JSON file.
        title: shown on top.
    """
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for cell in cells.values():
        ratio = cell["sparse_over_dense"]
        label = f"{cell['model']} {cell['precision']}"
        lines.setdefault(label, []).append((cell["batch"], ratio["ratio"], ratio["low"], ratio["high"]))
    batches = sorted({point[0] for points in lines.values() for point in points})
    top = max([1.1, *(point[3] for points in lines.values() for point in points)])
    bottom = min([0.9, *(point[2] for points in lines.values() for point in points)])

    def x(batch: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - 200) * (batches.index(batch) + 0.5) / len(batches)

    def y(ratio: float) -> float:
        return 40 + (_HEIGHT - 40 - _BOTTOM) * (top - ratio) / (top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="15">{html.escape(title)}</text>',
        f'<line x1="{_LEFT}" x2="{_WIDTH - 200}" y1="{y(1):.1f}" y2="{y(1):.1f}" stroke="#999" stroke-dasharray="4"/>',
        f'<text x="{_LEFT - 8}" y="{y(1) + 4:.1f}" text-anchor="end">1.0</text>',
        f'<text x="{_LEFT - 8}" y="{y(top) + 4:.1f}" text-anchor="end">{top:.2f}</text>',
        f'<text x="{_LEFT - 8}" y="{y(bottom) + 4:.1f}" text-anchor="end">{bottom:.2f}</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 12}">batch; throughput of sparse over dense, 95 % interval</text>',
    ]
    parts += [f'<text x="{x(b):.1f}" y="{_HEIGHT - 34}" text-anchor="middle">{b}</text>' for b in batches]
    for index, (label, points) in enumerate(sorted(lines.items())):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(f"{x(batch):.1f},{y(ratio):.1f}" for batch, ratio, _, _ in sorted(points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<line x1="{x(b):.1f}" x2="{x(b):.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}" stroke="{colour}"/>'
            for b, _, low, high in points
        ]
        parts.append(f'<text x="{_WIDTH - 190}" y="{60 + 18 * index}" fill="{colour}">{html.escape(label)}</text>')
    return "\n".join([*parts, "</svg>", ""])
