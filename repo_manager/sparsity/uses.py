"""Walk a model and yield every use of a weight by a multiplying operator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

from repo_manager.errors import ModelError
from repo_manager.onnx_model.shape_inference import infer_at, infer_shapes, static_shape
from repo_manager.onnx_model.walk import node_graphs
from repo_manager.onnx_model.weights import WeightStore
from repo_manager.sparsity.operators import Site, macs_of, sites_of
from repo_manager.sparsity.resolve import Resolver
from repo_manager.sparsity.scope import Inferred, Scope, Shape, attribute_of, scope_of
from repo_manager.sparsity.weight import Weight

__all__ = ["Use", "weight_uses"]

_MAX_VISITS = 300_000  # nodes after expanding every function call
_MAX_INFERRED_CALLS = 2_000
_MAX_DEPTH = 100


@dataclass(frozen=True, eq=False)
class Use:
    """One operator's use of one weight.

    Attributes:
        label: the node's name with the bodies and functions around it, `/` between. Its first output when it has no
            name.
        node: the node with the weight among its inputs.
        scope: the names it may use.
        site: which input, along which axis.
        weight: the constant. `None` when it is computed at run time.
        macs: multiply-accumulates at the report's shapes. `None` when a shape is not known.
    """

    label: str
    node: onnx.NodeProto
    scope: Scope
    site: Site
    weight: Weight | None
    macs: int | None


class _Walker:
    def __init__(self, proto: onnx.ModelProto, store: WeightStore) -> None:
        self.resolver = Resolver(store)
        self.functions = {(f.domain, f.name): f for f in proto.functions}
        self.ir_version = proto.ir_version
        self.visits = self.calls = 0

    def walk(
        self, nodes: Sequence[onnx.NodeProto], twins: Sequence[onnx.NodeProto], scope: Scope, depth: int
    ) -> Iterator[Use]:
        """Yield the uses among `nodes`. `twins` are the same nodes with shapes inferred in their bodies."""
        if depth > _MAX_DEPTH:
            raise ModelError(f"bodies and functions are nested more than {_MAX_DEPTH} deep")
        for index, node in enumerate(nodes):
            self.visits += 1
            if self.visits > _MAX_VISITS:
                raise ModelError(f"with its functions expanded the graph has more than {_MAX_VISITS} nodes")
            function = self.functions.get((node.domain, node.op_type))
            if function is not None:
                yield from self.call(node, function, scope, depth)
                continue
            yield from self.uses(node, scope)
            if not node.attribute:
                continue
            twin_bodies = list(node_graphs(twins[index])) if index < len(twins) else []
            for number, body in enumerate(node_graphs(node)):
                twin = twin_bodies[number] if number < len(twin_bodies) else None
                path = f"{_name(node, scope)}/{body.name or number}/"
                inner = scope_of(path, body.node, body, outer=scope, inferred=_inferred_in(twin))
                yield from self.walk(body.node, twin.node if twin is not None else (), inner, depth + 1)

    def call(self, node: onnx.NodeProto, function: onnx.FunctionProto, scope: Scope, depth: int) -> Iterator[Use]:
        """Yield the uses inside one call of a local function."""
        self.calls += 1
        graph = None
        if self.calls <= _MAX_INFERRED_CALLS and scope.shapes:
            graph = _infer_function(function, node, scope, self.functions.values(), self.ir_version)
        names = [*function.attribute, *(default.name for default in function.attribute_proto)]
        given = {name: _caller_attribute(node, name, scope, function) for name in names}
        actual = [*node.input, *[""] * (len(function.input) - len(node.input))]
        inner = scope_of(
            f"{_name(node, scope)}/",
            function.node,
            None,
            bound={formal: (scope, name) for formal, name in zip(function.input, actual, strict=False)},
            attributes={name: value for name, value in given.items() if value is not None},
            inferred=_inferred_in(graph),
            opset=_opset(function.opset_import),
        )
        yield from self.walk(function.node, graph.node if graph is not None else (), inner, depth + 1)

    def uses(self, node: onnx.NodeProto, scope: Scope) -> Iterator[Use]:
        """Yield the uses of one node."""
        weights: dict[int, Weight | None] = {}

        def weight_at(index: int) -> Weight | None:
            if index not in weights:
                weights[index] = self.resolver.weight(node.input[index], scope) if index < len(node.input) else None
            return weights[index]

        def rank_of(index: int) -> int | None:
            weight = weight_at(index)
            if weight is not None:
                return len(weight.shape)
            shape = scope.shape_of(node.input[index]) if index < len(node.input) else None
            return None if shape is None else len(shape)

        for site in sites_of(node, scope, lambda index: weight_at(index) is not None, rank_of):
            weight = weight_at(site.input)
            if weight is not None and site.zero_point is not None and site.zero_point < len(node.input):
                axis = 0 if site.output_axis is None else site.output_axis
                step = self.resolver.zero_point_step(weight, node.input[site.zero_point], scope, axis)
                weight = None if step is None else weight.then(step, "zero point")
            yield Use(_name(node, scope), node, scope, site, weight, macs_of(node, scope, site))


def _name(node: onnx.NodeProto, scope: Scope) -> str:
    return scope.path + (node.name or next((name for name in node.output if name), node.op_type))


def _opset(imports: Iterable[onnx.OperatorSetIdProto]) -> int | None:
    return next((entry.version for entry in imports if entry.domain in ("", "ai.onnx")), None)


def weight_uses(
    proto: onnx.ModelProto, store: WeightStore, shapes: Mapping[str, Sequence[int]] | None = None
) -> Iterator[Use]:
    """Yield every use of a weight, in the graph's order, bodies and function calls where they are.

    A local function's body is visited once per call, with the call's arguments.

    Args:
        proto: the model. Large weights may be cut out of it and held by `store`.
        store: reads the weights of `proto`.
        shapes: input shapes for counting multiply-accumulates. `None` does not count.

    Raises:
        ModelError: nested too deeply, too many function calls, or an unreadable weight.
    """
    inferred = None if shapes is None else infer_at(proto, shapes)
    twin = None if inferred is None else inferred.graph
    opset = _opset(proto.opset_import)
    scope = scope_of("", proto.graph.node, proto.graph, inferred=_inferred_in(twin), opset=opset)
    yield from _Walker(proto, store).walk(proto.graph.node, twin.node if twin is not None else (), scope, 0)


def _infer_function(
    function: onnx.FunctionProto,
    node: onnx.NodeProto,
    caller: Scope,
    functions: Iterable[onnx.FunctionProto],
    ir_version: int,
) -> onnx.GraphProto | None:
    """Return a function's body as a graph with the shapes of one call, or `None` when inference gives up."""
    proto = onnx.ModelProto(ir_version=ir_version)
    proto.opset_import.extend(function.opset_import)
    proto.functions.extend(functions)
    graph = proto.graph
    graph.name = function.name
    graph.node.extend(function.node)
    for body_node in graph.node:
        for attribute in body_node.attribute:
            if attribute.ref_attr_name:
                found = _caller_attribute(node, attribute.ref_attr_name, caller, function)
                name = attribute.name
                attribute.Clear()
                if found is not None:
                    attribute.CopyFrom(found)
                attribute.name = name
    for formal, actual in zip(function.input, node.input, strict=False):
        shape = caller.shape_of(actual)
        home = caller.home_of(actual) if actual else None
        if home is not None and home[1] in home[0].tensors:
            tensor = graph.initializer.add()
            tensor.CopyFrom(home[0].tensors[home[1]])
            tensor.name = formal
            continue
        elem_type = home[0].types.get(home[1], onnx.TensorProto.FLOAT) if home is not None else onnx.TensorProto.FLOAT
        graph.input.append(onnx.helper.make_tensor_value_info(formal, elem_type, shape))
    for name in function.output:
        graph.output.add(name=name)
    inferred = infer_shapes(proto)
    return None if inferred is None else inferred.graph


def _caller_attribute(
    node: onnx.NodeProto, name: str, caller: Scope, function: onnx.FunctionProto
) -> onnx.AttributeProto | None:
    """Return a call's value for a function's attribute: its own, or the function's default."""
    found = attribute_of(node, name, caller)
    if found is not None:
        return found
    return next((default for default in function.attribute_proto if default.name == name), None)


def _inferred_in(graph: onnx.GraphProto | None) -> Inferred:
    """Return the fully known shapes and the element types an inferred graph states, per value."""
    shapes: dict[str, Shape] = {}
    types: dict[str, int] = {}
    if graph is None:
        return Inferred(shapes, types)
    for tensor in graph.initializer:
        shapes[tensor.name] = tuple(tensor.dims)
        types[tensor.name] = tensor.data_type
    for values in (graph.input, graph.output, graph.value_info):
        for value in values:
            if value.type.WhichOneof("value") != "tensor_type":
                continue
            tensor_type = value.type.tensor_type
            types.setdefault(value.name, tensor_type.elem_type)
            shape = static_shape(value.type)
            if shape is not None:
                shapes.setdefault(value.name, shape)
    return Inferred(shapes, types)
