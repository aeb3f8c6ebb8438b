"""Shapes of every value at given input sizes.

ONNX's own inference runs first. Where it stops, because a shape is computed in the graph, the graph is walked
once more, node by node, with the small integers computed on the way. ONNX's data propagation would do the
same, and fills the machine's memory on a hostile file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]  # published without stubs
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model.dtypes import stored_bits
from repo_manager.onnx_model.signature import resolve_shape, spec_of
from repo_manager.onnx_model.walk import node_graphs
from repo_manager.onnx_model.weights import is_external
from repo_manager.optional import deferred

if TYPE_CHECKING:
    import onnx
    import onnx.defs
    import onnx.shape_inference
    from onnx import helper, numpy_helper, reference
else:
    onnx, helper, numpy_helper = deferred("onnx"), deferred("onnx.helper"), deferred("onnx.numpy_helper")
    reference = deferred("onnx.reference")

__all__ = [
    "MAX_ELEMENTS",
    "evaluate",
    "fix_inputs",
    "infer_at",
    "infer_shapes",
    "largest_value_bytes",
    "shape_value",
    "static_shape",
]


# Compute small integers used in shapes (Shape, Gather, Concat, ...), and nothing large.

MAX_ELEMENTS = 1024
# Operators used by exporters to compute shapes. Shape inference states the size of their results exactly.
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
    """Return the result of Shape or Size for a tensor of this shape."""
    if node.op_type == "Size":
        return np.array(int(np.prod(np.array(shape, dtype=object), initial=1)) % 2**63, np.int64)
    bounds = {attribute.name: int(attribute.i) for attribute in node.attribute}
    return np.array(shape[bounds.get("start", 0) : bounds.get("end", len(shape))], np.int64)


def evaluate(
    node: onnx.NodeProto, values: Mapping[str, NDArray[Any]], opsets: Sequence[onnx.OperatorSetIdProto]
) -> dict[str, NDArray[Any]]:
    """Return a node's outputs computed from known small inputs. Empty when it is not such a node.

    The caller has proven the outputs small, by shape inference.

    Args:
        node: node to compute. An operator outside `_OPERATORS` gives an empty result.
        values: name -> value of the known inputs.
        opsets: operator sets of the model.
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


_MAX_NODES = 50_000  # nodes visited one by one; a larger graph keeps the results of the first pass
_MAX_DEPTH = 20


@functools.cache
def _errors() -> tuple[type[BaseException], ...]:
    """Return the exceptions of inference on a broken graph."""
    return (
        onnx.shape_inference.InferenceError,
        onnx.checker.ValidationError,
        onnx.defs.SchemaError,
        RuntimeError,
        ValueError,
        TypeError,
        MemoryError,
        DecodeError,
        EncodeError,
    )


def infer_at(proto: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> onnx.ModelProto | None:
    """Return a copy of a model whose graphs state the shapes found, or `None` when inference gives up.

    Args:
        proto: the model. Large weights may be cut out of it.
        shapes: shape per input. A missing input keeps its fixed sizes, its dynamic ones become 1.

    Raises:
        ModelError: a given shape contradicts the input's rank.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    if not fix_inputs(copy, shapes):
        return None
    del copy.graph.value_info[:]
    for output in copy.graph.output:  # declared by symbols; the sizes follow from the inputs
        if output.type.WhichOneof("value") == "tensor_type":
            output.type.tensor_type.ClearField("shape")
    return infer_shapes(copy)


def fix_inputs(proto: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Write fixed shapes into a model's inputs. `False` when an input is too large to be meant.

    Raises:
        ModelError: a given shape contradicts the input's rank.
    """
    held = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name in held or value.type.WhichOneof("value") != "tensor_type":
            continue
        given = shapes.get(value.name)
        if given is None:
            try:
                given = resolve_shape(spec_of(value, value.name), batch=1, default=1)
            except ModelError:
                return False
        shape = value.type.tensor_type.shape
        if value.type.tensor_type.HasField("shape") and len(shape.dim) != len(given):
            raise ModelError(f"input '{value.name}' has {len(shape.dim)} axes; the shape given has {len(given)}")
        del shape.dim[:]
        for size in given:
            shape.dim.add(dim_value=int(size))
        shape.SetInParent()
    return True


def infer_shapes(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """Infer from the shapes a model's inputs state. The result states the findings in `value_info`."""
    try:
        inferred = onnx.shape_inference.infer_shapes(proto)
    except _errors():
        return None
    if sum(1 for _ in inferred.graph.node) <= _MAX_NODES and _has_gaps(inferred.graph):
        _Walk(inferred).graph(inferred.graph, _Known(), 0)
    return inferred


def static_shape(kind: onnx.TypeProto | None) -> tuple[int, ...] | None:
    """Return a tensor type's shape when every size is known, else `None`.

    Args:
        kind: type of the value. `None`: unknown.
    """
    if kind is None or kind.WhichOneof("value") != "tensor_type" or not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    if any(not dim.HasField("dim_value") or dim.dim_value < 0 for dim in dims):
        return None
    return tuple(dim.dim_value for dim in dims)


def _has_gaps(graph: onnx.GraphProto) -> bool:
    stated = {value.name for value in (*graph.value_info, *graph.output, *graph.input) if static_shape(value.type)}
    return any(name and name not in stated for node in graph.node for name in node.output)


@dataclass
class _Known:
    """Types and small values by name, in one graph and those around it."""

    outer: _Known | None = None
    types: dict[str, onnx.TypeProto] = field(default_factory=dict)
    values: dict[str, NDArray[Any]] = field(default_factory=dict)

    def type_of(self, name: str) -> onnx.TypeProto | None:
        scope: _Known | None = self
        while scope is not None:
            if name in scope.types:
                return scope.types[name]
            scope = scope.outer
        return None

    def value_of(self, name: str) -> NDArray[Any] | None:
        scope: _Known | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            if name in scope.types:
                return None
            scope = scope.outer
        return None


class _Walk:
    def __init__(self, proto: onnx.ModelProto) -> None:
        self.opsets = list(proto.opset_import)
        self.ir_version = proto.ir_version
        self.versions = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in proto.opset_import}
        self.nodes = 0

    def graph(self, graph: onnx.GraphProto, known: _Known, depth: int) -> None:
        """Walk one graph in order. Write the findings into its `value_info`."""
        for values in (graph.value_info, graph.output, graph.input):
            for value in values:
                known.types[value.name] = value.type
        for tensor in graph.initializer:
            self.tensor(tensor.name, tensor, known)
        for node in graph.node:
            self.nodes += 1
            if self.nodes > _MAX_NODES:
                return
            self.node(node, known, depth)
        stated = {value.name for value in graph.value_info if static_shape(value.type) is not None}
        outputs = {value.name: value for value in graph.output}
        for node in graph.node:
            for name in node.output:
                kind = known.types.get(name)
                if not name or static_shape(kind) is None:
                    continue
                if name in outputs:
                    outputs[name].type.CopyFrom(kind)
                elif name not in stated:
                    graph.value_info.add(name=name).type.CopyFrom(kind)

    def tensor(self, name: str, tensor: onnx.TensorProto, known: _Known) -> None:
        """Note the type of a constant, and its value when small."""
        known.types[name] = onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
        if tensor.data_type == onnx.TensorProto.STRING or is_external(tensor):
            return
        if math.prod(tensor.dims) <= MAX_ELEMENTS:
            try:
                value = numpy_helper.to_array(tensor)
            except _errors():
                return
            if value.dtype.kind in "iubf":
                known.values[name] = value

    def node(self, node: onnx.NodeProto, known: _Known, depth: int) -> None:
        """Find a node's output types, and its values when they are small."""
        first = static_shape(known.type_of(node.input[0])) if node.input else None
        if node.op_type in ("Shape", "Size") and node.domain in ("", "ai.onnx") and first is not None:
            value = shape_value(node, first)
            known.values[node.output[0]] = value
            known.types[node.output[0]] = onnx.helper.make_tensor_type_proto(onnx.TensorProto.INT64, value.shape)
            return
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            self.tensor(node.output[0], node.attribute[0].t, known)
            return
        for body in node_graphs(node):
            if depth < _MAX_DEPTH:
                self.graph(body, _Known(known), depth + 1)
        known_values = {name: known.value_of(name) for name in node.input if name}
        values = {name: array for name, array in known_values.items() if array is not None}
        if any(static_shape(known.types.get(name)) is None for name in node.output if name):
            self.types(node, known, values)
        sizes = [static_shape(known.types.get(name)) for name in node.output if name]
        if all(size is not None and math.prod(size) <= MAX_ELEMENTS for size in sizes):
            known.values.update(evaluate(node, values, self.opsets))

    def types(self, node: onnx.NodeProto, known: _Known, values: Mapping[str, NDArray[Any]]) -> None:
        """Infer one node's output types from its inputs' types and small values."""
        if node.op_type == "If":
            self.branches(node, known)
            return
        domain = "" if node.domain == "ai.onnx" else node.domain
        types = {name: kind for name in node.input if name and (kind := known.type_of(name)) is not None}
        if len(types) != len({name for name in node.input if name}) or domain not in self.versions:
            return
        try:
            schema = onnx.defs.get_schema(node.op_type, self.versions[domain], domain)
            data = {name: numpy_helper.from_array(value, name) for name, value in values.items()}
            found = onnx.shape_inference.infer_node_outputs(
                schema, node, types, data, None, self.opsets, self.ir_version
            )
        except _errors():
            return
        known.types.update({name: kind for name, kind in found.items() if name})

    def branches(self, node: onnx.NodeProto, known: _Known) -> None:
        """Take an If's output types from the branch taken, or from both when they agree."""
        bodies = list(node_graphs(node))
        condition = known.value_of(node.input[0]) if node.input else None
        if condition is not None and condition.size == 1 and len(bodies) == 2:
            names = {a.name: a.g for a in node.attribute if a.HasField("g")}
            chosen = names.get("then_branch" if bool(condition.reshape(-1)[0]) else "else_branch")
            bodies = bodies if chosen is None else [chosen]
        for index, name in enumerate(node.output):
            kinds = [body.output[index].type if index < len(body.output) else None for body in bodies]
            shapes = {static_shape(kind) for kind in kinds}
            if len(shapes) == 1 and None not in shapes and kinds[0] is not None:
                known.types[name] = kinds[0]


def largest_value_bytes(proto: onnx.ModelProto) -> int:
    """Return the size of the largest value an inferred model states in its main graph."""
    largest = 0
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        shape = static_shape(value.type)
        if shape is not None:
            try:
                bits = stored_bits(value.type.tensor_type.elem_type, "a value")
            except ModelError:
                continue
            largest = max(largest, math.prod(shape) * bits // 8)
    return largest
