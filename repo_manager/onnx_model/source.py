"""From a loaded model to a draft the passes can work on."""

from __future__ import annotations

import onnx
import onnx.inliner

from repo_manager.errors import ModelError
from repo_manager.onnx_model import dtypes, walk
from repo_manager.onnx_model.draft import (
    Array,
    Draft,
    Weight,
    captured_names,
    constant_weight,
    replace_nodes,
    typed_tensor,
    unique_name,
    used_names,
)
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.order import sort_nodes
from repo_manager.onnx_model.weights import set_bytes

__all__ = ["draft_of", "named", "without_unused"]


def draft_of(model: Model) -> Draft:
    """Make a draft: functions inlined, constants collected, nodes named, stale types dropped.

    The model is not changed, and of its weights only small ones and those in bodies are read.

    Raises:
        ModelError: a function that cannot be inlined, an unreadable weight.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.graph_only)
    proto.ClearField("training_info")
    proto.ir_version = max(proto.ir_version, 4)  # IR versions before 4 list every weight as an input
    for graph in walk.graphs_of(proto.graph):
        graph.ClearField("value_info")
    weights = {tensor.name: _weight(model, tensor) for tensor in model.graph_only.graph.initializer}
    proto.graph.ClearField("initializer")
    _restore_cut_tensors(model, proto)
    if proto.functions:
        proto = _inlined(proto, model)
    _drop_listed_weights(proto.graph, weights)
    sort_nodes(proto)  # changes after loading may break the order
    return without_unused(named(Draft(proto, weights)))


def named(draft: Draft) -> Draft:
    """Collect Constant nodes of the main graph as weights, and give every node a name of its own."""
    draft = draft.copy()
    _collect_constants(draft.graph, draft.weights)
    used = draft.names()
    seen: set[str] = set()
    for graph in walk.graphs_of(draft.graph):
        for node in graph.node:
            if not node.name or node.name in seen:
                first = next((name for name in node.output if name), "")
                node.name = unique_name(f"{node.op_type}:{first}", used)
            seen.add(node.name)
    return draft


def without_unused(draft: Draft) -> Draft:
    """Drop nodes without a reader, then weights without one.

    Requires: nodes in topological order. Ensures: every node and weight left has a reader.
    """
    used = {value.name for value in draft.graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(draft.graph.node):
        if not any(name in used for name in node.output if name):
            continue
        kept.append(node)
        used.update(node.input)
        used.update(captured_names(node))
    draft = draft.copy()
    replace_nodes(draft.graph, reversed(kept))
    used = used_names(draft.graph)
    return Draft(draft.proto, {name: weight for name, weight in draft.weights.items() if name in used})


def _weight(model: Model, tensor: onnx.TensorProto) -> Weight:
    where = f"tensor '{tensor.name}'"
    if tensor.data_type == onnx.TensorProto.STRING or dtypes.numpy_dtype(tensor.data_type, where) is None:
        if not model.weights.is_elsewhere(tensor):
            return typed_tensor(tensor)
        whole = onnx.TensorProto()
        whole.CopyFrom(tensor)
        set_bytes(whole, model.weights.raw(tensor))
        return typed_tensor(whole)

    def load() -> Array:
        return model.array(tensor)

    return Weight(tensor.data_type, tuple(tensor.dims), load)


def _restore_cut_tensors(model: Model, proto: onnx.ModelProto) -> None:
    for tensor in walk.tensors_of(proto):
        if model.weights.is_elsewhere(tensor):
            set_bytes(tensor, model.weights.raw(tensor))


def _inlined(proto: onnx.ModelProto, model: Model) -> onnx.ModelProto:
    try:
        inlined: onnx.ModelProto = onnx.inliner.inline_local_functions(proto)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as exc:
        raise ModelError(f"{model.path}: its local functions cannot be inlined: {exc}") from exc
    return inlined


def _drop_listed_weights(graph: onnx.GraphProto, weights: dict[str, Weight]) -> None:
    """IR < 4 lists each initializer as an input, too. Then it could be overridden and is no constant for a builder."""
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)


def _collect_constants(graph: onnx.GraphProto, weights: dict[str, Weight]) -> None:
    kept = []
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        weight = constant_weight(node) if node.output and node.output[0] not in outputs else None
        if weight is None:
            kept.append(node)
        else:
            weights[node.output[0]] = weight
    replace_nodes(graph, kept)
