"""Answers of a served model as rich renderables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.layout import make_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["answer_view", "inference_view"]

_WIDEST = 400


def answer_view(answer: Any) -> list[RenderableType]:
    """Show a `pipeline.inference.Answer`: each output's type, shape and values, and the best labels."""
    rows = [[name, _dtype(array), _shape(array), _values(array)] for name, array in answer.outputs.items()]
    place = f"request {answer.request}, response {answer.response}, after {answer.elapsed_ns / 1e6:.2f} ms"
    views: list[RenderableType] = [make_table(place, ["output", "type", "shape", "values"], rows)]
    for name, samples in answer.labels.items():
        several = len(samples) > 1
        rows = [
            [*([number] if several else []), label.label, label.index, f"{label.value:.6g}"]
            for number, sample in enumerate(samples)
            for label in sample
        ]
        columns = [*(["sample"] if several else []), "label", "index", "value"]
        views.append(make_table(f"{name}: highest values", columns, rows, right="sample,index,value"))
    return views


def inference_view(inference: Any) -> list[RenderableType]:
    """Sum a `pipeline.inference.Inference` up in a line or two."""
    version = "" if inference.version is None else f":{inference.version}"
    count, came = inference.requests, len(inference.answers)
    plural = "" if count == 1 else "s"
    text = f"{count} request{plural} ({inference.source}) to {inference.model}{version} on {inference.url}, {came} "
    text += f"response{'' if came == 1 else 's'}"
    if inference.sequence is not None:
        text += f", sequence {inference.sequence}"
    views: list[RenderableType] = [Text(text)]
    if inference.comparisons:
        worst = max(inference.comparisons, key=lambda each: (not each.passed, each.error))
        text = f"Against the recorded sample: largest relative error {worst.error:.2e} ({worst.output})"
        views.append(Text(text if worst.passed else f"{text}, allowed {worst.tolerance:.2e}"))
    return views


def _dtype(array: NDArray[Any]) -> str:
    return "bytes" if array.dtype.kind == "O" else str(array.dtype)


def _shape(array: NDArray[Any]) -> str:
    return "x".join(map(str, array.shape)) or "scalar"


def _values(array: NDArray[Any]) -> str:
    """Return the values in one line, the middle of a large array left out."""
    if array.dtype.kind == "O":
        items = [
            item.decode(errors="backslashreplace") if isinstance(item, bytes) else str(item) for item in array.flat
        ]
        shown = items if len(items) <= 10 else [*items[:5], "...", *items[-2:]]
        text = ", ".join(shown)
    else:
        text = " ".join(np.array2string(array, precision=5, threshold=20, edgeitems=3).split())
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST]}..."
