"""Shapes inside one call of a local function, and reading the shapes that inference stated."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from repo_manager.onnx_model.shape_inference import infer, static_shape
from repo_manager.sparsity.scope import Scope, Shape, attribute_of

__all__ = ["infer_function", "shapes_in"]


def infer_function(
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
                found = caller_attribute(node, attribute.ref_attr_name, caller, function)
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
    inferred = infer(proto)
    return None if inferred is None else inferred.graph


def caller_attribute(
    node: onnx.NodeProto, name: str, caller: Scope, function: onnx.FunctionProto
) -> onnx.AttributeProto | None:
    """Return what a call gives for a function's attribute: its own, or the function's default."""
    found = attribute_of(node, name, caller)
    if found is not None:
        return found
    return next((default for default in function.attribute_proto if default.name == name), None)


def shapes_in(graph: onnx.GraphProto | None) -> tuple[dict[str, Shape], dict[str, int]]:
    """Return the fully known shapes and the element types that an inferred graph states, per value."""
    shapes: dict[str, Shape] = {}
    types: dict[str, int] = {}
    if graph is None:
        return shapes, types
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
    return shapes, types
