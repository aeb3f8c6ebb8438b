"""Shapes of every value at given input sizes, by ONNX's shape inference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx
import onnx.shape_inference
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]  # published without stubs

from repo_manager.errors import ModelError
from repo_manager.onnx_model.signature import resolve_shape, spec_of
from repo_manager.sparsity.scope import Scope, Shape, attribute_of

__all__ = ["infer_function", "infer_model", "shapes_in"]

_ERRORS = (
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
    RuntimeError,
    ValueError,
    TypeError,
    MemoryError,
    DecodeError,
    EncodeError,
)


def infer_model(proto: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> onnx.ModelProto | None:
    """Return a copy of a model whose graphs state the shapes found, or `None` when inference gives up.

    Args:
        proto: the model; large weights may be cut out of it.
        shapes: shape per input; an input that is missing keeps its fixed sizes, its dynamic ones become 1.

    Raises:
        ModelError: a given shape contradicts the input's rank.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    held = {tensor.name for tensor in copy.graph.initializer}
    for value in copy.graph.input:
        if value.name in held or value.type.WhichOneof("value") != "tensor_type":
            continue
        given = shapes.get(value.name)
        if given is None:
            try:
                given = resolve_shape(spec_of(value, value.name), batch=1, default=1)
            except ModelError:
                continue
        shape = value.type.tensor_type.shape
        if value.type.tensor_type.HasField("shape") and len(shape.dim) != len(given):
            raise ModelError(f"input '{value.name}' has {len(shape.dim)} axes; the shape given has {len(given)}")
        del shape.dim[:]
        for size in given:
            shape.dim.add(dim_value=int(size))
        shape.SetInParent()
    del copy.graph.value_info[:]
    for output in copy.graph.output:  # stated with symbols; the sizes follow from the inputs
        if output.type.WhichOneof("value") == "tensor_type":
            output.type.tensor_type.ClearField("shape")
    return _infer(copy)


def _infer(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except _ERRORS:
        return None


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
    inferred = _infer(proto)
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
            dims = tensor_type.shape.dim
            if tensor_type.HasField("shape") and all(d.HasField("dim_value") and d.dim_value >= 0 for d in dims):
                shapes.setdefault(value.name, tuple(d.dim_value for d in dims))
    return shapes, types
