"""How large an integer input may get where it picks rows of a table: token numbers, categories."""

from __future__ import annotations

import onnx

from repo_manager.onnx_model.model import Model

__all__ = ["index_limits"]

_SAME_VALUES = frozenset({"Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose", "Slice"})


def index_limits(model: Model) -> dict[str, int]:
    """Return, per input that reaches a Gather's indices unchanged, the size of the smallest table it picks from.

    Inputs that are no indices are left out. Only the main graph is looked at.
    """
    graph = model.graph_only.graph
    tables = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    tables |= {
        node.output[0]: tuple(attribute.t.dims)
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.HasField("t")
    }
    origin = {value.name: value.name for value in graph.input if value.name not in tables}
    limits: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in _SAME_VALUES and node.input and node.input[0] in origin:
            origin.update(dict.fromkeys(node.output, origin[node.input[0]]))
        elif node.op_type == "Gather" and len(node.input) == 2 and node.input[1] in origin:
            size = _rows(node, tables.get(node.input[0]))
            if size is not None:
                name = origin[node.input[1]]
                limits[name] = min(size, limits.get(name, size))
    return limits


def _rows(node: onnx.NodeProto, shape: tuple[int, ...] | None) -> int | None:
    axis = next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 0)
    if not shape or not -len(shape) <= axis < len(shape) or shape[axis] < 1:
        return None
    return shape[axis]
