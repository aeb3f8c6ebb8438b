"""Tables of thousands of rows: rich measures and wraps each cell, which takes seconds; these are only padded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.segment import Segment

from repo_manager.report.plain import plain

__all__ = ["LongTable"]

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
