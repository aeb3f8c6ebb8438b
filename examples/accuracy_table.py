"""Render `results/sparse_digits.json` as the accuracy tables of `README.md`, between its two markers.

python examples/accuracy_table.py
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sparse_digits.json"
README = HERE / "README.md"
COLUMNS = 118
BEGIN, END = "<!-- accuracy table: begin -->", "<!-- accuracy table: end -->"

VARIANTS = {
    "dense": "dense",
    "pruned": "pruned, not retrained",
    "sparse": "pruned and retrained",
    "dense_twice": "dense, trained twice (control)",
}
PRECISIONS = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}


def render(results: Mapping[str, Any]) -> str:
    """Return the tables and the lines under them, as Markdown.

    Args:
        results: what `evaluate_sparse_digits.py` wrote: `rows` of seed, variant, precision, `right` (held-out images
            classified right), `loss` (mean cross-entropy; both `None` when `convert` refused the model), and how they
            were measured.
    """
    images = results["held_out_images"]
    right = _Column("Held-out accuracy, %", "right", 100 / images, 2)
    loss = _Column("Held-out cross-entropy, nats", "loss", 1.0, 4)
    seeds = len({row["seed"] for row in results["rows"]})
    lines = [
        *_table(results, right),
        "",
        *_table(results, loss),
        "",
        *_paragraph(
            f"Mean ± standard deviation (lowest to highest) over {seeds} seeds, each on the same {images} held-out "
            f"images. One image is {right.factor:.2f} points. Cross-entropy also measures how sure an answer is. "
            "Smaller is better."
        ),
        "",
        "Pruned and retrained minus another network of the same seed, accuracy in points:",
        "",
        *(f"- minus {VARIANTS[other]}: {_differences(results, other, right)}" for other in ("dense", "dense_twice")),
        "",
        _refusals(results),
        "",
        *_paragraph(
            f"Measured {results['measured']} on {results['platform']} by `{results['command']}`. Versions: "
            + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
            + "."
        ),
    ]
    return "\n".join(lines)


def _paragraph(text: str) -> list[str]:
    """Return a paragraph as lines of at most 118 columns."""
    return textwrap.wrap(text, COLUMNS, break_long_words=False, break_on_hyphens=False)


@dataclass(frozen=True)
class _Column:
    """A measured field: its heading, its key in a row, the conversion to the shown unit, and its decimals."""

    title: str
    key: str
    factor: float
    decimals: int


def _table(results: Mapping[str, Any], column: _Column) -> list[str]:
    """Return one table: networks down, precisions across."""
    lines = [f"| {column.title} | " + " | ".join(PRECISIONS.values()) + " |", "|---|" + "---|" * len(PRECISIONS)]
    for variant, title in VARIANTS.items():
        cells = [_cell(_values(results, variant, precision, column), column.decimals) for precision in PRECISIONS]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def _values(results: Mapping[str, Any], variant: str, precision: str, column: _Column) -> dict[int, float | None]:
    """Return a field in its shown unit, by seed."""
    chosen = [row for row in results["rows"] if (row["variant"], row["precision"]) == (variant, precision)]
    return {row["seed"]: None if row[column.key] is None else column.factor * row[column.key] for row in chosen}


def _cell(values: Mapping[int, float | None], decimals: int) -> str:
    """Return one cell; a refusal by `convert` is said, never averaged away."""
    measured = [value for value in values.values() if value is not None]
    refused = len(values) - len(measured)
    if not measured:
        return f"refused by `convert` ({refused} of {len(values)})"
    spread = f"{_mean(measured, decimals)} ({min(measured):.{decimals}f} to {max(measured):.{decimals}f})"
    return spread if not refused else f"{spread}; {refused} of {len(values)} refused by `convert`"


def _mean(values: Sequence[float], decimals: int, sign: str = "") -> str:
    """Return `mean ± standard deviation`; a single value has no spread."""
    mean = f"{statistics.mean(values):{sign}.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else mean


def _differences(results: Mapping[str, Any], other: str, column: _Column) -> str:
    """Return the paired differences, sparse minus `other` of the same seed, one per precision."""
    texts = []
    for precision, title in PRECISIONS.items():
        theirs = _values(results, other, precision, column)
        ours = _values(results, "sparse", precision, column)
        pairs = [(ours[seed], theirs[seed]) for seed in sorted(theirs.keys() & ours.keys())]
        points = [mine - yours for mine, yours in pairs if mine is not None and yours is not None]
        texts.append(f"{title} " + (_mean(points, column.decimals, "+") if points else "no seed has both"))
    return ", ".join(texts)


def _refusals(results: Mapping[str, Any]) -> str:
    """Say how many conversions a gate refused."""
    converted = [row for row in results["rows"] if row["precision"] != "fp32"]
    refused = sum(row["right"] is None for row in converted)
    return f"The gates of `convert` refused {refused} of {len(converted)} conversions."


def insert(readme: str, table: str) -> str:
    """Return the README's text with what lies between the markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{README}: expected the markers {BEGIN} and {END}; put them where the table belongs")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    """Rewrite the README's table from the results."""
    table = render(json.loads(RESULTS.read_text(encoding="utf-8")))
    README.write_text(insert(README.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
