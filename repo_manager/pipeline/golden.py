"""The golden sample of a new version, made by running its own ONNX file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repo_manager.onnx_model.session import Session
from repo_manager.repository.golden import Golden
from repo_manager.types import Precision

__all__ = ["GoldenFacts", "golden_sample"]


@dataclasses.dataclass(frozen=True)
class GoldenFacts:
    """The manifest's entry for the golden sample.

    Attributes:
        tolerance: largest allowed `max|served - reference| / max|reference|` of an output.
        unreproducible: outputs with differences between two runs. They are not compared.
        index_limits: integer input -> the rows of the table it picks from: made-up values stay below.
    """

    tolerance: float
    unreproducible: tuple[str, ...]
    index_limits: Mapping[str, int] = dataclasses.field(default_factory=dict)


def golden_sample(
    model: Path,
    inputs: Mapping[str, npt.NDArray[Any]],
    precision: Precision,
    *,
    repeatable: bool = False,
    threads: int | None = None,
) -> tuple[Golden, GoldenFacts]:
    """Run a model and keep its outputs. Twice, keeping the outputs equal in both, unless it is certain to repeat
    itself.

    Args:
        model: the converted ONNX file. ONNX Runtime runs it on this machine.
        inputs: input name -> array, batch axis included.
        precision: precision of the file, which sets the tolerances.
        repeatable: whether every operator is known to give the same numbers each time.
        threads: of ONNX Runtime. `None` leaves it to it.

    Raises:
        ModelError: ONNX Runtime cannot run the model on these inputs.
    """
    session = Session(model, threads=threads)
    first = session.run(inputs)
    second = first if repeatable else session.run(inputs)
    tolerance = precision.facts.tolerance
    same = {name: array for name, array in first.items() if _close(array, second[name], tolerance)}
    unreproducible = tuple(name for name in first if name not in same)
    return Golden(dict(inputs), same), GoldenFacts(tolerance, unreproducible)


def _close(a: npt.NDArray[Any], b: npt.NDArray[Any], tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    scale = float(np.nanmax(np.abs(a), initial=0.0))
    return bool(np.allclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True))
