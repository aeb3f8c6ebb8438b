"""Compute values of constants alone, so a weight is found where it is used.

It folds operators to move, relabel or join values, or to compute each value separately. The result never grows. A
weight behind Identity, Transpose, Reshape, Cast, Mul, Concat, ... or a ConstantOfShape becomes a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx

from repo_manager.onnx_model import dtypes
from repo_manager.onnx_model.draft import ONNX_DOMAINS, Array, Draft, Weight, attribute, replace_nodes

__all__ = ["fold_constants"]

_MAX_FILLED_ELEMENTS = 1 << 26  # elements of a ConstantOfShape: 256 MB of float32
Fold = Callable[[onnx.NodeProto, list[Weight]], "Weight | None"]


def fold_constants(draft: Draft) -> Draft:
    """Replace relabelling nodes of constants by constants.

    Requires: nodes in topological order. Ensures: same results, bit for bit.
    """
    draft = draft.copy()
    outputs = {value.name for value in draft.graph.output}
    kept = []
    for node in draft.graph.node:
        fold = _FOLDS.get(node.op_type) if node.domain in ONNX_DOMAINS else None
        sources = [draft.weights.get(name) for name in node.input if name]
        folded = None
        if fold is not None and sources and len(node.output) == 1 and node.output[0] not in outputs:
            known = [weight for weight in sources if weight is not None and weight.tensor is None]
            folded = fold(node, known) if len(known) == len(node.input) else None
        if folded is None:
            kept.append(node)
        else:
            draft.weights[node.output[0]] = folded
    replace_nodes(draft.graph, kept)
    return draft


def _moved(weight: Weight, shape: tuple[int, ...], change: Callable[[Array], Array]) -> Weight:
    load = weight.load
    return Weight(weight.data_type, shape, lambda: change(load()))


def _identity(node: onnx.NodeProto, inputs: list[Weight]) -> Weight | None:
    return inputs[0]


def _transpose(node: onnx.NodeProto, inputs: list[Weight]) -> Weight | None:
    rank = len(inputs[0].shape)
    order = list(attribute(node, "perm") or range(rank)[::-1])
    if sorted(order) != list(range(rank)):
        return None
    shape = tuple(inputs[0].shape[axis] for axis in order)
    return _moved(inputs[0], shape, lambda array: array.transpose(order))


def _reshape(node: onnx.NodeProto, inputs: list[Weight]) -> Weight | None:
    if len(inputs) < 2 or attribute(node, "allowzero", 0):
        return None
    asked = [int(size) for size in inputs[1].load().reshape(-1)]
    if any(size == 0 and axis >= len(inputs[0].shape) for axis, size in enumerate(asked)):
        return None
    asked = [inputs[0].shape[axis] if size == 0 else size for axis, size in enumerate(asked)]
    rest = math.prod(size for size in asked if size != -1)
    if asked.count(-1) > 1 or (-1 in asked and (rest == 0 or inputs[0].size % rest)):
        return None
    shape = tuple(inputs[0].size // rest if size == -1 else size for size in asked)
    if math.prod(shape) != inputs[0].size:
        return None
    return _moved(inputs[0], shape, lambda array: array.reshape(shape))


def _axes(node: onnx.NodeProto, inputs: list[Weight]) -> list[int] | None:
    if len(inputs) > 1:
        return [int(axis) for axis in inputs[1].load().reshape(-1)]
    found = attribute(node, "axes")
    return None if found is None else list(found)


def _unsqueeze(node: onnx.NodeProto, inputs: list[Weight]) -> Weight | None:
    axes = _axes(node, inputs)
    if axes is None:
        return None
    rank = len(inputs[0].shape) + len(axes)
    places = {axis % rank for axis in axes}
    sizes = iter(inputs[0].shape)
    shape = tuple(1 if axis in places else next(sizes) for axis in range(rank))
    return _moved(inputs[0], shape, lambda array: array.reshape(shape))


def _squeeze(node: onnx.NodeProto, inputs: list[Weight]) -> Weight | None:
    axes = _axes(node, inputs)
    rank = len(inputs[0].shape)
    places = {axis % rank for axis in axes} if axes else {a for a, size in enumerate(inputs[0].shape) if size == 1}
    shape = tuple(size for axis, size in enumerate(inputs[0].shape) if axis not in places)
    return _moved(inputs[0], shape, lambda array: array.reshape(shape))


def _cast(node: onnx.NodeProto, inputs: list[Weight]) -> Weight | None:
    """Only lossless casts: widening of floats and of integers."""
    target = int(attribute(node, "to", 0))
    try:
        old = dtypes.numpy_dtype(inputs[0].data_type, "a constant")
        new = dtypes.numpy_dtype(target, "a constant")
    except Exception:  # noqa: BLE001  # an unknown, newer element type: keep the node
        return None
    if old is None or new is None or not np.can_cast(old, new, "safe"):
        return None
    load = inputs[0].load
    return Weight(target, inputs[0].shape, lambda: load().astype(new))


def _constant_of_shape(node: onnx.NodeProto, inputs: list[Weight]) -> Weight | None:
    shape = tuple(int(size) for size in inputs[0].load().reshape(-1))
    if any(size < 0 for size in shape) or math.prod(shape) > _MAX_FILLED_ELEMENTS:
        return None
    tensor = attribute(node, "value")
    if tensor is None:
        return Weight(onnx.TensorProto.FLOAT, shape, lambda: np.zeros(shape, np.float32))
    value = onnx.numpy_helper.to_array(tensor).reshape(-1)
    return Weight(tensor.data_type, shape, lambda: np.full(shape, value[0], value.dtype))


def _arithmetic(compute: Callable[[Array, Array], Array]) -> Fold:
    """Return the fold of an operator on two float32 constants, one with the result's shape."""

    def fold(node: onnx.NodeProto, inputs: list[Weight]) -> Weight | None:
        if any(weight.data_type != onnx.TensorProto.FLOAT for weight in inputs) or len(inputs) != 2:
            return None
        try:
            shape = np.broadcast_shapes(inputs[0].shape, inputs[1].shape)
        except ValueError:
            return None
        if shape not in (inputs[0].shape, inputs[1].shape):
            return None
        first, second = (weight.load for weight in inputs)
        return Weight(onnx.TensorProto.FLOAT, shape, lambda: _quiet(compute, first(), second()))

    return fold


def _quiet(compute: Callable[[Array, Array], Array], first: Array, second: Array) -> Array:
    with np.errstate(all="ignore"):  # like ONNX Runtime, keep infinities and NaN as results
        return np.asarray(compute(first, second), np.float32)


def _concat(node: onnx.NodeProto, inputs: list[Weight]) -> Weight | None:
    rank, axis = len(inputs[0].shape), int(attribute(node, "axis", 0))
    if not -rank <= axis < rank or any(weight.data_type != inputs[0].data_type for weight in inputs):
        return None
    axis %= rank
    shapes = [weight.shape for weight in inputs]
    if any(shape[:axis] + shape[axis + 1 :] != shapes[0][:axis] + shapes[0][axis + 1 :] for shape in shapes):
        return None
    total = sum(shape[axis] for shape in shapes)
    loads = [weight.load for weight in inputs]
    shape = (*shapes[0][:axis], total, *shapes[0][axis + 1 :])
    return Weight(inputs[0].data_type, shape, lambda: np.concatenate([load() for load in loads], axis))


_FOLDS: dict[str, Fold] = {
    "Add": _arithmetic(np.add),
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _arithmetic(np.divide),
    "Identity": _identity,
    "Mul": _arithmetic(np.multiply),
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Sub": _arithmetic(np.subtract),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
