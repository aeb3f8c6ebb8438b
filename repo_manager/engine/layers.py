"""The layers of a built engine, as the builder's log or the engine inspector lists them.

Three wordings are read: `Layer(Kind): ...` lines (TensorRT 8), `Name: ..., LayerType: ...` lines (10 and newer,
TensorRT-RTX), and the inspector's JSON (needs a GPU).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx

from repo_manager.errors import ModelError
from repo_manager.onnx_model.walk import node_graphs

__all__ = [
    "EngineLayer",
    "LayerPrecision",
    "compare_precision",
    "layers_from_inspector",
    "layers_from_log",
    "precision_mismatches",
]


_LINE = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)$")
_OLD_LINE = re.compile(
    r"^Layer\((?P<kind>[^)]*)\): (?P<name>.*?), (?:Tactic: (?P<tactic>[^,]*), )?(?P<inputs>.*) -> (?P<outputs>.*)$"
)
_NAMED_TACTIC = re.compile(r"^Tactic Name: (?P<name>\S+) Tactic: (?P<number>0x[0-9a-f]+)")
_OLD_TYPE = re.compile(r"[\[(](\w+)[\[(][-\d:,x ]*[\])]")
_TYPE = re.compile(r"(?:Format/)?Datatype: ([^,}\]]*)")
_WEIGHT_TYPE = re.compile(r'Weights: \{"Type": "(\w+)"')
_TACTIC = re.compile(r"TacticName: ([^,]*)")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f]|$|\[)")
_MATRIX_MATH = ("conv", "correlation", "gemm", "matmul", "matrixmultiply", "fullyconnected", "runtime_fusion")
_DTYPES = (
    ("bfloat16", ("bfloat16", "bf16")),
    ("float16", ("half", "fp16")),
    ("int8", ("int8",)),
    ("float8", ("fp8", "float8")),
    ("int4", ("int4",)),
    ("int64", ("int64",)),
    ("int32", ("int32",)),
    ("bool", ("bool",)),
    ("uint8", ("uint8",)),
    ("float32", ("float", "fp32")),
)


@dataclasses.dataclass(frozen=True)
class EngineLayer:
    """One layer an engine executes.

    Attributes:
        name: the builder's name. Fused layers are joined by ` + `.
        kind: the builder's word for it (`CaskConvolution`, `correlation`, `gemm`, `kgen`, ...).
        nodes: names of the ONNX nodes it computes, wholly or in part.
        inputs: element types of the data inputs, NumPy's names.
        constants: element types of the weights and scales. Empty where the builder does not list them.
        outputs: element types of the outputs.
        tactic: the kernel's name. Empty when the builder does not tell (TensorRT-RTX decides at run time).
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    tactic: str

    @property
    def is_matrix_math(self) -> bool:
        """Whether it is a convolution or matrix product, rather than elementwise work around one."""
        kind = self.kind.lower()
        return any(word in kind for word in _MATRIX_MATH)

    def computes(self, node: str) -> bool:
        """Return whether the layer computes an ONNX node."""
        return node in self.nodes


def layers_from_log(messages: Iterable[str]) -> tuple[EngineLayer, ...]:
    """Read the layer list out of a build's VERBOSE log.

    Args:
        messages: the log's messages in order. The last list counts, since a build may print one per pass.

    Returns:
        The layers. Empty when the log holds no list (plan detail below `detailed`, or log level above VERBOSE).
    """
    found: tuple[EngineLayer, ...] = ()
    kernels: dict[str, str] = {}
    for message in messages:
        if named := _NAMED_TACTIC.match(message):
            kernels[named["number"]] = named["name"]
        if not message.startswith(("Layers:", "Engine Layer Information:")) and "\nLayers:\n" not in message:
            continue
        layers = tuple(layer for line in message.split("\n") if (layer := _from_line(line, kernels)) is not None)
        found = layers or found
    return found


def _from_line(line: str, kernels: Mapping[str, str]) -> EngineLayer | None:
    """Read one layer. TensorRT 8 gives a kernel's number, and its name where it was timed: `kernels`."""
    if match := _LINE.match(line):
        return _from_new(match)
    if match := _OLD_LINE.match(line):
        return EngineLayer(
            name=match["name"],
            kind=match["kind"],
            nodes=_split(match["name"]),
            inputs=tuple(_dtype(text) for text in _OLD_TYPE.findall(match["inputs"])),
            constants=(),
            outputs=tuple(_dtype(text) for text in _OLD_TYPE.findall(match["outputs"])),
            tactic=kernels.get(match["tactic"] or "", _real_tactic(match["tactic"] or "")),
        )
    return None


def _from_new(match: re.Match[str]) -> EngineLayer:
    rest, _, metadata = match["rest"].partition("Metadata: ")
    inputs, _, after = rest.partition("Outputs: [")
    data, _, constants = inputs.partition("Constants: [")
    outputs, _, extra = after.partition("}]")
    tactic = _TACTIC.search(after)
    weights = _WEIGHT_TYPE.findall(extra)
    return EngineLayer(
        name=match["name"],
        kind=match["kind"],
        nodes=tuple(dict.fromkeys(_ONNX_LAYER.findall(metadata))) or _split(match["name"]),
        inputs=tuple(_dtype(text) for text in _TYPE.findall(data)),
        constants=tuple(_dtype(text) for text in [*_TYPE.findall(constants), *weights]),
        outputs=tuple(_dtype(text) for text in _TYPE.findall(outputs)),
        tactic=_real_tactic(tactic[1].strip() if tactic else ""),
    )


def layers_from_inspector(text: str) -> tuple[EngineLayer, ...]:
    """Read `IEngineInspector.get_engine_information(JSON)`.

    Raises:
        ModelError: it is no such JSON, or the plan was built with less than detailed verbosity.
    """
    try:
        entries = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as exc:
        raise ModelError(f"the engine inspector's answer cannot be read: {exc!r}") from exc
    if any(not isinstance(entry, dict) for entry in entries):
        raise ModelError(
            "the engine inspector lists layer names only",
            hint="Build the plan again with --plan-detail detailed.",
        )
    return tuple(_from_json(entry) for entry in entries)


def _from_json(entry: Mapping[str, Any]) -> EngineLayer:
    weights = entry.get("Weights")
    constants = [_tensor_type(item) for item in entry.get("Constants", [])]
    if isinstance(weights, dict) and "Type" in weights:
        constants.append(_dtype(weights["Type"]))
    return EngineLayer(
        name=entry.get("Name", ""),
        kind=entry.get("LayerType", ""),
        nodes=tuple(dict.fromkeys(_ONNX_LAYER.findall(entry.get("Metadata", "")))) or _split(entry.get("Name", "")),
        inputs=tuple(_tensor_type(item) for item in entry.get("Inputs", [])),
        constants=tuple(constants),
        outputs=tuple(_tensor_type(item) for item in entry.get("Outputs", [])),
        tactic=_real_tactic(entry.get("TacticName", "")),
    )


def _tensor_type(item: Mapping[str, Any]) -> str:
    return _dtype(str(item.get("Format/Datatype") or item.get("Datatype") or ""))


def _dtype(text: str) -> str:
    """NumPy's name of the type in `Half` or in `Row major Int8 format`. `""` when it is none known."""
    lowered = text.lower()
    return next((name for name, words in _DTYPES if any(word in lowered for word in words)), "")


def _split(name: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in name.split(" + ") if part.strip())


def _real_tactic(name: str) -> str:
    """Drop TensorRT-RTX's placeholder: its kernels are chosen on the user's GPU, not at build time."""
    return "" if name == "__myelin_CASK_STUB" or _is_number(name) else name


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", text))


# Compare the requested precision of each convolution and matrix product with its precision in the engine.
#
# The graph holds the request: Quantize/DequantizeLinear around a node ask for INT8, a float16 weight for FP16.
# Activation-only, weight-only and wrong-axis quantisation build without a warning and run in float. Only this check
# reports it.

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
        node: name of the ONNX node, from `named_graph` where the model gave it none.
        op_type: operator of the node, such as `Conv`.
        asked: `int8`, `float16`, `bfloat16` or `float32`, from the graph.
        found: the element type the engine reads its data in. `None` when the node is not listed (folded away, or fused
            beyond recognition).
        engine_layer: the engine's layer for it.
        detail: the cause of the mismatch. Empty when there is none.
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
        """Whether it runs in the type asked for, or a smaller one, as far as the builder tells."""
        return self.found is None or _WIDTH.get(self.found, 0) <= _WIDTH[self.asked]


def compare_precision(proto: onnx.ModelProto, layers: Sequence[EngineLayer]) -> tuple[LayerPrecision, ...]:
    """Compare every weighted node of the graph with the engine's layers.

    Args:
        proto: the graph built. Weights are not read.
        layers: see `layers_from_log`. Empty gives no rows.
    """
    if not layers:
        return ()
    by_node: dict[str, list[EngineLayer]] = {}
    for layer in layers:
        for node in layer.nodes:
            by_node.setdefault(node, []).append(layer)
    return tuple(_compare(ask, by_node) for ask in _asked(proto.graph, {}))


def precision_mismatches(rows: Sequence[LayerPrecision], *, int8_wanted: bool = True) -> tuple[LayerPrecision, ...]:
    """Return the rows run in a wider type than asked.

    Args:
        rows: precision of each layer of an engine.
        int8_wanted: whether the conversion was to INT8. If not, a model given with quantised weights alone means to
            save memory, not to compute in INT8.
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
    """Yield the type every weighted node asks for. Inner graphs see the names of the outer ones."""
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
