"""A float32 stand-in of a 16-bit graph, with each 16-bit value rounded when written.

ONNX Runtime's CPU computes FP16 graphs in FP32 and removes the Casts in between, so neither rounding nor overflow
shows there, and it has no BF16 kernels at all. The stand-in has the same nodes and weights, computes in float32 (as
tensor cores accumulate), and sends each 16-bit result through Cast -> Identity -> Cast. The Identity keeps ONNX
Runtime, run without optimisations, from cancelling the Casts.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from repo_manager.onnx_model import walk
from repo_manager.onnx_model.draft import ONNX_DOMAINS, Draft, attribute, replace_nodes, unique_name
from repo_manager.precision.passes.value_types import ValueType, infer_types, type_table

__all__ = ["rounded"]


def rounded(draft: Draft, low: int) -> Draft:
    """Return the stand-in of a typed draft, to be run without optimisations.

    Ensures: same names of inputs, outputs and values. Those of type `low` are float32 with rounded numbers.
    """
    typed = infer_types(draft)
    result = draft.copy()
    job = _Job(low, result.names())
    head: list[onnx.NodeProto] = []
    wide = {name: job.name(f"{name}_wide") for name, weight in draft.weights.items() if weight.data_type == low}
    for name, new_name in wide.items():
        head.append(job.cast(name, new_name, TensorProto.FLOAT))
    _graph(job, result.graph, type_table(typed.graph), typed.graph, wide)
    replace_nodes(result.graph, [*head, *result.graph.node])
    return result


class _Job:
    def __init__(self, low: int, names: set[str]) -> None:
        self.low = low
        self.names = names

    def name(self, base: str) -> str:
        return unique_name(base, self.names)

    def cast(self, source: str, result: str, to: int) -> onnx.NodeProto:
        return onnx.helper.make_node("Cast", [source], [result], name=self.name(f"Cast:{result}"), to=to)

    def round_trip(self, source: str, result: str) -> list[onnx.NodeProto]:
        narrow, held = self.name(f"{result}_narrow"), self.name(f"{result}_held")
        return [
            self.cast(source, narrow, self.low),
            onnx.helper.make_node("Identity", [narrow], [held], name=self.name(f"Identity:{held}")),
            self.cast(held, result, TensorProto.FLOAT),
        ]


def _graph(
    job: _Job, graph: onnx.GraphProto, types: dict[str, ValueType], typed: onnx.GraphProto, wide: dict[str, str]
) -> None:
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == job.low:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    wide = dict(wide)
    nodes: list[onnx.NodeProto] = []
    for tensor in graph.initializer:  # initializers of a body; those of the main graph are weights
        if tensor.data_type == job.low:
            wide[tensor.name] = job.name(f"{tensor.name}_wide")
            nodes.append(job.cast(tensor.name, wide[tensor.name], TensorProto.FLOAT))
    for node, twin in zip(graph.node, typed.node, strict=True):
        for body, body_twin in zip(walk.node_graphs(node), walk.node_graphs(twin), strict=True):
            _graph(job, body, type_table(body_twin, types), body_twin, wide)
        for index, name in enumerate(node.input):
            if name in wide:
                node.input[index] = wide[name]
        nodes.extend(_node(job, node, types))
    replace_nodes(graph, nodes)


def _node(job: _Job, node: onnx.NodeProto, types: dict[str, ValueType]) -> list[onnx.NodeProto]:
    """Return the nodes of one."""
    if node.domain in ONNX_DOMAINS and node.op_type == "Cast" and attribute(node, "to") == job.low:
        return job.round_trip(node.input[0], node.output[0])
    if node.domain in ONNX_DOMAINS and node.op_type == "Constant":
        return _constant(job, node)
    result = [node]
    for index, name in enumerate(node.output):
        if name and types.get(name, ValueType(0, None)).data_type == job.low:
            node.output[index] = job.name(f"{name}_unrounded")
            result.extend(job.round_trip(node.output[index], name))
    return result


def _constant(job: _Job, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    tensor = attribute(node, "value")
    if tensor is None or tensor.data_type != job.low:
        return [node]
    narrow = job.name(f"{node.output[0]}_narrow")
    name, node.output[0] = node.output[0], narrow
    return [node, job.cast(narrow, name, TensorProto.FLOAT)]
