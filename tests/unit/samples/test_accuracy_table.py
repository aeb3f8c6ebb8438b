"""The README's accuracy table agrees with the committed results, refusals included."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples/ is not part of an installed package")


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accuracy_table", EXAMPLES / "accuracy_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def results_of(*rows: tuple[int, str, str, int | None]) -> dict[str, Any]:
    keys = ("seed", "variant", "precision", "right")
    measured = [dict(zip(keys, row, strict=True)) for row in rows]
    return {
        "command": "python x.py",
        "measured": "2026-01-01",
        "platform": "Linux",
        "versions": {"torch": "1"},
        "held_out_images": 200,
        "rows": [{**row, "loss": None if row["right"] is None else 0.25} for row in measured],
    }


def test_readme_shows_the_committed_results(table: ModuleType) -> None:
    results = json.loads((EXAMPLES / "results" / "sparse_digits.json").read_text(encoding="utf-8"))
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert table.insert(readme, table.render(results)) == readme, "run: python examples/accuracy_table.py"
    assert len({row["seed"] for row in results["rows"]}) >= 5
    assert len(results["rows"]) == 12 * len({row["seed"] for row in results["rows"]})


def test_cells_hold_mean_spread_and_range(table: ModuleType) -> None:
    text = table.render(results_of((0, "dense", "fp32", 198), (1, "dense", "fp32", 196), (0, "sparse", "fp32", 200)))
    assert "| dense | 98.50 ± 0.71 (98.00 to 99.00) |" in text
    assert "| pruned and retrained | 100.00 (100.00 to 100.00) |" in text
    assert "| dense | 0.2500 ± 0.0000 (0.2500 to 0.2500) |" in text
    assert "- minus dense: FP32 +1.00, FP16 no seed has both, INT8 no seed has both\n" in text


def test_refusals_are_counted_not_averaged_away(table: ModuleType) -> None:
    some = table.render(results_of((0, "pruned", "int8", 190), (1, "pruned", "int8", None)))
    assert "95.00 (95.00 to 95.00); 1 of 2 refused by `convert`" in some
    assert "refused 1 of 2 conversions" in some
    everything = table.render(results_of((0, "pruned", "int8", None)))
    assert "refused by `convert` (1 of 1)" in everything


def test_a_readme_without_markers_is_left_alone(table: ModuleType) -> None:
    with pytest.raises(ValueError, match="expected the markers"):
        table.insert("# nothing", "| table |")
