"""The operators allowed to compute in 16 bits: by ONNX's schemas, and by the needs of their numbers.

The rules come in this order. The first applicable rule gives the reason shown to the user.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from repo_manager.onnx_model import walk
from repo_manager.onnx_model.draft import ONNX_DOMAINS, Draft
from repo_manager.precision.passes.value_types import ValueType

__all__ = ["Roles", "keep_reasons", "roles_of", "statistics_nodes", "to_low"]


# Find the variance in normalisations exported as small operators.
#
# LayerNorm, RMSNorm and similar, exported as x * x -> mean -> + epsilon -> 1 / sqrt, overflow FP16 at |x| > 255 and
# lose a small epsilon. In the form mean(x^2) - mean(x)^2, digits cancel. These few, cheap operators stay in FP32, as
# TensorRT's builder advises in its warning about LayerNorm in FP16 (quoted in pytorch/TensorRT#2730).

_SQUARES = {"ReduceSumSquare", "ReduceL2", "LpNormalization"}
_REDUCTIONS = {"ReduceMean", "ReduceSum", "GlobalAveragePool"}
_ON_THE_WAY = {"Add", "Clip", "Div", "Expand", "Identity", "Max", "Mul", "Reshape", "Squeeze", "Sub", "Unsqueeze"}
_ROOTS = {"Reciprocal", "Sqrt"}
_MOST_STEPS = 10


def statistics_nodes(draft: Draft) -> set[str]:
    """Return the names of the nodes between squares and the root of their mean, and of the values mixed in between.

    Squares whose mean never comes to a root are no normalisation. Of these only square and mean are returned.
    """
    graph = _Graph(draft)
    found: set[str] = set()
    for node in draft.graph.node:
        for mean in graph.means_of_squares(node):
            found.update((node.name, mean.name))
            way = graph.way_to_root(mean)
            found.update(way)
            found.update(graph.mixed_in(way))
    return found


class _Graph:
    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.by_name = {node.name: node for node in draft.graph.node}
        self.producer = {name: node for node in draft.graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in draft.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def means_of_squares(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the reductions of a node's squares. The node itself where it squares and sums."""
        if node.op_type in _SQUARES:
            return [node]
        squares = node.op_type == "Mul" and len(set(node.input)) == 1
        if node.op_type == "Pow" and len(node.input) > 1:
            exponent = self.draft.weights.get(node.input[1])
            squares = exponent is not None and exponent.size == 1 and float(exponent.load().reshape(-1)[0]) == 2.0
        return [r for r in self.readers.get(node.output[0], []) if r.op_type in _REDUCTIONS] if squares else []

    def way_to_root(self, mean: onnx.NodeProto) -> set[str]:
        """Return the nodes from a mean to 1 / sqrt, both ends of the way and its branches included."""
        found: set[str] = set()
        self._reaches_root(mean, 0, found)
        return found

    def _reaches_root(self, node: onnx.NodeProto, steps: int, found: set[str]) -> bool:
        reached = False
        for reader in self.readers.get(node.output[0], []):
            if reader.op_type in _ROOTS:
                found.add(reader.name)
                found.update(r.name for r in self.readers.get(reader.output[0], []) if r.op_type in _ROOTS)
                reached = True
            elif reader.op_type in _ON_THE_WAY and steps < _MOST_STEPS and self._reaches_root(reader, steps + 1, found):
                found.add(reader.name)
                reached = True
        return reached

    def mixed_in(self, way: set[str]) -> set[str]:
        """Return the nodes, back to a reduction, behind the other inputs of nodes on the way: mean(x)^2."""
        found: set[str] = set()
        stack = [(name, 0) for name in way]
        while stack:
            node_name, steps = stack.pop()
            for name in self.by_name[node_name].input:
                node = self.producer.get(name)
                if node is None or node.name in way or node.name in found or steps >= _MOST_STEPS:
                    continue
                if node.op_type in _REDUCTIONS:
                    found.add(node.name)
                elif node.op_type in _ON_THE_WAY and self._from_reduction(node):
                    found.add(node.name)
                    stack.append((node.name, steps + 1))
        return found

    def _from_reduction(self, node: onnx.NodeProto) -> bool:
        """Return whether every activation a node reads comes from a reduction, through nodes on the way."""
        stack, seen = [node], {node.name}
        while stack:
            for name in stack.pop().input:
                before = self.producer.get(name)
                if name in self.draft.weights or name == "" or (before is not None and before.name in seen):
                    continue
                if before is None or (before.op_type not in _REDUCTIONS and before.op_type not in _ON_THE_WAY):
                    return False
                seen.add(before.name)
                if before.op_type in _ON_THE_WAY:
                    if len(seen) > 4 * _MOST_STEPS:
                        return False
                    stack.append(before)
        return True


# Operators whose output type is an attribute, or silently follows an input.
_TYPE_BY_ATTRIBUTE = {"Bernoulli", "EyeLike", "RandomNormalLike", "RandomUniformLike"}
SHAPES = "computes shapes or positions"
FP16_MAX = 65504.0
BF16_MAX = float.fromhex("0x1.fep127")
_LARGEST = {"float16": FP16_MAX, "bfloat16": BF16_MAX}
BEYOND_ANY_VALUE = 1e8  # larger constants are masks or "no limit": the largest FP16 number has the same effect
_ONNX_TYPE: dict[int, str] = {TensorProto.FLOAT16: "tensor(float16)", TensorProto.BFLOAT16: "tensor(bfloat16)"}
_QUANTIZATION = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_UNKNOWN, _TENSOR = ValueType(0, None), ValueType(TensorProto.FLOAT, None)


@dataclass(frozen=True)
class Roles:
    """A node's inputs and outputs with a type variable that can be 16-bit, by index."""

    inputs: frozenset[int]
    outputs: frozenset[int]


@functools.cache
def _schema(op_type: str, version: int, domain: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


def _formal(formals: list[onnx.defs.OpSchema.FormalParameter], index: int) -> onnx.defs.OpSchema.FormalParameter | None:
    if index < len(formals):
        return formals[index]
    variadic = formals and formals[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    return formals[-1] if variadic else None


def roles_of(node: onnx.NodeProto, opset: int, types: dict[str, ValueType], low: int) -> Roles | str:
    """Return the parts of a node for 16 bits, or the reason why there are none.

    Args:
        node: of ONNX's own domain, without a body.
        opset: version of ONNX's own operators. It picks the node's schema.
        types: of all values, before lowering.
        low: `TensorProto.FLOAT16` or `TensorProto.BFLOAT16`.
    """
    schema = _schema(node.op_type, opset, "") if node.domain in ONNX_DOMAINS else None
    if schema is None:
        return f"no ONNX schema says which types {node.domain or 'ai.onnx'}.{node.op_type} takes"
    unknown = next((n for n in node.input if n and types.get(n, _UNKNOWN).data_type == 0), None)
    if unknown is not None:
        return f"its input '{unknown}' is not a tensor, or of unknown type"
    if node.op_type in _TYPE_BY_ATTRIBUTE or any(types.get(n, _TENSOR).data_type == 0 for n in node.output if n):
        return f"{node.op_type}'s result has a type of its own"
    allowed = {c.type_param_str for c in schema.type_constraints if _ONNX_TYPE[low] in c.allowed_type_strs}
    inputs = {
        index: formal
        for index, name in enumerate(node.input)
        if name and _is_float(types, name) and (formal := _formal(list(schema.inputs), index)) is not None
    }
    lowered = {index for index, formal in inputs.items() if formal.type_str in allowed}
    if inputs and not lowered:
        return f"{node.op_type}-{schema.since_version} has no {_ONNX_TYPE[low][7:-1]} form in ONNX"
    bound = {inputs[index].type_str for index in lowered}
    outputs = set()
    for index, name in enumerate(node.output):
        result = _formal(list(schema.outputs), index)
        if name and result is not None and result.type_str in bound and _is_float(types, name, unknown=True):
            outputs.add(index)
    return Roles(frozenset(lowered), frozenset(outputs))


def _is_float(types: dict[str, ValueType], name: str, *, unknown: bool = False) -> bool:
    found = types.get(name)
    if found is None or found.data_type == 0:
        return unknown
    return found.data_type == TensorProto.FLOAT


def keep_reasons(
    draft: Draft, types: dict[str, ValueType], low: int, keep: Callable[[onnx.NodeProto], str | None]
) -> dict[str, str]:
    """Return node name -> reason, for the main graph's nodes left in FP32 although their type could change.

    Args:
        draft: the model as a float32 draft.
        types: name -> type of each value.
        low: the low type, `TensorProto.FLOAT16` or `TensorProto.BFLOAT16`.
        keep: returns the reason to keep a node in FP32. `None`: lower it.
    """
    shapes = _shape_values(draft)
    statistics = statistics_nodes(draft)
    reasons: dict[str, str] = {}
    for node in draft.graph.node:
        if asked := keep(node):
            reasons[node.name] = asked
        elif node.op_type in _QUANTIZATION:
            reasons[node.name] = "quantisation scales stay FP32"
        elif any(name in shapes for name in node.output):
            reasons[node.name] = SHAPES
        elif node.name in statistics and low == TensorProto.FLOAT16:
            reasons[node.name] = "part of a normalisation's variance, which FP16 cannot hold"
        elif low == TensorProto.FLOAT16 and (name := _too_large(draft, node)):
            reasons[node.name] = f"constant '{name}' exceeds FP16's largest number, {FP16_MAX:.0f}"
    return reasons


def _shape_values(draft: Draft) -> set[str]:
    """Return the values of shapes and constants alone (anchors, grids): FP16 is exact to 2048."""
    derived: set[str] = set()
    for node in draft.graph.node:
        if any(True for _ in walk.node_graphs(node)):
            continue
        dynamic = [name for name in node.input if name and name not in draft.weights]
        starts = node.op_type in ("Shape", "Size") and node.domain in ONNX_DOMAINS
        if starts or (dynamic and all(name in derived for name in dynamic)):
            derived.update(node.output)
    derived.discard("")
    return derived


def _too_large(draft: Draft, node: onnx.NodeProto) -> str | None:
    for name in node.input:
        weight = draft.weights.get(name)
        if weight is None or weight.data_type != TensorProto.FLOAT or weight.size == 0:
            continue
        values = weight.load()
        largest = max(abs(float(values.max())), abs(float(values.min())))
        if FP16_MAX < largest < BEYOND_ANY_VALUE:
            return str(name)
    return None


def to_low(array: NDArray[Any], low: np.dtype[Any]) -> NDArray[Any]:
    """Round FP32 values to 16 bits, to nearest even.

    Finite values beyond the type's range become its largest number. A single tiny constant (an epsilon) becomes the
    smallest subnormal instead of 0, so a division protected by it stays protected.
    """
    with np.errstate(all="ignore"):
        values = array.astype(low)
        infinite = np.isinf(values)
        if infinite.any():  # an attention mask's -3.4e38: as -inf, a fully masked row becomes NaN
            largest = np.copysign(np.float32(_LARGEST[low.name]), array)
            values = np.where(infinite & np.isfinite(array), largest.astype(low), values)
    if low == np.float16 and values.size == 1 and values.reshape(-1)[0] == 0 and array.reshape(-1)[0] != 0:
        values = np.copysign(np.full_like(values, np.float16(6e-8)), array).astype(low)
    return values
