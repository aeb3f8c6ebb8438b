"""Prove from the graph alone that a model treats the first axis of its inputs as a batch of independent samples.

Every value is either constant or has the samples along its first axis, one by one in their order. An operator that is
known to keep that keeps it; one that is not known, or whose attributes leave a doubt, ends the proof, and the model has
to be tried out. The rules follow ONNX's operator definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
from onnx import helper

from repo_manager.onnx_model.inputs import usual_shapes
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.shape_inference import infer_at

__all__ = ["samples_are_independent"]

_SAMPLES = 3
"""Of the shapes that are inferred: an operator that fixes another number shows up."""

_UNARY = {
    *("Abs", "Cast", "Ceil", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu"),
    *("Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt"),
    *("Tanh", "ThresholdedRelu"),
}
_BINARY = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "PRelu", "And", "Or", "Equal", "Greater", "Less", "Where"),
}
_SPATIAL = {
    *("AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "GlobalAveragePool", "GlobalMaxPool"),
    *("InstanceNormalization", "LRN", "MaxPool", "DepthToSpace", "SpaceToDepth"),
}
_RESHAPING = {"Transpose", "Reshape", "Concat", "Unsqueeze", "Squeeze", "DequantizeLinear", "QuantizeLinear"}


class _Graph:
    """What is known of the values.

    Attributes:
        shapes: value -> its shape with `_SAMPLES` samples.
        samples: values that have the samples along their first axis.
    """

    def __init__(self, model: Model, inferred: onnx.ModelProto) -> None:
        self.model = model
        self.shapes = _shapes_of(inferred.graph)
        graph = model.graph_only.graph
        self.initialisers = {tensor.name: tensor for tensor in graph.initializer}
        self.samples = {value.name for value in graph.input if value.name not in self.initialisers}

    def varies(self, name: str) -> bool:
        return name in self.samples

    def rank(self, name: str) -> int | None:
        shape = self.shapes.get(name)
        return None if shape is None else len(shape)

    def integers(self, name: str) -> tuple[int, ...] | None:
        """Return the values of a small constant, a shape or axes."""
        tensor = self.initialisers.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.INT64:
            return None
        return tuple(int(value) for value in self.model.array(tensor).reshape(-1))


def samples_are_independent(model: Model) -> bool:
    """Say whether the graph proves it; `False` is no proof of the contrary.

    Args:
        model: whose inputs and outputs all have a dynamic first dimension.
    """
    proto = model.graph_only
    shapes = {name: (_SAMPLES, *shape[1:]) for name, shape in usual_shapes(proto).items() if shape}
    inputs = {value.name for value in proto.graph.input} - {tensor.name for tensor in proto.graph.initializer}
    if proto.functions or not inputs or inputs != set(shapes):
        return False
    inferred = infer_at(proto, shapes)
    if inferred is None:
        return False
    graph = _Graph(model, inferred)
    for node in proto.graph.node:
        varying = [name for name in node.input if name and graph.varies(name)]
        if not varying:
            if node.op_type in ("Constant", "ConstantOfShape") or _is_pure(node):
                continue
            return False
        if node.domain not in ("", "ai.onnx") or not _keeps_samples(node, graph):
            return False
        # What inference knows is held against the rule: as many rows as samples.
        if any((graph.shapes.get(name) or (None,))[0] != _SAMPLES for name in node.output if name):
            return False
        graph.samples.update(name for name in node.output if name)
    return all(graph.varies(output.name) for output in proto.graph.output)


def _is_pure(node: onnx.NodeProto) -> bool:
    """Whether a node of constants alone is a constant, too: not so for random numbers, or what is not known."""
    return node.domain in ("", "ai.onnx") and node.op_type in _UNARY | _BINARY | _RESHAPING


def _keeps_samples(node: onnx.NodeProto, graph: _Graph) -> bool:
    if node.op_type in _UNARY:
        return True
    if node.op_type in _BINARY:
        return _aligned(node, graph)
    first, *others = node.input
    if not graph.varies(first) or any(
        graph.varies(name) for name in others if node.op_type not in ("Concat", "MatMul")
    ):
        return False
    if node.op_type in _SPATIAL:
        # BatchNormalization in training mode has more outputs, and statistics over the batch.
        attributes = _attributes(node)
        return len([name for name in node.output if name]) == 1 and not attributes.get("training_mode", 0)
    rule = _RULES.get(node.op_type)
    return rule is not None and rule(node, graph)


def _aligned(node: onnx.NodeProto, graph: _Graph) -> bool:
    """Broadcasting keeps the samples apart when all that vary have one rank, and constants do not reach that axis."""
    ranks = {graph.rank(name) for name in node.input if graph.varies(name)}
    if len(ranks) != 1:
        return False
    (rank,) = ranks
    for name in node.input:
        if not name or graph.varies(name):
            continue
        shape = graph.shapes.get(name)
        if rank is None or shape is None or len(shape) > rank or (len(shape) == rank and shape[0] != 1):
            return False
    return rank is not None and rank > 0


def _no_axis_0(node: onnx.NodeProto, graph: _Graph, axes: tuple[int, ...] | None) -> bool:
    rank = graph.rank(node.input[0])
    return bool(axes) and rank is not None and all((axis + rank if axis < 0 else axis) > 0 for axis in axes or ())


def _gemm(node: onnx.NodeProto, graph: _Graph) -> bool:
    shape = graph.shapes.get(node.input[2]) if len(node.input) > 2 and node.input[2] else ()
    return not _attributes(node).get("transA", 0) and shape is not None and (len(shape) < 2 or shape[0] == 1)


def _matmul(node: onnx.NodeProto, graph: _Graph) -> bool:
    a, b = node.input
    rank_a, rank_b = graph.rank(a), graph.rank(b)
    if rank_a is None or rank_b is None or rank_a < 2:
        return False
    return (rank_a == rank_b and rank_a > 2) if graph.varies(b) else rank_b == 2


def _concat(node: onnx.NodeProto, graph: _Graph) -> bool:
    same = all(graph.varies(name) for name in node.input)
    return same and _no_axis_0(node, graph, (_attributes(node)["axis"],))


def _flatten(node: onnx.NodeProto, _: _Graph) -> bool:
    return bool(_attributes(node).get("axis", 1) == 1)


def _softmax(node: onnx.NodeProto, graph: _Graph) -> bool:
    # Before opset 13 the default is 1 and all axes from there on are joined; from 13 on it is the last one alone.
    axis = _attributes(node).get("axis")
    return (graph.rank(node.input[0]) or 0) > 1 and (axis is None or _no_axis_0(node, graph, (axis,)))


def _reshape(node: onnx.NodeProto, graph: _Graph) -> bool:
    shape = graph.integers(node.input[1])
    return bool(shape) and not _attributes(node).get("allowzero", 0) and shape is not None and shape[0] == 0


def _transpose(node: onnx.NodeProto, _: _Graph) -> bool:
    perm = _attributes(node).get("perm")
    return bool(perm) and perm is not None and perm[0] == 0


def _reduce(node: onnx.NodeProto, graph: _Graph) -> bool:
    axes = _attributes(node).get("axes")
    if axes is None and len(node.input) > 1 and node.input[1]:
        axes = graph.integers(node.input[1])
    return _no_axis_0(node, graph, None if axes is None else tuple(axes))


def _layer_normalization(node: onnx.NodeProto, graph: _Graph) -> bool:
    return _no_axis_0(node, graph, (_attributes(node).get("axis", -1),))


def _quantize(node: onnx.NodeProto, graph: _Graph) -> bool:
    return graph.rank(node.input[1]) == 0


def _dropout(node: onnx.NodeProto, _: _Graph) -> bool:
    return len(node.input) < 3 and len([name for name in node.output if name]) == 1


def _clip(_: onnx.NodeProto, __: _Graph) -> bool:
    return True


_RULES: Mapping[str, Callable[[onnx.NodeProto, _Graph], bool]] = {
    "Clip": _clip,
    "Concat": _concat,
    "DequantizeLinear": _quantize,
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "LayerNormalization": _layer_normalization,
    "LogSoftmax": _softmax,
    "MatMul": _matmul,
    "QuantizeLinear": _quantize,
    "ReduceL2": _reduce,
    "ReduceMax": _reduce,
    "ReduceMean": _reduce,
    "ReduceMin": _reduce,
    "ReduceSum": _reduce,
    "Reshape": _reshape,
    "Softmax": _softmax,
    "Transpose": _transpose,
}


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _shapes_of(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Return the fully known shapes of a graph's values."""
    shapes: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if value.type.WhichOneof("value") == "tensor_type" and tensor.HasField("shape"):
            sizes = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
            if -1 not in sizes:
                shapes[value.name] = sizes
    return shapes
