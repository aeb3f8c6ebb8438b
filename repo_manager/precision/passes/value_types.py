"""Element types and shapes of every value, inferred without touching the weights' values."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from repo_manager.errors import ModelError
from repo_manager.onnx_model import walk
from repo_manager.onnx_model.draft import Draft

__all__ = ["ValueType", "infer_types", "type_table"]

_SMALL_WEIGHT = 1024  # elements: shapes, scales and axes needed by shape inference


@dataclass(frozen=True)
class ValueType:
    """Element type (0: not a tensor, or unknown) and dims (`None`: rank unknown; -1: dynamic)."""

    data_type: int
    shape: tuple[int, ...] | None


def infer_types(draft: Draft) -> onnx.ModelProto:
    """Return a copy of the draft's graph, same node order, with value_info at every depth.

    Large weights are in as graph inputs, so the cost depends on the number of nodes and not on the model's size
    (protobuf's 2 GB limit never applies).

    Raises:
        ModelError: the graph's types contradict each other.
    """
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(draft.proto)
    for name, weight in draft.weights.items():
        if weight.size <= _SMALL_WEIGHT and weight.tensor is None:
            skeleton.graph.initializer.append(onnx.numpy_helper.from_array(weight.load(), name))
        else:
            skeleton.graph.input.append(onnx.helper.make_tensor_value_info(name, weight.data_type, weight.shape))
    try:
        return onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as exc:
        raise ModelError(f"the types of the model's values cannot be inferred: {exc}") from exc


def type_table(graph: onnx.GraphProto, outer: dict[str, ValueType] | None = None) -> dict[str, ValueType]:
    """Return name -> type for a graph of `infer_types`, on top of its enclosing graphs' definitions.

    Args:
        graph: the graph, with its types inferred.
        outer: types of the enclosing graphs. `None`: the main graph.
    """
    table = dict(outer or {})
    for value in (*graph.value_info, *graph.input, *graph.output):
        table[value.name] = _value_type(value)
    for tensor in graph.initializer:
        table[tensor.name] = ValueType(tensor.data_type, tuple(tensor.dims))
    return table


def _value_type(value: onnx.ValueInfoProto) -> ValueType:
    if not value.type.HasField("tensor_type"):
        return ValueType(0, None)
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return ValueType(tensor.elem_type, None)
    dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    return ValueType(tensor.elem_type, dims)


def has_bodies(graph: onnx.GraphProto) -> bool:
    """Return whether any node of the graph holds a body (If, Loop, Scan, ...)."""
    return any(True for node in graph.node for _ in walk.node_graphs(node))
