"""Decide on the operators to quantise, and on the values where INT8 numbers are made.

Follows NVIDIA's placement for TensorRT's explicit quantisation (TensorRT developer guide, "Q/DQ Layer-Placement
Recommendations"). The input of each weighted operator is quantised, never the values between it and the activation or
residual addition fused with it. Of a residual addition, only the branch without the fused operator at its end is
quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import onnx
from onnx import TensorProto

from repo_manager.onnx_model import walk
from repo_manager.onnx_model.draft import ONNX_DOMAINS, Draft, Weight, attribute, captured_names

__all__ = ["QuantizationPlan", "QuantizedNode", "plan_quantization"]

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_NO_INT8 = {"Attention", "DeformConv", "Einsum", "GRU", "LSTM", "RNN"}
_FUSED_ACTIVATIONS = {"Relu", "LeakyRelu", "Clip", "PRelu", "HardSwish", "HardSigmoid", "Elu"}
PASS_THROUGH = {  # their results are some of the input's values, so they share its scale
    "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
_TAKES_INT8 = PASS_THROUGH | {"Add", "AveragePool", "Concat", "GlobalAveragePool", "Pad", "Resize"}


@dataclass(frozen=True)
class QuantizedNode:
    """A weighted operator to quantise.

    Attributes:
        name: the node's.
        data_index: number of the input with the activation.
        weight_index: number of the input with the weight.
        channel_axis: axis of the weight's output channels. `None` quantises the weight with one scale.
    """

    name: str
    data_index: int
    weight_index: int
    channel_axis: int | None


@dataclass(frozen=True)
class QuantizationPlan:
    """The values and weights to quantise.

    Attributes:
        nodes: node's name -> its activation and weight.
        values: activations to get a Q/DQ pair, in the order of appearance made.
        readers: value -> names of its readers in INT8.
        kept: weighted operators left in FP32: name -> (operator, reason).
    """

    nodes: dict[str, QuantizedNode]
    values: tuple[str, ...]
    readers: dict[str, frozenset[str]] = field(repr=False)
    kept: dict[str, tuple[str, str]]


def plan_quantization(
    draft: Draft,
    *,
    quantize_outputs: bool,
    keep: Callable[[onnx.NodeProto], str | None],
    left_out: Collection[str] = (),
) -> QuantizationPlan:
    """Plan the quantisation of a draft's main graph.

    Requires: constants and BatchNormalization folded, names on all nodes.

    Args:
        draft: the model as a float32 draft.
        quantize_outputs: also quantise the results of quantised layers, as in `ConvertOptions`.
        keep: says why a node stays in FP32. `None`: it need not.
        left_out: operators and names of nodes the target's builder computes in floating point, Q/DQ or not.
    """
    nodes: dict[str, QuantizedNode] = {}
    kept: dict[str, tuple[str, str]] = {}
    for node in draft.graph.node:
        kept.update(_in_bodies(node))
        if node.op_type in _NO_INT8:
            kept[node.name] = (node.op_type, f"TensorRT has no INT8 form of {node.op_type} with explicit scales")
        if node.op_type not in WEIGHTED or node.domain not in ONNX_DOMAINS:
            continue
        found = keep(node) or _how(draft, node)
        if not isinstance(found, str) and not {node.op_type, node.name}.isdisjoint(left_out):
            found = "the target's builder computes it in floating point, quantised or not"
        if isinstance(found, str):
            kept[node.name] = (node.op_type, found)
        else:
            nodes[node.name] = found
    return _Planner(draft, nodes).plan(quantize_outputs, kept)


def _in_bodies(node: onnx.NodeProto) -> Iterator[tuple[str, tuple[str, str]]]:
    for body in walk.node_graphs(node):
        for graph in walk.graphs_of(body):
            for inner in graph.node:
                if inner.op_type in WEIGHTED or inner.op_type in _NO_INT8:
                    yield inner.name, (inner.op_type, f"inside the body of {node.op_type} '{node.name}'")


def _how(draft: Draft, node: onnx.NodeProto) -> QuantizedNode | str:
    """Say how a weighted operator is quantised, or why it is not."""
    weights = {i: w for i, name in enumerate(node.input[:2]) if (w := draft.weights.get(name)) is not None}
    if not weights:
        return "no constant weight"
    if len(weights) == 2:
        return "no activation: both inputs are constants"
    index, weight = next(iter(weights.items()))
    if weight.data_type != TensorProto.FLOAT:
        return "its weight is not float32"
    if len(weight.shape) < 2:
        return "its weight is a vector"
    if node.op_type != "MatMul" and index != 1:
        return "its weight comes first"
    return QuantizedNode(node.name, 1 - index, index, _channel_axis(node, weight, index))


def _channel_axis(node: onnx.NodeProto, weight: Weight, index: int) -> int | None:
    rank = len(weight.shape)
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if attribute(node, "group", 1) == 1 else None
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    # Stacked matrices: ONNX Runtime's QLinearMatMul rejects their scales when it runs (onnxruntime#15442).
    if rank > 2:
        return None
    return rank - 1 if index == 1 else rank - 2


class _Planner:
    def __init__(self, draft: Draft, nodes: dict[str, QuantizedNode]) -> None:
        self.draft = draft
        self.nodes = nodes
        self.order = {node.name: place for place, node in enumerate(draft.graph.node)}
        self.producer = {name: node for node in draft.graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in draft.graph.node:
            for name in (*node.input, *captured_names(node)):
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in draft.graph.output}

    def plan(self, quantize_outputs: bool, kept: dict[str, tuple[str, str]]) -> QuantizationPlan:
        chosen: dict[str, set[str]] = {}
        fused: dict[str, str] = {}  # addition -> the branch fused into it
        for node in self.draft.graph.node:
            how = self.nodes.get(node.name)
            if how is not None:
                chosen.setdefault(node.input[how.data_index], set()).add(node.name)
                self._follow(node, fused)
        for addition, branch in fused.items():
            for name in self.draft.graph.node[self.order[addition]].input:
                if name != branch:
                    chosen.setdefault(name, set()).add(addition)
        if quantize_outputs:
            for name, node_names in self._results(fused):
                chosen.setdefault(name, set()).update(node_names)
        for name in list(chosen):  # a quantised value: every reader that takes INT8 reads it in INT8
            chosen[name].update(
                node.name
                for node in self.readers.get(name, [])
                if node.op_type in _TAKES_INT8 and fused.get(node.name) != name
            )
        place = {name: self.order[node.name] for name, node in self.producer.items()}
        values = sorted(chosen, key=lambda name: place.get(name, -1))
        return QuantizationPlan(self.nodes, tuple(values), {n: frozenset(chosen[n]) for n in values}, kept)

    def _next(self, name: str) -> onnx.NodeProto | None:
        found = self.readers.get(name, [])
        return found[0] if len(found) == 1 and name not in self.outputs else None

    def _follow(self, node: onnx.NodeProto, fused: dict[str, str]) -> str:
        """Return the value at the end of a node's fusion. Note the additions on the way."""
        name = str(node.output[0])
        while (reader := self._next(name)) is not None and reader.domain in ONNX_DOMAINS:
            if reader.op_type == "Add" and self._is_residual(reader, name):
                if fused.setdefault(reader.name, name) != name:
                    break
            elif reader.op_type not in _FUSED_ACTIVATIONS:
                break
            name = reader.output[0]
        return name

    def _is_residual(self, addition: onnx.NodeProto, branch: str) -> bool:
        """Return whether an Add joins two activations and `branch` is made last, so it can fuse."""
        others = [name for name in addition.input if name != branch]
        if len(others) != 1 or others[0] in self.draft.weights:
            return False
        other = self.producer.get(others[0])
        return other is None or self.order[other.name] < self.order[self.producer[branch].name]

    def _results(self, fused: dict[str, str]) -> list[tuple[str, list[str]]]:
        results = []
        for node in self.draft.graph.node:
            if node.name not in self.nodes:
                continue
            name = self._follow(node, dict(fused))
            readers = [
                reader.name
                for reader in self.readers.get(name, [])
                if reader.op_type in _TAKES_INT8 and fused.get(reader.name) != name
            ]
            if readers and name not in self.outputs and self._reaches_quantized(name):
                results.append((name, readers))
        return results

    def _reaches_quantized(self, name: str) -> bool:
        """Return whether a value feeds a quantised operator through INT8 ones: heads keep full precision."""
        stack, seen = [name], {name}
        while stack:
            for reader in self.readers.get(stack.pop(), []):
                if reader.name in self.nodes:
                    return True
                if reader.op_type in _TAKES_INT8 | _FUSED_ACTIVATIONS:
                    new = [output for output in reader.output if output and output not in seen]
                    seen.update(new)
                    stack.extend(new)
        return False
