"""Follow a node's input back to the constant it comes from, through everything in between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from repo_manager.onnx_model.dtypes import dtype_name, numpy_dtype
from repo_manager.onnx_model.weights import WeightStore
from repo_manager.optional import deferred
from repo_manager.sparsity.scope import Scope, attribute_of
from repo_manager.sparsity.weight import (
    MAX_SMALL_ELEMENTS,
    Cast,
    Dequantize,
    Permute,
    Quantize,
    Reshape,
    SubtractZeroPoint,
    Weight,
    per_axis,
)

if TYPE_CHECKING:
    from onnx import reference
else:
    reference = deferred("onnx.reference")

__all__ = ["FOLDED_OPERATORS", "Resolver", "fold"]


# Evaluate constant expressions of a graph: split LSTM weights, weight normalisation, scaled kernels.

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal", "Pow", "Abs", "Where"})
FOLDED_OPERATORS = _ELEMENTWISE | {"Slice", "Concat", "Gather", "Split", "ReduceSum", "ReduceL2"}
_MAX_ELEMENTS = 1 << 24
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError,
           OverflowError, ArithmeticError, AssertionError, MemoryError)  # fmt: skip


def fold(node: onnx.NodeProto, values: Mapping[str, NDArray[Any]], scope: Scope) -> dict[str, NDArray[Any]]:
    """Return a node's outputs, computed by ONNX's reference implementation.

    Args:
        node: node of one of `FOLDED_OPERATORS`.
        values: input name -> value, for all inputs the node states.
        scope: of the node. A function's attributes are not followed.

    Returns:
        Values by output name. Empty when it cannot be computed, or would be too large.
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
    """Return whether the outputs stay small, before computing them."""
    arrays = [values[name] for name in node.input if name]
    if node.op_type in _ELEMENTWISE:
        try:
            return math.prod(np.broadcast_shapes(*(array.shape for array in arrays))) <= _MAX_ELEMENTS
        except ValueError:
            return False
    if node.op_type == "Gather":
        return len(arrays) == 2 and arrays[0].size * max(1, arrays[1].size) <= _MAX_ELEMENTS * 16
    return True


_MAX_STEPS = 64
_BOUNDS = {
    f"{sign}int{bits}": (0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for sign in ("", "u")
    for bits in (2, 4, 8, 16)
}


class Resolver:
    """Finds the constant behind a name.

    Args:
        store: reads the small constants on the way (shapes, scales, zero points).
    """

    def __init__(self, store: WeightStore) -> None:
        self.store = store
        # (id of the scope, name) -> the scope and its result. The reference keeps the id unique.
        self._found: dict[tuple[int, str], tuple[Scope, Weight | None]] = {}

    def weight(self, name: str, scope: Scope, depth: int = 0) -> Weight | None:
        """Return the constant behind a name, or `None` when it is computed from the model's inputs.

        Args:
            name: name of the value as nodes of `scope` read it. Empty gives `None`.
            scope: names and attributes visible to the node.
            depth: nesting depth of the call. It is bounded.

        Raises:
            ModelError: a tensor on the way cannot be read.
        """
        home = scope.home_of(name) if name and depth < _MAX_STEPS else None
        if home is None:
            return None
        scope, name = home
        key = (id(scope), name)
        if key not in self._found:
            self._found[key] = (scope, self._resolve(name, scope, depth))
        return self._found[key][1]

    def _resolve(self, name: str, scope: Scope, depth: int) -> Weight | None:
        if name in scope.tensors:
            return self._from_tensor(scope.tensors[name], name)
        if name in scope.sparse:
            return self._from_sparse(scope.sparse[name])
        node = scope.producers.get(name)
        if node is None or (node.domain not in ("", "ai.onnx") and not _is_contrib_quantisation(node)):
            return None
        handler = _HANDLERS.get(node.op_type)
        if handler is not None:
            return handler(self, node, scope, depth + 1)
        return self._computed(name, node, scope, depth + 1) if node.op_type in FOLDED_OPERATORS else None

    def _computed(self, name: str, node: onnx.NodeProto, scope: Scope, depth: int) -> Weight | None:
        """Compute a node whose inputs are all constants, as the runtime does when it loads the model."""
        inputs = {used: self.weight(used, scope, depth) for used in node.input if used}
        found = {used: weight for used, weight in inputs.items() if weight is not None}
        if len(found) < len(inputs):
            return None
        if not all(weight.scale_is_known for weight in found.values()):
            return None
        if sum(weight.size for weight in found.values()) > MAX_SMALL_ELEMENTS:
            return None
        values = fold(node, {used: weight.real_values(self.store) for used, weight in found.items()}, scope).get(name)
        if values is None:
            return None
        via = tuple(dict.fromkeys(v for weight in found.values() for v in weight.via))
        return Weight(
            name, None, None, None, values.dtype.name, values.shape, values.shape, (), (*via, node.op_type), values
        )

    def small(self, name: str, scope: Scope, depth: int = 0) -> NDArray[Any] | None:
        """Return a small constant's values, or `None`. As `Resolver.weight`."""
        weight = self.weight(name, scope, depth)
        if weight is None or weight.size > MAX_SMALL_ELEMENTS or weight.dtype == "string":
            return None
        return weight.values(self.store)

    def _from_tensor(self, tensor: onnx.TensorProto, name: str) -> Weight | None:
        shape = tuple(tensor.dims)
        dtype = dtype_name(tensor.data_type, f"tensor '{name}'")
        return None if dtype == "string" else Weight(name, tensor, None, None, dtype, shape, shape)

    def _from_sparse(self, sparse: onnx.SparseTensorProto) -> Weight:
        shape = tuple(sparse.dims)
        dtype = dtype_name(sparse.values.data_type, f"tensor '{sparse.values.name}'")
        return Weight(sparse.values.name, sparse.values, sparse, None, dtype, shape, shape, via=("sparse",))

    def constant(self, node: onnx.NodeProto, scope: Scope, depth: int) -> Weight | None:
        """Constant in each of its forms.

        Args:
            node: the Constant node. One with strings gives `None`.
            scope: names and attributes visible to the node.
            depth: nesting depth of the call. It is bounded.
        """
        name = node.output[0]
        value = attribute_of(node, "value", scope)
        if value is not None:
            return self._from_tensor(value.t, name)
        sparse = attribute_of(node, "sparse_value", scope)
        if sparse is not None:
            return self._from_sparse(sparse.sparse_tensor)
        for key, dtype in (("value_float", np.float32), ("value_int", np.int64)):
            number = attribute_of(node, key, scope)
            if number is not None:
                return _inline(name, np.array(onnx.helper.get_attribute_value(number), dtype))
            numbers = attribute_of(node, key + "s", scope)
            if numbers is not None:
                return _inline(name, np.array(onnx.helper.get_attribute_value(numbers), dtype))
        return None

    def constant_of_shape(self, node: onnx.NodeProto, scope: Scope, depth: int) -> Weight | None:
        """ConstantOfShape: one number repeated. As `Resolver.constant`."""
        dims = self.small(node.input[0], scope, depth)
        if dims is None or dims.ndim != 1 or dims.size > 32 or (dims < 0).any():
            return None
        value = attribute_of(node, "value", scope)
        fill: NDArray[Any] = np.zeros((), np.float32)
        if value is not None:
            if value.t.data_type == onnx.TensorProto.STRING or len(value.t.dims) > 1:
                return None
            array = self.store.array(value.t)
            if array.size != 1:
                return None
            fill = array.reshape(())
        shape = tuple(int(dim) for dim in dims)
        dtype = dtype_name(value.t.data_type, node.output[0]) if value is not None else "float32"
        return Weight(node.output[0], None, None, fill, dtype, shape, shape, via=("ConstantOfShape",))

    def identity(self, node: onnx.NodeProto, scope: Scope, depth: int) -> Weight | None:
        """Identity, and Dropout, without an effect when a model is served. As `Resolver.constant`."""
        weight = self.weight(node.input[0], scope, depth)
        return None if weight is None else weight.then(None, node.op_type)

    def cast(self, node: onnx.NodeProto, scope: Scope, depth: int) -> Weight | None:
        """Cast to a type of NumPy. As `Resolver.constant`."""
        weight = self.weight(node.input[0], scope, depth)
        target = attribute_of(node, "to", scope)
        if weight is None or target is None:
            return None
        dtype = numpy_dtype(target.i, f"Cast '{node.name}'")
        return None if dtype is None else weight.then(Cast(dtype), "Cast")

    def transpose(self, node: onnx.NodeProto, scope: Scope, depth: int) -> Weight | None:
        """Transpose. As `Resolver.constant`."""
        weight = self.weight(node.input[0], scope, depth)
        if weight is None:
            return None
        attribute = attribute_of(node, "perm", scope)
        rank = len(weight.shape)
        order = tuple(reversed(range(rank))) if attribute is None else tuple(attribute.ints)
        if sorted(order) != list(range(rank)):
            return None
        return weight.then(Permute(order), "Transpose", tuple(weight.shape[axis] for axis in order))

    def reshape(self, node: onnx.NodeProto, scope: Scope, depth: int) -> Weight | None:
        """Reshape, Flatten, Squeeze, Unsqueeze: values keep their order. As `Resolver.constant`."""
        weight = self.weight(node.input[0], scope, depth)
        if weight is None:
            return None
        shape = _new_shape(self, node, scope, weight.shape, depth)
        if shape is None or math.prod(shape) != weight.size or min(shape, default=0) < 0:
            return None
        return weight.then(Reshape(weight.shape, shape), node.op_type, shape)

    def dequantize(self, node: onnx.NodeProto, scope: Scope, depth: int) -> Weight | None:
        """DequantizeLinear: zero is the zero point. As `Resolver.constant`."""
        weight = self.weight(node.input[0], scope, depth)
        if weight is None:
            return None
        axis, block = _integer(node, "axis", scope, 1), _integer(node, "block_size", scope, 0)
        zero = self.zero_point_step(weight, node.input[2] if len(node.input) > 2 else "", scope, axis, block)
        if zero is None:
            return None
        scale = self.small(node.input[1], scope, depth)
        spread = None if scale is None else per_axis(scale, weight.shape, axis, block)
        return _bounded(weight.then(Dequantize(zero.zero_point, spread), "DequantizeLinear"))

    def quantize(self, node: onnx.NodeProto, scope: Scope, depth: int) -> Weight | None:
        """QuantizeLinear of a constant: values rounded to the zero point are zero. As `Resolver.constant`."""
        weight = self.weight(node.input[0], scope, depth)
        scale = self.small(node.input[1], scope, depth) if weight is not None else None
        if weight is None or scale is None or not weight.scale_is_known:
            return None
        name = node.input[2] if len(node.input) > 2 else ""
        zero = self.weight(name, scope, depth)
        if name and zero is None:
            return None
        wanted = _integer(node, "output_dtype", scope, 0) or onnx.TensorProto.UINT8
        dtype = dtype_name(wanted, f"QuantizeLinear '{node.name}'") if zero is None else zero.dtype
        bounds = _BOUNDS.get(dtype)
        stored_dtype = numpy_dtype(wanted, node.name) if zero is None else zero.values(self.store).dtype
        zero_values: NDArray[Any] = np.zeros((), np.int64) if zero is None else zero.values(self.store)
        axis, block = _integer(node, "axis", scope, 1), _integer(node, "block_size", scope, 0)
        spread = per_axis(scale, weight.shape, axis, block)
        spread_zero = per_axis(zero_values, weight.shape, axis, block)
        if spread is None or spread_zero is None:
            return None
        if stored_dtype is None:  # smaller than a byte
            if bounds is None:
                return None
            stored_dtype = np.dtype(np.int8 if bounds[0] else np.uint8)
        return _bounded(weight.then(Quantize(spread, spread_zero, bounds, stored_dtype), "QuantizeLinear"))

    def zero_point_step(
        self, weight: Weight, name: str, scope: Scope, axis: int, block: int = 0
    ) -> SubtractZeroPoint | None:
        """Return the step to make a quantised weight's zero point zero, or `None` when it is not constant.

        Args:
            weight: the quantised weight, as its DequantizeLinear or integer operator reads it. Only its shape counts.
            name: of its zero point. Empty is 0.
            scope: names and attributes visible to the node.
            axis: axis of the weight for a zero point of rank 1.
            block: how many values share one zero point along `axis`. 0 when not blocked.
        """
        none = SubtractZeroPoint(np.zeros((), np.int8))
        if not name:
            return none
        zero_point = self.small(name, scope)
        if zero_point is None:
            return None
        if zero_point.dtype.kind not in "iu":  # float8: the standard fixes its zero point at 0
            return none
        spread = per_axis(zero_point, weight.shape, axis, block)
        return None if spread is None else SubtractZeroPoint(spread)


def _is_contrib_quantisation(node: onnx.NodeProto) -> bool:
    """Return whether it is ONNX Runtime's own Q/DQ, with 16-bit and 4-bit types at any opset."""
    return node.domain == "com.microsoft" and node.op_type in ("QuantizeLinear", "DequantizeLinear")


def _bounded(weight: Weight) -> Weight | None:
    """Return the weight, or `None` for one number spread beyond the size limit by parameters of each channel."""
    spread = weight.fill is not None and weight.size > MAX_SMALL_ELEMENTS and weight.single_value() is None
    return None if spread else weight


def _inline(name: str, array: NDArray[Any]) -> Weight:
    tensor = numpy_helper.from_array(array, name)
    return Weight(name, tensor, None, None, array.dtype.name, array.shape, array.shape)


def _integer(node: onnx.NodeProto, name: str, scope: Scope, default: int) -> int:
    attribute = attribute_of(node, name, scope)
    return default if attribute is None else int(attribute.i)


def _axes(resolver: Resolver, node: onnx.NodeProto, scope: Scope, depth: int) -> list[int] | None:
    attribute = attribute_of(node, "axes", scope)
    if attribute is not None:
        return list(attribute.ints)
    if len(node.input) > 1 and node.input[1]:
        values = resolver.small(node.input[1], scope, depth)
        return None if values is None else [int(value) for value in values.reshape(-1)]
    return []


def _new_shape(
    resolver: Resolver, node: onnx.NodeProto, scope: Scope, shape: tuple[int, ...], depth: int
) -> tuple[int, ...] | None:
    """Return the shape after Reshape, Flatten, Squeeze or Unsqueeze, or `None` when it is not constant."""
    if node.op_type == "Flatten":
        axis = _integer(node, "axis", scope, 1)
        axis = axis + len(shape) if axis < 0 else axis
        return (math.prod(shape[:axis]), math.prod(shape[axis:]))
    if node.op_type == "Reshape":
        attribute = attribute_of(node, "shape", scope)  # opset 1
        wanted = None if attribute is None else np.array(attribute.ints)
        if wanted is None and len(node.input) > 1:
            wanted = resolver.small(node.input[1], scope, depth)
        if wanted is None or wanted.ndim != 1 or wanted.size > 32:
            return None
        keep = not _integer(node, "allowzero", scope, 0)
        dims = [shape[i] if dim == 0 and keep and i < len(shape) else int(dim) for i, dim in enumerate(wanted)]
        known = math.prod(dim for dim in dims if dim != -1)
        return tuple(math.prod(shape) // known if dim == -1 and known else dim for dim in dims)
    axes = _axes(resolver, node, scope, depth)
    if axes is None:
        return None
    if node.op_type == "Squeeze":
        drop = {axis % len(shape) for axis in axes} if axes and shape else {i for i, d in enumerate(shape) if d == 1}
        return tuple(dim for i, dim in enumerate(shape) if i not in drop)
    rank = len(shape) + len(axes)
    new = {axis % rank for axis in axes} if rank else set()
    rest = iter(shape)
    return tuple(1 if i in new else next(rest, 1) for i in range(rank))


_HANDLERS = {
    "Constant": Resolver.constant,
    "ConstantOfShape": Resolver.constant_of_shape,
    "Identity": Resolver.identity,
    "Dropout": Resolver.identity,
    "Cast": Resolver.cast,
    "Transpose": Resolver.transpose,
    "Reshape": Resolver.reshape,
    "Flatten": Resolver.reshape,
    "Squeeze": Resolver.reshape,
    "Unsqueeze": Resolver.reshape,
    "DequantizeLinear": Resolver.dequantize,
    "QuantizeLinear": Resolver.quantize,
}
