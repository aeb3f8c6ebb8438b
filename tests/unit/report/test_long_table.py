"""Long tables: as the short ones read, in a fraction of the time."""

from __future__ import annotations

import dataclasses
import io
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from support import onnx_models

from repo_manager.onnx_model.model import load_model
from repo_manager.report.layout import make_table
from repo_manager.report.prune_tables import prune_view
from repo_manager.report.tables import sparsity_view
from repo_manager.sparsity.prune_report import PruneReport, SkippedLayer
from repo_manager.sparsity.report import sparsity_report
from repo_manager.types import Digest, as_json


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


def test_layers_left_alone_for_one_reason_take_one_row() -> None:
    skipped = [SkippedLayer(f"Conv@{n}", f"w{n}", f"group convolution ({n} groups): never sparse") for n in range(40)]
    skipped += [SkippedLayer("fc", "v", "reduction size 3 not divisible by 4")]
    stream = io.StringIO()
    Console(file=stream, width=140).print(*prune_view(PruneReport(Digest("sha256:0"), (), tuple(skipped)), None))
    text = stream.getvalue()
    assert "Conv@0, Conv@1, Conv@2, ...   40 weights   group convolution (N groups): never sparse" in text
    assert "reduction size 3 not divisible by 4" in text
    assert len(text.splitlines()) == 15


def test_hints_that_differ_in_sizes_only_are_one_row(tmp_path: Path) -> None:
    """The shapes of the matrices differ, and all of them are small."""
    report = sparsity_report(load_model(onnx_models.save(onnx_models.mlp(), tmp_path / "m.onnx")))
    assert len({hint for layer in report.layers for hint in layer.hints if hint.startswith("small:")}) > 1
    stream = io.StringIO()
    Console(file=stream, width=160).print(*sparsity_view(report))
    rows = [line.split("  ")[0].strip() for line in stream.getvalue().splitlines() if "small:" in line]
    assert rows == ["small: C, K below 256, seldom faster (TensorRT#3849)"]
