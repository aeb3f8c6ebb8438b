"""Results on ONNX models as rich renderables; `terminal.py` prints them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from repo_manager.report.terminal import plain

if TYPE_CHECKING:
    from pathlib import Path

    from repo_manager.precision import Check, Conversion
    from repo_manager.sparsity import LayerSparsity, PruneReport, SparsityReport

__all__ = [
    "LongTable",
    "conversion_view",
    "format_bytes",
    "format_count",
    "format_share",
    "inspection_view",
    "key_values",
    "make_table",
    "prune_view",
    "sparsity_view",
]


# Tables of thousands of rows: rich measures and wraps each cell, which takes seconds; these are only padded.

_GAP = "   "


@dataclasses.dataclass(frozen=True)
class LongTable:
    """A table with a line for each row, however long; it prints like `tables.make_table`'s, without colours.

    Attributes:
        columns: the headings.
        rows: one text per column.
        right: headings of the columns that are aligned to the right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    right: frozenset[str] = frozenset()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """Print the heading, a rule, and the rows."""
        rows = [[" ".join(plain(str(cell)).split("\n")) for cell in row] for row in self.rows]
        widths = [max(map(_width, cells)) for cells in zip(self.columns, *rows, strict=True)]
        rule = "─" if options.encoding.startswith("utf") else "-"
        yield self._line(self.columns, widths)
        yield Segment(" " + rule * (sum(widths) + len(_GAP) * (len(widths) - 1)) + "\n")
        for row in rows:
            yield self._line(row, widths)
        yield Segment("\n")

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> Segment:
        padded = [
            " " * (width - _width(cell)) + cell if heading in self.right else cell + " " * (width - _width(cell))
            for heading, cell, width in zip(self.columns, cells, widths, strict=True)
        ]
        return Segment((" " + _GAP.join(padded)).rstrip() + "\n")


def _width(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)


_LONG_ROWS = 1000
_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_count(value: float | None) -> str:
    """Format a count with three digits: `1.23 M`."""
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
    """Format a share of one as a percentage; never rounds up to 100 %."""
    if value is None:
        return "-"
    if value < 1 and round(value * 100, 1) == 100.0:
        return "<100 %"
    return f"{value * 100:.1f} %"


def make_table(
    title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]], right: str = ""
) -> RenderableType:
    """Make a plain table.

    Args:
        title: stands above it; `None` for none.
        columns: the headings.
        rows: one value per column; printed as text, never as markup.
        right: the headings of the columns that are aligned to the right, separated by commas.
    """
    aligned = {heading.strip() for heading in right.split(",")}
    if len(rows) > _LONG_ROWS:
        long = LongTable(columns, rows, frozenset(aligned))
        return long if title is None else Group(Text(f"\n{plain(title)}", style="bold"), Text(), long)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in columns:
        table.add_column(heading, justify="right" if heading in aligned else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(plain(str(cell))) for cell in row))
    # A title of the table's own would be folded to the table's width.
    return table if title is None else Group(Text(f"\n{plain(title)}", style="bold"), table)


def key_values(pairs: Sequence[tuple[str, object]]) -> Table:
    """Make a two-column list of names and values."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in pairs:
        table.add_row(Text(plain(key)), value if isinstance(value, Text) else Text(plain(str(value))))
    return table


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
        ]
    )
    return [facts, *sparsity_view(inspection.sparsity)]


def sparsity_view(report: SparsityReport) -> list[RenderableType]:
    """Show the 2:4 state of every weight."""
    if not report.layers:
        return [Text("No Conv, Gemm or MatMul weights found.")]
    columns = ["layer", "operator", "weight", "shape", "axis", "groups of 4", "valid", "zeros", "MACs", "verdict"]
    rows = [_layer_row(layer) for layer in report.layers]
    table = make_table("2:4 sparsity", columns, rows, right="axis,groups of 4,valid,zeros,MACs")
    return [table, *_hints(report), _totals(report)]


def _hints(report: SparsityReport) -> list[RenderableType]:
    """List each hint once, with the layers that it is about."""
    layers: dict[str, list[str]] = {}
    for layer in report.layers:
        for hint in layer.hints:
            layers.setdefault(hint, []).append(layer.node)
    if not layers:
        return []
    rows = [
        [hint, len(names), ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")] for hint, names in layers.items()
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
    """Show what was checked, how far the outputs moved, and what was left in higher precision."""
    checks = make_table(
        f"Checks of the {conversion.precision} model",
        ["check", "result", "detail"],
        [[check.name, _result(check), check.detail] for check in conversion.checks],
    )
    views: list[RenderableType] = [checks]
    if conversion.drift:
        views.append(drift_table(conversion.drift, conversion.samples))
    if conversion.kept:
        rows = [[kept.node, kept.op_type, kept.reason] for kept in conversion.kept]
        views.append(make_table("Left in higher precision", ["layer", "operator", "why"], rows))
    return views


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
    return make_table(title, columns, rows, right="cosine,relative error,largest error,top-1 agreement")


def _drift_label(item: Any) -> str:
    if not getattr(item, "is_output", True):
        return f"  {item.output} (what it is chosen from)"
    return f"{item.output} (a selection)" if getattr(item, "judged_by", ()) else str(item.output)


def prune_view(report: PruneReport, output: Path | None) -> list[RenderableType]:
    """Show what pruning took from each layer, and what it left alone."""
    rows = [
        [layer.node, layer.weight, "x".join(map(str, layer.shape)), layer.removed, format_share(layer.lost_magnitude)]
        for layer in report.pruned
    ]
    columns = ["layer", "weight", "shape", "values removed", "magnitude lost"]
    views: list[RenderableType] = [make_table("Pruned to 2:4", columns, rows, right="values removed,magnitude lost")]
    if report.skipped:
        skipped = [[layer.node, layer.weight, layer.reason] for layer in report.skipped]
        views.append(make_table("Left alone", ["layer", "weight", "why"], skipped))
    views.append(Text("Dry run: nothing was written." if output is None else f"Written to {output}"))
    return views


def _result(check: Check) -> Text:
    if check.is_empty and check.passed:
        return Text("no evidence", style="yellow")
    return Text("ok", style="green") if check.passed else Text("FAILED", style="red")
