"""What a parser needs of a graph so that its answers can be told apart: names."""

from __future__ import annotations

import onnx

from repo_manager.onnx_model.model import Model, graph_as_stored
from repo_manager.onnx_model.walk import nodes_of

__all__ = ["named_graph"]


def named_graph(model: Model) -> onnx.ModelProto | None:
    """Give every node a name of its own and every unnamed dynamic input dimension another symbol; sort the nodes.

    The builder's log and its errors speak of nodes by name, and TensorRT takes two unnamed
    dimensions for the same one. A node without a name gets its first output's, as in the sparsity report.

    Returns:
        A changed copy that still refers to external files by name; `None` when nothing has to change, so
        that the file itself can be parsed.
    """
    if not model.reordered and not _unnamed_dims(model.graph_only) and not _needs_names(model.graph_only):
        return None
    proto = graph_as_stored(model)
    for name, axis, dim in _unnamed_dims(proto):
        dim.Clear()
        dim.dim_param = f"{name}_axis_{axis}"
    taken = {node.name for node in nodes_of(proto) if node.name}
    seen: set[str] = set()
    for index, node in enumerate(nodes_of(proto)):
        if not node.name or node.name in seen:
            base = node.name or next((name for name in node.output if name), node.op_type)
            node.name = base if base not in taken else f"{base}_{index}"
        taken.add(node.name)
        seen.add(node.name)
    return proto


def _unnamed_dims(proto: onnx.ModelProto) -> list[tuple[str, int, onnx.TensorShapeProto.Dimension]]:
    initialised = {tensor.name for tensor in proto.graph.initializer}
    return [
        (value.name, axis, dim)
        for value in proto.graph.input
        if value.name not in initialised
        for axis, dim in enumerate(value.type.tensor_type.shape.dim)
        if dim.dim_param in ("", "?", "-1", "None") and dim.dim_value <= 0
    ]


def _needs_names(proto: onnx.ModelProto) -> bool:
    names = [node.name for node in nodes_of(proto)]
    return "" in names or len(set(names)) != len(names)
