"""How tables fit the terminal: a number is never folded, and columns are left out before words become slivers."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from repo_manager.report.console import plain_text
from repo_manager.report.plain import plain
from repo_manager.report.terminal import WIDE

__all__ = ["FittedTable", "LongTable", "Moment", "key_values", "last_deployed", "make_table"]

_GAP = "   "
_NARROW_GAP = "  "
_LONG_ROWS = 1000
# Characters: a text column keeps room for a few words, or for one long word such as an address.
_FEW_WORDS, _LONG_WORD = 18, 28
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


@dataclasses.dataclass(frozen=True)
class Moment:
    """A time: on a terminal how long ago it was, in a file and with `--wide` as it was recorded.

    Attributes:
        at: UTC in ISO 8601, such as `2026-01-31T12:00:00Z`. Any other text is shown as it is.
        before: text in front of the time, with a space at its end: `undeployed, `.
    """

    at: str
    before: str = ""

    def __str__(self) -> str:
        return f"{self.before}{self.at}"

    def ago(self, now: datetime.datetime | None = None) -> str:
        """Return how long ago it was: `3 min ago`. The date after two weeks.

        Args:
            now: the present time, with a time zone. `None` takes the clock.
        """
        now = datetime.datetime.now(datetime.timezone.utc) if now is None else now
        try:
            moment = datetime.datetime.fromisoformat(self.at.replace("Z", "+00:00"))
            seconds = (now - moment).total_seconds()
        except (ValueError, TypeError):  # written by another tool
            return str(self)
        if seconds < 0 or seconds >= 14 * _DAY_S:
            return f"{self.before}{self.at[:10]}"
        if seconds < _MINUTE_S:
            return f"{self.before}just now"
        for limit, unit, name in ((_HOUR_S, _MINUTE_S, "min"), (2 * _DAY_S, _HOUR_S, "h"), (14 * _DAY_S, _DAY_S, "d")):
            if seconds < limit:
                return f"{self.before}{int(seconds // unit)} {name} ago"
        raise AssertionError("unreachable: two weeks are the longest")


def last_deployed(version: int | None, at: str | None) -> str | Moment:
    """Return the last deployment, for a cell.

    Args:
        version: of it. `None`: there was none, or the model was undeployed.
        at: when. `None`: nothing was ever deployed.
    """
    if at is None:
        return "never"
    return Moment(at, "undeployed, " if version is None else f"{version}, ")


def make_table(
    title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]], right: str = "", drop: str = ""
) -> RenderableType:
    """Make a plain table.

    Args:
        title: heading above the table. `None`: no heading.
        columns: headings, left to right. `right` and `drop` name columns by them.
        rows: one value per column. Printed as text, never as markup.
        right: the headings of the columns aligned to the right, separated by commas. They are never folded.
        drop: the headings of the columns a narrow terminal leaves out, separated by commas, the first one first.
    """
    aligned = frozenset(heading.strip() for heading in right.split(",") if heading)
    if len(rows) > _LONG_ROWS:
        long = LongTable(columns, rows, aligned)
        return long if title is None else Group(Text(f"\n{plain(title)}", style="bold"), Text(), long)
    table = FittedTable(columns, rows, aligned, tuple(heading for heading in drop.split(",") if heading))
    # rich would fold a table's own title to the table's width.
    return table if title is None else Group(Text(f"\n{plain(title)}", style="bold"), table)


def key_values(pairs: Sequence[tuple[str, object]]) -> RenderableType:
    """Make a two-column list of names and values."""
    return _Pairs(tuple(pairs))


@dataclasses.dataclass(frozen=True)
class _Pairs:
    pairs: tuple[tuple[str, object], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in self.pairs:
            table.add_row(Text(plain(key)), _cell(value, console, options))
        yield table


@dataclasses.dataclass(frozen=True)
class FittedTable:
    """A table fit for the terminal.

    Columns aligned to the right keep their width. Where the rest does not fit, text is folded between words. Before it
    is folded to less than a few words, the columns of `drop` are left out, and named below the table.

    Attributes:
        columns: headings, left to right. `right` and `drop` name columns by them.
        rows: one value per column, printed as text. A `Moment` on a narrow terminal is shown as its age.
        right: headings of the columns aligned to the right.
        drop: headings of the columns to leave out, the first one first. None without a terminal.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    right: frozenset[str] = frozenset()
    drop: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType | Segment]:
        """Print the table, and the names of the columns left out."""
        rows = [[_cell(cell, console, options) for cell in row] for row in self.rows]
        natural, least = self._widths(rows)
        shown = list(range(len(self.columns)))
        dropped = [heading for heading in self.drop if heading in self.columns] if console.is_terminal else []
        left_out = []
        while dropped and _total([least[at] for at in shown], _NARROW_GAP) > options.max_width:
            left_out.append(dropped.pop(0))
            shown.remove(list(self.columns).index(left_out[-1]))
        fits = _total([natural[at] for at in shown], _GAP) <= options.max_width
        gap = _GAP if fits else _NARROW_GAP
        rigid = [self.columns[at] in self.right for at in shown]
        least = [least[at] for at in shown]
        widths = _fitted([natural[at] for at in shown], least, rigid, options.max_width, gap)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, len(gap) - 2, 0, 1) if fits else (0, 1, 0, 0))
        for at, width in zip(shown, widths, strict=True):
            heading = self.columns[at]
            justify = "right" if heading in self.right else "left"
            table.add_column(heading, justify=justify, overflow="fold", width=width)  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*(row[at] for at in shown))
        # If nothing more can be folded, keep the full width: rich would fold numbers, but a terminal wraps the line.
        yield from console.render(table, options.update(width=max(options.max_width, _total(widths, gap))))
        if left_out:
            yield Text(f"Not shown here: {', '.join(left_out)} (--wide, --json)", style="dim")

    def _widths(self, rows: Sequence[Sequence[Text]]) -> tuple[list[int], list[int]]:
        """Return how wide each column is, and how narrow it may become."""
        natural, least = [], []
        for at, heading in enumerate(self.columns):
            texts = [line for row in rows for line in row[at].plain.split("\n")]
            words = [cell_len(word) for text in (*texts, heading) for word in text.split()]
            widest = max([cell_len(heading), *map(cell_len, texts)])
            whole = max([*(map(cell_len, texts)), *(cell_len(word) for word in heading.split())], default=0)
            natural.append(widest)
            few = max(_FEW_WORDS, min(max(words, default=0), _LONG_WORD))
            least.append(whole if heading in self.right else min(widest, few))
        return natural, least


def _total(widths: Sequence[int], gap: str) -> int:
    return sum(widths) + len(gap) * max(0, len(widths) - 1) + 2


def _fitted(natural: Sequence[int], least: Sequence[int], rigid: Sequence[bool], width: int, gap: str) -> list[int]:
    """Narrow the widest columns, one after the other, until all fit or none may become narrower.

    Words are folded only where this is not enough. A rigid column stays as it is even then.
    """
    slivers = [low if fixed else min(low, _FEW_WORDS // 2) for low, fixed in zip(least, rigid, strict=True)]
    widths = list(natural)
    for lowest in (least, slivers):
        while _total(widths, gap) > width:
            spare = [(now, at) for at, now in enumerate(widths) if now > lowest[at]]
            if not spare:
                break
            widths[max(spare)[1]] -= 1
    return widths


def _cell(value: object, console: Console, options: ConsoleOptions) -> Text:
    if isinstance(value, Text):
        return plain_text(value)
    if isinstance(value, Moment) and console.is_terminal and options.max_width < WIDE:
        return Text(plain(value.ago()))
    return Text(plain(str(value)))


# Tables of thousands of rows. rich measures and wraps each cell, and this takes seconds. Here cells are only padded.


@dataclasses.dataclass(frozen=True)
class LongTable:
    """A table with a line for each row, however long. It prints like `FittedTable`, without colours.

    Attributes:
        columns: headings, left to right. `right` names columns by them.
        rows: one value per column, printed as text. Line breaks become spaces.
        right: headings of the columns aligned to the right.
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
