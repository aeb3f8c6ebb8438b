"""Turn a float32 graph into a typed FP16 or BF16 one.

Every value has one type. A node lowered to 16 bits reads 16-bit values and writes 16-bit values under their old names.
Where its neighbour needs FP32, one Cast is made per value and shared. A weight is stored in the type (or types) of its
readers. Bodies of If, Loop and Scan keep FP32 inputs and outputs and are lowered inside.

Ensures: topologically sorted, no Cast there and back, inputs and outputs as asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from repo_manager.onnx_model import dtypes, walk
from repo_manager.onnx_model.draft import (
    ONNX_DOMAINS,
    Draft,
    Weight,
    attribute,
    constant_weight,
    opset_of,
    replace_nodes,
    unique_name,
    used_names,
)
from repo_manager.onnx_model.source import without_unused
from repo_manager.precision.passes.lowering_rules import SHAPES, Roles, keep_reasons, roles_of, to_low
from repo_manager.precision.passes.value_types import ValueType, infer_types, type_table

__all__ = ["Lowered", "lower"]

FLOAT = TensorProto.FLOAT
_SUFFIX: dict[int, str] = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16", FLOAT: "fp32"}


@dataclass(frozen=True)
class Lowered:
    """A lowered draft, and the nodes left in FP32: name -> (operator, reason)."""

    draft: Draft
    kept: dict[str, tuple[str, str]]


def lower(draft: Draft, low: int, *, keep_io_types: bool, keep: Callable[[onnx.NodeProto], str | None]) -> Lowered:
    """Lower a draft to FP16 or BF16.

    Requires: names on all nodes, topological order.

    Args:
        draft: float32 model. Values of other types are left alone.
        low: the low type, `TensorProto.FLOAT16` or `TensorProto.BFLOAT16`.
        keep_io_types: leave float32 inputs and outputs float32, with Casts. `False` gives them the low type.
        keep: says of a node why it must stay in FP32. `None`: it need not.

    Raises:
        ModelError: the graph's types contradict each other.
    """
    typed = infer_types(draft)
    job = _Job(draft, low, keep_io_types, keep, opset_of(draft.proto), draft.names())
    result = draft.copy()
    types = type_table(typed.graph)
    job.reasons = keep_reasons(draft, types, low, keep)
    scope = _Scope(job, types, dict.fromkeys(draft.weights, FLOAT))
    job.main = scope
    io_type = FLOAT if keep_io_types else low
    for value in result.graph.input:
        if scope.is_float(value.name):
            scope.now[value.name] = value.type.tensor_type.elem_type = io_type
    scope.run(result.graph, typed.graph)
    for value in result.graph.output:
        if scope.is_float(value.name) and value.name not in draft.weights:
            scope.deliver(value.name, io_type)
            value.type.tensor_type.elem_type = io_type
    replace_nodes(result.graph, scope.nodes)
    result.weights.update(job.new_weights)
    result = without_unused(result)
    return Lowered(_old_names(result, job.low_names), job.kept)


def _old_names(draft: Draft, low_names: dict[str, str]) -> Draft:
    """Give a weight stored in the low type alone its old name back."""
    back = {new: old for old, new in low_names.items() if new in draft.weights and old not in draft.weights}
    for graph in walk.graphs_of(draft.graph):
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name in back:
                    node.input[index] = back[name]
    return Draft(draft.proto, {back.get(name, name): weight for name, weight in draft.weights.items()})


@dataclass
class _Job:
    """State shared by all scopes of one conversion."""

    draft: Draft
    low: int
    keep_io_types: bool
    keep: Callable[[onnx.NodeProto], str | None]
    opset: int
    names: set[str]
    reasons: dict[str, str] = field(default_factory=dict)
    kept: dict[str, tuple[str, str]] = field(default_factory=dict)
    new_weights: dict[str, Weight] = field(default_factory=dict)
    low_names: dict[str, str] = field(default_factory=dict)
    main: _Scope | None = None

    def low_weight(self, name: str) -> str | None:
        """Return the name of a weight in the low type, making it when needed, or `None` if `name` is no float
        weight.
        """
        weight = self.draft.weights.get(name)
        if weight is None or weight.data_type != FLOAT:
            return None
        if name not in self.low_names:
            self.low_names[name] = unique_name(f"{name}_{_SUFFIX[self.low]}", self.names)
            dtype, load = self.dtype, weight.load
            self.new_weights[self.low_names[name]] = Weight(self.low, weight.shape, lambda: to_low(load(), dtype))
        return self.low_names[name]

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's name for the low type."""
        dtype = dtypes.numpy_dtype(self.low, "the low type")
        assert dtype is not None
        return dtype


class _Scope:
    """One graph: the present type of each of its values, and the Casts made in it."""

    def __init__(self, job: _Job, types: dict[str, ValueType], now: dict[str, int]) -> None:
        self.job = job
        self.types = types
        self.now = now  # value with original type float32 -> its current type
        self.casts: dict[tuple[str, int], str] = {}
        self.sources: dict[str, str] = {}  # result of a Cast from an integer -> the Cast's input
        self.nodes: list[onnx.NodeProto] = []

    def is_float(self, name: str) -> bool:
        """Return whether a value was float32 in the source."""
        found = self.types.get(name)
        return name in self.now or (found is not None and found.data_type == FLOAT)

    def need(self, name: str, data_type: int) -> str:
        """Return the name of a float value in `data_type`, adding a Cast when there is none."""
        if self.now.get(name, FLOAT) == data_type:
            return name
        if data_type != FLOAT and (weight := self.job.low_weight(name)):
            return weight
        source = self.sources.get(name, name)
        if source != name and self.types[source].data_type == data_type:
            return source
        key = (name, data_type)
        if key not in self.casts:
            new_name = unique_name(f"{name}_{_SUFFIX[data_type]}", self.job.names)
            self.nodes.append(
                onnx.helper.make_node(
                    "Cast", [source], [new_name], name=unique_name(f"Cast:{new_name}", self.job.names), to=data_type
                )
            )
            self.casts[key] = new_name
        return self.casts[key]

    def run(self, graph: onnx.GraphProto, typed: onnx.GraphProto) -> None:
        """Lower a graph's nodes in order into `nodes`."""
        for node, twin in zip(graph.node, typed.node, strict=True):
            if any(True for _ in walk.node_graphs(node)):
                self._with_bodies(node, twin)
            elif node.op_type == "Cast" and node.domain in ONNX_DOMAINS:
                self._cast(node)
            elif (constant := constant_weight(node)) is not None:
                self._constant(node, constant)
            else:
                self._plain(node)

    def deliver(self, name: str, data_type: int) -> None:
        """Make a value leave the graph in `data_type` under its own name."""
        if self.now.get(name, FLOAT) == data_type or not any(name in node.output for node in self.nodes):
            return
        inner = unique_name(f"{name}_{_SUFFIX[self.now.get(name, FLOAT)]}", self.job.names)
        cast = self.casts.get((name, data_type))
        _rename(self.nodes, name, inner)
        if cast is not None:
            _rename(self.nodes, cast, name)
        else:
            self.nodes.append(
                onnx.helper.make_node(
                    "Cast", [inner], [name], name=unique_name(f"Cast:{name}", self.job.names), to=data_type
                )
            )

    def _plain(self, node: onnx.NodeProto) -> None:
        touches = any(self.is_float(name) for name in (*node.input, *node.output) if name)
        roles: Roles | str = Roles(frozenset(), frozenset())
        if touches:
            reason = self.job.reasons.get(node.name)
            if reason is None and self is not self.job.main:
                reason = self.job.keep(node)
            roles = reason or roles_of(node, self.job.opset, self.types, self.job.low)
        if isinstance(roles, str):
            if roles != SHAPES or any(self.is_float(name) for name in node.output if name):
                self.job.kept[node.name] = (node.op_type, roles)
            roles = Roles(frozenset(), frozenset())
        for index, name in enumerate(node.input):
            if name and self.is_float(name):
                node.input[index] = self.need(name, self.job.low if index in roles.inputs else FLOAT)
        for index, name in enumerate(node.output):
            if name and (index in roles.outputs or self.is_float(name)):
                self.now[name] = self.job.low if index in roles.outputs else FLOAT
        self.nodes.append(node)

    def _cast(self, node: onnx.NodeProto) -> None:
        source, result = node.input[0], node.output[0]
        if self.is_float(source) and attribute(node, "to", 0) == FLOAT:  # a Cast without effect: follow its input
            self.now[result] = self.now.get(source, FLOAT)
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("to", self.now[result]))
        elif attribute(node, "to", 0) == FLOAT:
            self.now[result] = FLOAT
            if self.types.get(source, ValueType(0, None)).data_type in _CAST_ONCE:
                self.sources[result] = source
        self.nodes.append(node)

    def _constant(self, node: onnx.NodeProto, constant: Weight) -> None:
        """Put a constant of a body beside its 16-bit twin. The one nobody reads is dropped at the end."""
        self.nodes.append(node)
        if constant.data_type != FLOAT or constant.tensor is not None:
            return
        self.now[node.output[0]] = FLOAT
        name = unique_name(f"{node.output[0]}_{_SUFFIX[self.job.low]}", self.job.names)
        tensor = onnx.numpy_helper.from_array(np.asarray(to_low(constant.load(), self.job.dtype)), name)
        self.nodes.append(
            onnx.helper.make_node(
                "Constant", [], [name], name=unique_name(f"Constant:{name}", self.job.names), value=tensor
            )
        )
        self.casts[(node.output[0], self.job.low)] = name

    def _with_bodies(self, node: onnx.NodeProto, twin: onnx.NodeProto) -> None:
        """Keep the node's own inputs and outputs in FP32 and lower the nodes inside its bodies."""
        for index, name in enumerate(node.input):
            if name and self.is_float(name):
                node.input[index] = self.need(name, FLOAT)
        for body, typed in zip(walk.node_graphs(node), walk.node_graphs(twin), strict=True):
            self._body(body, typed)
        for name in node.output:
            if name and self.is_float(name):
                self.now[name] = FLOAT
        self.nodes.append(node)

    def _body(self, body: onnx.GraphProto, typed: onnx.GraphProto) -> None:
        types = type_table(typed, self.types)
        inner = _Scope(self.job, types, dict(self.now))
        inner.casts = dict(self.casts)
        for value in body.input:
            inner.hide(value.name)
        for tensor in body.initializer:
            inner.hide(tensor.name)
        inner.run(body, typed)
        for value in body.output:
            if inner.is_float(value.name):
                inner.deliver(value.name, FLOAT)
        replace_nodes(body, inner.nodes)
        used = used_names(body)
        replace_nodes(body, [n for n in inner.nodes if n.op_type not in ("Cast", "Constant") or n.output[0] in used])

    def hide(self, name: str) -> None:
        """Drop an outer scope's facts of a name this one defines."""
        for data_type in (FLOAT, self.job.low):
            self.casts.pop((name, data_type), None)
        self.sources.pop(name, None)
        if self.types.get(name, ValueType(0, None)).data_type == FLOAT:
            self.now[name] = FLOAT
        else:
            self.now.pop(name, None)


# Types with the same result from one Cast to 16 bits, or a Cast to float32 and another to 16 bits.
_CAST_ONCE = {
    TensorProto.BFLOAT16, TensorProto.BOOL, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.INT8,
    TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.UINT16,
    TensorProto.UINT32, TensorProto.UINT64,
}  # fmt: skip


def _rename(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
        for body in walk.node_graphs(node):
            _rename(body.node, old, new)
            for value in body.output:
                if value.name == old:
                    value.name = new
