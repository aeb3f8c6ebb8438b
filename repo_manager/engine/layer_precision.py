"""The precision that each convolution and matrix product was asked to run in, against the one it runs in.

What was asked is read from the graph: Quantize/DequantizeLinear around a node ask for INT8, a float16 weight for
FP16. Activation-only, weight-only and wrong-axis quantisation build without a word and run in float: this check is
what tells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import onnx

from repo_manager.engine.layers import EngineLayer
from repo_manager.onnx_model.walk import node_graphs

__all__ = ["LayerPrecision", "compare_precision", "precision_mismatches"]

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PASS_THROUGH = ("Cast", "Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten")
_FLOATS = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.DOUBLE: "float64",
}
_WIDTH = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclasses.dataclass(frozen=True)
class LayerPrecision:
    """One ONNX node's precision.

    Attributes:
        node: its name.
        op_type: its operator.
        asked: `int8`, `float16`, `bfloat16` or `float32`, from the graph.
        found: the element type that the engine reads its data in; `None` when the node is not listed (folded away,
            or fused beyond recognition).
        engine_layer: the engine's layer that computes it.
        detail: what the mismatch comes from; empty when there is none.
        one_sided: whether only its data or only its weight is quantised.
    """

    node: str
    op_type: str
    asked: str
    found: str | None
    engine_layer: str | None
    detail: str = ""
    one_sided: bool = False

    @property
    def kept(self) -> bool:
        """Whether it runs in what was asked, or in less, as far as the builder tells."""
        return self.found is None or _WIDTH.get(self.found, 0) <= _WIDTH[self.asked]


def compare_precision(proto: onnx.ModelProto, layers: Sequence[EngineLayer]) -> tuple[LayerPrecision, ...]:
    """Compare every weighted node of the graph with the engine's layers.

    Args:
        proto: the graph that was built; weights are not read.
        layers: see `layers_from_log`; empty gives no rows.
    """
    if not layers:
        return ()
    by_node: dict[str, list[EngineLayer]] = {}
    for layer in layers:
        for node in layer.nodes:
            by_node.setdefault(node, []).append(layer)
    return tuple(_compare(ask, by_node) for ask in _asked(proto.graph, {}))


def precision_mismatches(rows: Sequence[LayerPrecision], *, int8_wanted: bool = True) -> tuple[LayerPrecision, ...]:
    """Return the rows that run in a wider type than was asked.

    Args:
        rows: of an engine.
        int8_wanted: whether the conversion was to INT8. If not, a model that came with quantised weights alone
            means to save memory, not to compute in INT8.
    """
    return tuple(row for row in rows if not row.kept and (int8_wanted or not row.one_sided))


@dataclasses.dataclass(frozen=True)
class _Ask:
    node: onnx.NodeProto
    precision: str
    detail: str
    one_sided: bool = False


def _compare(ask: _Ask, by_node: Mapping[str, list[EngineLayer]]) -> LayerPrecision:
    node = ask.node
    found = [layer for layer in by_node.get(node.name, []) if layer.is_matrix_math and layer.inputs]
    if not found:
        return LayerPrecision(node.name, node.op_type, ask.precision, None, None)
    layer = found[0]
    actual = layer.inputs[0] or None
    row = LayerPrecision(node.name, node.op_type, ask.precision, actual, layer.name, one_sided=ask.one_sided)
    return row if row.kept else dataclasses.replace(row, detail=ask.detail or "the builder chose a wider type")


def _asked(graph: onnx.GraphProto, outer: Mapping[str, str]) -> Iterator[_Ask]:
    """Yield what every weighted node asks for; inner graphs see the names of the outer ones."""
    types = {**outer, **_known_types(graph)}
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        for inner in node_graphs(node):
            yield from _asked(inner, types)
        if node.op_type not in _WEIGHTED or node.domain not in ("", "ai.onnx") or len(node.input) < 2:
            continue
        quantised = [_is_dequantised(name, makers) for name in node.input[:2]]
        if any(quantised):
            missing = "" if all(quantised) else f"only its {'weight' if quantised[1] else 'data'} is quantised"
            yield _Ask(node, "int8", missing, one_sided=not all(quantised))
        elif types.get(node.input[1]) in _WIDTH:
            yield _Ask(node, types[node.input[1]], "")


def _known_types(graph: onnx.GraphProto) -> dict[str, str]:
    types = {t.name: _FLOATS[t.data_type] for t in graph.initializer if t.data_type in _FLOATS}
    for value in (*graph.input, *graph.output, *graph.value_info):
        element = value.type.tensor_type.elem_type
        if element in _FLOATS:
            types[value.name] = _FLOATS[element]
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value" and attribute.t.data_type in _FLOATS:
                    types[node.output[0]] = _FLOATS[attribute.t.data_type]
    return types


def _is_dequantised(name: str, makers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a value comes out of DequantizeLinear, shape changes aside."""
    node = makers.get(name)
    while node is not None and node.op_type in _PASS_THROUGH:
        node = makers.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"
