"""Names and what they represent in a graph, a nested body or a local function's body."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import onnx

__all__ = ["Inferred", "Scope", "Shape", "attribute_of", "scope_of"]

Shape = tuple[int, ...] | None


@dataclass(frozen=True)
class Inferred:
    """Facts from shape inference about the values of a scope, by name. Empty where it did not run."""

    shapes: Mapping[str, Shape] = field(default_factory=dict)
    types: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Scope:
    """The names a node may use.

    Attributes:
        path: prefix of node names, for instance `if_1/then_branch/`. Empty in the main graph.
        outer: the enclosing scope of a nested body. `None` in the main graph and in functions.
        tensors: name -> initializer of this graph. Empty in a function.
        sparse: name of the values -> sparse initializer of this graph. Empty in a function.
        producers: output name -> its node.
        consumers: name -> its readers in this scope.
        inputs: names given from outside at run time.
        bound: a function's formal inputs -> the caller's scope and name (empty when left out).
        attributes: name -> attribute of the function call, for nodes with `ref_attr_name`.
        shapes: shapes known at the sizes of the report.
        types: ONNX element types of values, where known.
        outputs: names that leave this scope.
        opset: version of ONNX's own operators here.
    """

    path: str
    outer: Scope | None
    tensors: Mapping[str, onnx.TensorProto]
    sparse: Mapping[str, onnx.SparseTensorProto]
    producers: Mapping[str, onnx.NodeProto]
    consumers: Mapping[str, tuple[onnx.NodeProto, ...]]
    inputs: frozenset[str]
    bound: Mapping[str, tuple[Scope, str]] = field(default_factory=dict)
    attributes: Mapping[str, onnx.AttributeProto] = field(default_factory=dict)
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    types: Mapping[str, int] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()
    opset: int = 17

    def home_of(self, name: str) -> tuple[Scope, str] | None:
        """Return the scope of a name's definition, following function arguments outwards, or `None` if none does."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.bound:
                scope, name = scope.bound[name]
                continue
            if name in scope.tensors or name in scope.sparse or name in scope.producers or name in scope.inputs:
                return scope, name
            scope = scope.outer
        return None

    def shape_of(self, name: str) -> Shape:
        """Return a value's shape, or `None` when it is not known."""
        if not name:
            return None
        scope: Scope | None = self
        while scope is not None:
            if name in scope.shapes:
                return scope.shapes[name]
            if name in scope.bound:
                scope, name = scope.bound[name]
                continue
            if name in scope.tensors:
                return tuple(scope.tensors[name].dims)
            if name in scope.sparse:
                return tuple(scope.sparse[name].dims)
            scope = scope.outer
        return None


def scope_of(
    path: str,
    nodes: Iterable[onnx.NodeProto],
    graph: onnx.GraphProto | None,
    *,
    outer: Scope | None = None,
    bound: Mapping[str, tuple[Scope, str]] | None = None,
    attributes: Mapping[str, onnx.AttributeProto] | None = None,
    inferred: Inferred | None = None,
    opset: int | None = None,
) -> Scope:
    """Build the scope of a graph, or of a function's nodes (`graph` is `None`).

    Args:
        path: names of the enclosing nodes, joined by `/`.
        nodes: nodes of the graph or function.
        graph: the graph. `None`: the nodes are a function's.
        outer: scope of the enclosing graph. `None`: the main graph.
        bound: parameter -> scope and name of the argument. `None`: not a function call.
        attributes: attributes of the function call. `None`: not a function call.
        inferred: shapes found by inference. `None`: those of the enclosing scope.
        opset: version of ONNX's operators. `None`: the enclosing scope's.
    """
    found = Inferred() if inferred is None else inferred
    producers: dict[str, onnx.NodeProto] = {}
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.output:
            producers.setdefault(name, node)
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    return Scope(
        path=path,
        outer=outer,
        tensors={} if graph is None else {tensor.name: tensor for tensor in graph.initializer},
        sparse={} if graph is None else {sparse.values.name: sparse for sparse in graph.sparse_initializer},
        producers=producers,
        consumers={name: tuple(readers) for name, readers in consumers.items()},
        inputs=frozenset() if graph is None else frozenset(value.name for value in graph.input),
        bound=bound or {},
        attributes=attributes if attributes is not None else (outer.attributes if outer is not None else {}),
        shapes=found.shapes,
        types=found.types,
        outputs=frozenset() if graph is None else frozenset(value.name for value in graph.output),
        opset=opset if opset is not None else (outer.opset if outer is not None else 17),
    )


def attribute_of(node: onnx.NodeProto, name: str, scope: Scope) -> onnx.AttributeProto | None:
    """Return a node's attribute, a reference to the enclosing function's attribute resolved.

    Args:
        node: node of `scope`. One without the attribute gives `None`.
        name: name of the attribute at the node, for instance `perm`.
        scope: names and attributes visible to the node.
    """
    for attribute in node.attribute:
        if attribute.name == name:
            return scope.attributes.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute
    return None
