"""Compute what a graph makes of constants: split LSTM weights, weight normalisation, scaled kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from repo_manager.optional import deferred
from repo_manager.sparsity.scope import Scope

if TYPE_CHECKING:
    from onnx import reference
else:
    reference = deferred("onnx.reference")

__all__ = ["FOLDED_OPERATORS", "fold"]

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal", "Pow", "Abs", "Where"})
FOLDED_OPERATORS = _ELEMENTWISE | {"Slice", "Concat", "Gather", "Split", "ReduceSum", "ReduceL2"}
_MAX_ELEMENTS = 1 << 24
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError,
           OverflowError, ArithmeticError, AssertionError, MemoryError)  # fmt: skip


def fold(node: onnx.NodeProto, values: Mapping[str, NDArray[Any]], scope: Scope) -> dict[str, NDArray[Any]]:
    """Return a node's outputs, computed by ONNX's reference implementation.

    Args:
        node: one of `FOLDED_OPERATORS`.
        values: of all its inputs.
        scope: of the node; a function's attributes are not followed.

    Returns:
        Values by output name; empty when it cannot be computed, or would be too large.
    """
    if any(attribute.ref_attr_name for attribute in node.attribute) or not _is_small(node, values):
        return {}
    outputs = [name for name in node.output if name]
    graph = helper.make_graph(
        [node], "one", [], [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in values.items()],
    )  # fmt: skip
    try:
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", scope.opset)])
        with np.errstate(all="ignore"):
            results = reference.ReferenceEvaluator(model).run(None, {})
    except _ERRORS:
        return {}
    return {
        name: np.asarray(result)
        for name, result in zip(outputs, results, strict=False)
        if isinstance(result, np.ndarray | np.generic)
    }


def _is_small(node: onnx.NodeProto, values: Mapping[str, NDArray[Any]]) -> bool:
    """Say whether the outputs stay small, before computing them."""
    arrays = [values[name] for name in node.input if name]
    if node.op_type in _ELEMENTWISE:
        try:
            return math.prod(np.broadcast_shapes(*(array.shape for array in arrays))) <= _MAX_ELEMENTS
        except ValueError:
            return False
    if node.op_type == "Gather":
        return len(arrays) == 2 and arrays[0].size * max(1, arrays[1].size) <= _MAX_ELEMENTS * 16
    return True
