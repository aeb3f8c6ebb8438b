"""Render `results/sparse_digits.json` as the accuracy table of `README.md`, between its two markers.

python examples/accuracy_table.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sparse_digits.json"
README = HERE / "README.md"
BEGIN, END = "<!-- accuracy table: begin -->", "<!-- accuracy table: end -->"

VARIANTS = {
    "dense": "dense",
    "pruned": "pruned, not retrained",
    "sparse": "pruned and retrained",
}
PRECISIONS = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}


def render(results: Mapping[str, Any]) -> str:
    """Return the table and the lines under it, as Markdown.

    Args:
        results: what `evaluate_sparse_digits.py` wrote: `rows` of seed, variant, precision, `right` (held-out images
            classified right, `None` when `convert` refused the model) and more about how they were measured.
    """
    lines = [
        "| Held-out accuracy, % | " + " | ".join(PRECISIONS.values()) + " |",
        "|---|" + "---|" * len(PRECISIONS),
    ]
    for variant, title in VARIANTS.items():
        cells = [_cell(results, variant, precision) for precision in PRECISIONS]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    seeds = sorted({row["seed"] for row in results["rows"]})
    lines += [
        "",
        f"Mean ± standard deviation (lowest to highest) over {len(seeds)} seeds, each on the same "
        f"{results['held_out_images']} held-out images: one image is {100 / results['held_out_images']:.2f} points.",
        "",
        *(_difference(results, precision) for precision in PRECISIONS),
        "",
        f"Measured {results['measured']} by `{results['command']}` on {results['platform']}, with "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ".",
    ]
    return "\n".join(lines)


def _right(results: Mapping[str, Any], variant: str, precision: str) -> dict[int, int | None]:
    """Return the number of images classified right, by seed."""
    chosen = [row for row in results["rows"] if (row["variant"], row["precision"]) == (variant, precision)]
    return {row["seed"]: row["right"] for row in chosen}


def _cell(results: Mapping[str, Any], variant: str, precision: str) -> str:
    """Return one cell; a refusal by `convert` is said, never averaged away."""
    right = _right(results, variant, precision)
    percent = [100 * count / results["held_out_images"] for count in right.values() if count is not None]
    refused = len(right) - len(percent)
    if not percent:
        return f"refused by `convert` ({refused} of {len(right)})"
    spread = f"{statistics.mean(percent):.2f}{_deviation(percent)} ({min(percent):.2f} to {max(percent):.2f})"
    return spread if not refused else f"{spread}; {refused} of {len(right)} refused by `convert`"


def _deviation(values: Sequence[float]) -> str:
    """Return ` ± s`; nothing for a single value, which has no spread."""
    return f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""


def _difference(results: Mapping[str, Any], precision: str) -> str:
    """Return the paired difference, sparse minus dense of the same seed, as a list item."""
    dense, sparse = _right(results, "dense", precision), _right(results, "sparse", precision)
    points = [
        100 * (sparse[seed] - dense[seed]) / results["held_out_images"]
        for seed in sorted(dense.keys() & sparse.keys())
        if sparse[seed] is not None and dense[seed] is not None
    ]
    if not points:
        return f"- {PRECISIONS[precision]}: no seed has both a dense and a sparse model."
    return (
        f"- {PRECISIONS[precision]}, pruned and retrained minus dense of the same seed: "
        f"{statistics.mean(points):+.2f}{_deviation(points)} points."
    )


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
