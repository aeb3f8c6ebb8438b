"""Find what FP16 cannot hold, by the values that the float32 model takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from repo_manager.errors import ModelError
from repo_manager.onnx_model.draft import Array, Draft
from repo_manager.precision.calibration.ranges import float_values, largest_values
from repo_manager.precision.passes.lowering_rules import FP16_MAX

__all__ = ["overflowing_nodes"]

_HEADROOM = 2.0  # between what the samples show and what other inputs may bring


def overflowing_nodes(draft: Draft, samples: Iterable[Mapping[str, Array]], folder: Path) -> dict[str, str]:
    """Return the nodes that make or read a value beyond FP16's range, each with the reason.

    A reader counts, too: left in FP16 it would read the value rounded to infinity.

    Args:
        draft: the float32 model.
        samples: inputs.
        folder: for the temporary model.

    Returns:
        Node name -> reason.
    """
    values = float_values(draft, [name for node in draft.graph.node for name in node.output if name])
    try:
        largest = largest_values(draft, values, samples, folder, optimize=False, finite=False)
    except ModelError:
        return {}
    beyond = {value: size for value, size in largest.items() if size * _HEADROOM > FP16_MAX}
    reasons: dict[str, str] = {}
    for node in draft.graph.node:
        sizes = [beyond[name] for name in (*node.output, *node.input) if name in beyond]
        if sizes:
            reasons[node.name] = f"its values reach {max(sizes):.3g}, and FP16 ends at {FP16_MAX:.0f}"
    return reasons
