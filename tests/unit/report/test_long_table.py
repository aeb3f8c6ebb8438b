"""Long tables: as the short ones read, in a fraction of the time."""

from __future__ import annotations

import dataclasses
import io
import time
from typing import Any

from rich.console import Console

from repo_manager.report.layout import make_table
from repo_manager.types import as_json


def lines(rows: list[list[object]]) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=140).print(make_table("root", ["name", "size"], rows, right="size"), highlight=False)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_a_long_table_reads_as_a_short_one() -> None:
    rows: list[list[object]] = [[f"model-{number}", number] for number in range(1500)]
    rows[7] = ["模型[red]\x1b", "x"]
    long, short = lines(rows), lines(rows[:900])
    cells = [line.split() for line in short if "─" not in line]
    assert [line.split() for line in long if "─" not in line][: len(cells) - 1] == cells[:-1]
    assert long[-3].endswith(" 1498")
    assert long[6].endswith("    1")
    assert any("模型[red]\\x1b" in line for line in long)


def test_ten_thousand_rows_take_little_time() -> None:
    rows: list[list[object]] = [[f"model-{number}", number] for number in range(10_000)]
    start = time.process_time()
    found = lines(rows)
    assert len(found) > 10_000
    assert time.process_time() - start < 1


def test_the_json_of_a_long_listing_takes_little_time() -> None:
    @dataclasses.dataclass(frozen=True)
    class Entry:
        number: int
        left_out: Any = dataclasses.field(default=None, metadata={"json": False})
        size: int | None = None
        problems: tuple[str, ...] = ()

    entries = [Entry(number) for number in range(100_000)]
    start = time.process_time()
    found = as_json(entries)
    seconds = time.process_time() - start
    assert found[-1] == {"number": 99_999, "size": None, "problems": []}
    assert seconds < 1.2
