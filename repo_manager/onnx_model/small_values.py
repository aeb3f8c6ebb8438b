"""Compute the small integers that shapes are made of (Shape, Gather, Concat, ...), and nothing large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.optional import deferred

if TYPE_CHECKING:
    from onnx import reference
else:
    reference = deferred("onnx.reference")

from repo_manager.optional import deferred

if TYPE_CHECKING:
    import onnx
    from onnx import helper, numpy_helper
else:
    onnx, helper, numpy_helper = deferred("onnx"), deferred("onnx.helper"), deferred("onnx.numpy_helper")

__all__ = ["MAX_ELEMENTS", "evaluate", "shape_value"]

MAX_ELEMENTS = 1024
# Operators whose result is as small as stated by shape inference, and which exporters compute shapes with.
_OPERATORS = frozenset({
    "Abs", "Add", "And", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div",
    "Equal", "Expand", "Flatten", "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity",
    "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not",
    "Or", "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Slice",
    "Split", "Sqrt", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where",
    "Xor",
})  # fmt: skip
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError,
           OverflowError, ArithmeticError, AssertionError)  # fmt: skip


def shape_value(node: onnx.NodeProto, shape: Sequence[int]) -> NDArray[Any]:
    """Return what Shape or Size gives for a tensor of this shape."""
    if node.op_type == "Size":
        return np.array(int(np.prod(np.array(shape, dtype=object), initial=1)) % 2**63, np.int64)
    bounds = {attribute.name: int(attribute.i) for attribute in node.attribute}
    return np.array(shape[bounds.get("start", 0) : bounds.get("end", len(shape))], np.int64)


def evaluate(
    node: onnx.NodeProto, values: Mapping[str, NDArray[Any]], opsets: Sequence[onnx.OperatorSetIdProto]
) -> dict[str, NDArray[Any]]:
    """Return a node's outputs computed from known small inputs; empty when it is not such a node.

    The caller has made sure, by shape inference, that the outputs are small.
    """
    if node.op_type not in _OPERATORS or node.domain not in ("", "ai.onnx"):
        return {}
    names = [name for name in node.input if name]
    if not names or any(name not in values for name in names):
        return {}
    graph = helper.make_graph(
        [node], "one", [], [onnx.ValueInfoProto(name=name) for name in node.output if name],
        [numpy_helper.from_array(values[name], name) for name in dict.fromkeys(names)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=list(opsets))
    try:
        with np.errstate(all="ignore"):
            results = reference.ReferenceEvaluator(model).run(None, {})
    except _ERRORS:
        return {}
    named = zip((name for name in node.output if name), results, strict=False)
    return {
        name: value
        for name, value in named
        if isinstance(value, np.ndarray | np.generic) and value.size <= MAX_ELEMENTS and value.dtype.kind in "iubf"
        for value in [np.asarray(value)]
    }
