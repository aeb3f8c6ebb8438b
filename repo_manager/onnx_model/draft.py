"""A model during conversion: a light graph, and weights read only when needed.

The graph holds no initializers. Each weight is a promise to produce its values. So copying a draft costs microseconds,
regardless of the model's size, and at most one weight's values are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model import dtypes, walk
from repo_manager.onnx_model.weights import WeightStore

__all__ = ["Draft", "Weight", "attribute", "constant_weight", "exposing", "opset_of", "typed_tensor", "weight_of_array"]

Array = NDArray[Any]
ONNX_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Weight:
    """One constant of the main graph.

    Attributes:
        data_type: element type as an `onnx.TensorProto.DataType` number, for instance 1 for float32.
        shape: the constant's dims. `()` is a scalar.
        load: returns the values, shape as stated (types below a byte are not loaded: see `tensor`).
        tensor: the tensor to store as it is, for types beyond NumPy, else `None`.
    """

    data_type: int
    shape: tuple[int, ...]
    load: Callable[[], Array] = field(repr=False)
    tensor: onnx.TensorProto | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """How many elements it has."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Draft:
    """A model being converted. Passes take one and return a new one. None changes its input.

    Attributes:
        proto: the model without the main graph's initializers and without value_info.
        weights: name -> constant of the main graph.
    """

    proto: onnx.ModelProto
    weights: dict[str, Weight]

    @property
    def graph(self) -> onnx.GraphProto:
        """The main graph."""
        return self.proto.graph

    def copy(self) -> Draft:
        """Return a draft whose graph and weight table can be changed without changing this one."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        return Draft(proto, dict(self.weights))

    def names(self) -> set[str]:
        """Every value and node name in use, at every depth."""
        used = set(self.weights)
        for graph in walk.graphs_of(self.graph):
            used.update(value.name for value in (*graph.input, *graph.output, *graph.initializer))
            for node in graph.node:
                used.update((node.name, *node.output))
        return used


def weight_of_array(array: Array, data_type: int | None = None) -> Weight:
    """Hold values in memory as a weight. `None` takes the element type from the array.

    Args:
        array: the values. They are not copied: do not change them later.
        data_type: element type, a `TensorProto` constant. `None`: the array's.
    """
    number = onnx.helper.np_dtype_to_tensor_dtype(array.dtype) if data_type is None else data_type
    return Weight(number, array.shape, lambda: array)


def constant_weight(node: onnx.NodeProto) -> Weight | None:
    """Return the value of a Constant node as a weight, or `None` for a sparse or unreadable one."""
    if node.op_type != "Constant" or node.domain not in ONNX_DOMAINS or len(node.attribute) != 1:
        return None
    item = node.attribute[0]
    if item.name == "value":
        return typed_tensor(item.t)
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if item.name not in kinds:
        return None
    return weight_of_array(np.asarray(onnx.helper.get_attribute_value(item), dtype=kinds[item.name]))


def typed_tensor(tensor: onnx.TensorProto) -> Weight:
    """Wrap a tensor with its own values.

    Raises:
        ModelError: its values do not fill its shape (raised when they are first read).
    """
    where = f"tensor '{tensor.name}'"
    shape = tuple(tensor.dims)
    if tensor.data_type == onnx.TensorProto.STRING or dtypes.numpy_dtype(tensor.data_type, where) is None:
        return Weight(tensor.data_type, shape, lambda: _unreadable(where), tensor)
    return Weight(tensor.data_type, shape, lambda: WeightStore().array(tensor))


def _unreadable(where: str) -> Array:
    raise ModelError(f"{where} has an element type whose values cannot be computed with here")


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return an attribute's value, or `default` when the node does not state it.

    Args:
        node: node with the attribute, or without it.
        name: name of the attribute.
        default: value if the node does not state the attribute.
    """
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def opset_of(proto: onnx.ModelProto, domain: str = "") -> int:
    """Return the version of an operator set the model imports. 0 when it does not."""
    aliases = ONNX_DOMAINS if domain in ONNX_DOMAINS else (domain,)
    return max((entry.version for entry in proto.opset_import if entry.domain in aliases), default=0)


def captured_names(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names a node's bodies read from outside them (and possibly some of their own)."""
    for body in walk.node_graphs(node):
        for graph in walk.graphs_of(body):
            for inner in graph.node:
                yield from inner.input
            yield from (value.name for value in graph.output)


def used_names(graph: onnx.GraphProto) -> set[str]:
    """Return every value with a reader: nodes, their bodies, and the graph's outputs."""
    used = {value.name for value in graph.output}
    for node in graph.node:
        used.update(node.input)
        used.update(captured_names(node))
    used.discard("")
    return used


def unique_name(base: str, used: set[str]) -> str:
    """Return `base`, or `base_2`, `base_3`, ... when taken, and mark it as used."""
    name, number = base, 1
    while name in used:
        number += 1
        name = f"{base}_{number}"
    used.add(name)
    return name


def exposing(draft: Draft, values: Iterable[str]) -> Draft:
    """Return a draft whose outputs are these float32 values of its main graph, and no others."""
    probe = draft.copy()
    del probe.graph.output[:]
    for value in values:
        probe.graph.output.append(onnx.ValueInfoProto(name=value))
        probe.graph.output[-1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return probe


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Make `nodes` the graph's node list."""
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)
