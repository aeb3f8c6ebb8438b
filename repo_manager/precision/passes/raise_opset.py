"""Raise a draft to a later version of ONNX's operator set.

`onnx.version_converter` does it. Its faults are corrected here, in bodies too:

- Upsample, and Resize before opset 11, become Resize with half_pixel coordinates (onnx#8480). They mean asymmetric
  ones: the lower neighbour where they enlarge, the upper one where they shrink, as ONNX Runtime computes them.
- Hardmax before opset 13 flattens its input to two dimensions, and the converter changes its axis. Softmax and
  LogSoftmax flatten, too: the converter knows, but fails where a body reads their result.
- An empty tensor for a missing input of Resize is not known to be empty in a body.
- Constants the converter makes in a body can have the name of a value outside.
- A Dropout's mask changes its type, although nothing reads it. A Pad of another mode than `constant` keeps its
  attribute `value`, which no longer exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from repo_manager.errors import ModelError
from repo_manager.onnx_model import walk
from repo_manager.onnx_model.draft import (
    ONNX_DOMAINS,
    Array,
    Draft,
    Weight,
    attribute,
    constant_weight,
    opset_of,
    replace_nodes,
    typed_tensor,
    unique_name,
    used_names,
)
from repo_manager.precision.passes.value_types import ValueType, infer_types, type_table

__all__ = ["raise_opset"]

_SMALL_WEIGHT = 1024  # elements; larger weights become inputs, hidden from the converter
_SOFTMAXES = {"Hardmax", "LogSoftmax", "Softmax"}
# Opsets with new Resize coordinates, with optional Resize inputs, and with Softmax along one axis.
_RESIZE_CHANGED, _EMPTY_INPUTS, _SOFTMAX_CHANGED = 11, 13, 13


def raise_opset(draft: Draft, minimum: int) -> Draft:
    """Convert ONNX's own operators to at least opset `minimum`. A draft at the opset already is returned as it is.

    Ensures: same weights; same results; operators of other domains untouched.

    Raises:
        ModelError: onnx has no conversion for an operator of this model.
    """
    found = opset_of(draft.proto)
    if found >= minimum or found == 0:
        return draft
    if found < _SOFTMAX_CHANGED <= minimum:
        draft = _without_leftovers(_flattened(draft))
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(draft.proto)
    imports = [helper.make_opsetid("", minimum)]
    skeleton.ir_version = max(skeleton.ir_version, helper.find_min_ir_version_for(imports, ignore_unknown=True))
    stand_ins: dict[str, Weight] = {}
    for name, weight in draft.weights.items():
        if weight.size <= _SMALL_WEIGHT and weight.tensor is None:
            skeleton.graph.initializer.append(numpy_helper.from_array(weight.load(), name))
        else:
            skeleton.graph.input.append(helper.make_tensor_value_info(name, weight.data_type, weight.shape))
            stand_ins[name] = weight
    try:
        raised = onnx.version_converter.convert_version(skeleton, minimum)
    except (RuntimeError, ValueError, onnx.version_converter.ConvertError) as exc:
        reason = str(exc).strip().splitlines()[-1] if str(exc).strip() else type(exc).__name__
        raise ModelError(
            f"the model is of opset {found} and this precision needs {minimum}: onnx cannot convert it ({reason})",
            hint=f"Export the model again with opset {minimum} or later.",
        ) from exc
    names = draft.names()
    _name_apart(raised.graph, set(names), names)
    if found < _EMPTY_INPUTS <= minimum:
        _restore_resizes(raised.graph, {}, names, asymmetric=found < _RESIZE_CHANGED)
    return _draft_of(raised, draft, stand_ins)


def _flattened(draft: Draft) -> Draft:
    """Write out the flattening of the input by Softmax and its kin, where their axis may not be the last one."""
    graphs = list(walk.graphs_of(draft.graph))
    if not any(node.op_type in _SOFTMAXES and node.domain in ONNX_DOMAINS for each in graphs for node in each.node):
        return draft
    typed = infer_types(draft)
    result = draft.copy()
    _flatten_in(result.graph, typed.graph, type_table(typed.graph), draft.names())
    return result


def _flatten_in(
    graph: onnx.GraphProto, typed: onnx.GraphProto, types: Mapping[str, ValueType], names: set[str]
) -> None:
    nodes: list[onnx.NodeProto] = []
    for node, twin in zip(graph.node, typed.node, strict=True):
        for body, body_twin in zip(walk.node_graphs(node), walk.node_graphs(twin), strict=True):
            _flatten_in(body, body_twin, type_table(body_twin, dict(types)), names)
        axis = attribute(node, "axis", 1)
        shape = types[node.input[0]].shape if node.input and node.input[0] in types else None
        changes = node.op_type in _SOFTMAXES and node.domain in ONNX_DOMAINS
        if not changes:
            nodes.append(node)
        elif axis == -1 or (shape is not None and axis == len(shape) - 1):
            _set(node, "axis", axis)
            nodes.append(node)
        else:
            nodes.extend(_flatten(node, axis, names))
    replace_nodes(graph, nodes)


def _flatten(node: onnx.NodeProto, axis: int, names: set[str]) -> Iterator[onnx.NodeProto]:
    source, result = node.input[0], node.output[0]
    shape, flat, answer = (unique_name(f"{result}_{part}", names) for part in ("shape", "flat", "rows"))
    yield helper.make_node("Shape", [source], [shape], name=unique_name(f"Shape:{shape}", names))
    yield helper.make_node("Flatten", [source], [flat], name=unique_name(f"Flatten:{flat}", names), axis=axis)
    node.input[0], node.output[0] = flat, answer
    _set(node, "axis", 1)
    yield node
    yield helper.make_node("Reshape", [answer, shape], [result], name=unique_name(f"Reshape:{result}", names))


def _set(node: onnx.NodeProto, name: str, value: Any) -> None:
    _drop(node, name)
    node.attribute.append(helper.make_attribute(name, value))


def _drop(node: onnx.NodeProto, name: str) -> None:
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _name_apart(
    graph: onnx.GraphProto, known: set[str], taken: set[str], outer: Mapping[str, str] | None = None
) -> None:
    """Give values the converter made names of their own: it counts from the start in each body.

    Args:
        graph: graph to change in place, the bodies of its nodes included.
        known: names of the source. They stay.
        taken: names in use. The new ones are added.
        outer: renamings of enclosing graphs, old -> new.
    """
    renamed = dict(outer or {})
    for tensor in graph.initializer:
        if tensor.name not in known:
            renamed[tensor.name] = tensor.name = unique_name(tensor.name, taken)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        for body in walk.node_graphs(node):
            _name_apart(body, known, taken, renamed)
        for index, name in enumerate(node.output):
            if name and name not in known:
                renamed[name] = node.output[index] = unique_name(name, taken)
    for value in graph.output:
        value.name = renamed.get(value.name, value.name)


def _without_leftovers(draft: Draft) -> Draft:
    """Drop parts without an effect and not carried over by the converter: see above."""
    result = draft.copy()
    for graph in walk.graphs_of(result.graph):
        used = used_names(graph)
        for node in graph.node:
            if node.domain not in ONNX_DOMAINS:
                continue
            if node.op_type == "Dropout" and len(node.output) > 1 and node.output[1] not in used:
                del node.output[1:]
            if node.op_type == "Pad" and attribute(node, "mode", b"constant") != b"constant":
                _drop(node, "value")
    return result


def _restore_resizes(graph: onnx.GraphProto, outer: Mapping[str, Array], names: set[str], *, asymmetric: bool) -> None:
    """Make every Resize compute as before.

    Args:
        graph: graph to change in place, the bodies of its nodes included.
        outer: constants of the enclosing graphs.
        names: in use. New ones are added.
        asymmetric: they were Upsample, or Resize before opset 11.
    """
    constants = {**outer, **{tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for body in walk.node_graphs(node):
            _restore_resizes(body, constants, names, asymmetric=asymmetric)
        if (weight := constant_weight(node)) is not None and weight.tensor is None:
            constants[node.output[0]] = weight.load()
        if node.op_type != "Resize" or node.domain not in ONNX_DOMAINS:
            nodes.append(node)
            continue
        for index in range(1, len(node.input)):
            if node.input[index] in constants and constants[node.input[index]].size == 0:
                node.input[index] = ""
        nodes.extend(_asymmetric(node, constants.get(node.input[2]), names) if asymmetric else [node])
    replace_nodes(graph, nodes)


def _asymmetric(node: onnx.NodeProto, scales: Array | None, names: set[str]) -> Iterator[onnx.NodeProto]:
    """Yield the Resize, as two where it enlarges some axes and shrinks others to the nearest."""
    _set(node, "coordinate_transformation_mode", "asymmetric")
    if attribute(node, "mode", b"nearest") != b"nearest":
        yield node
        return
    shrinks = scales is not None and bool((scales < 1).any())
    if scales is not None and shrinks and (scales > 1).any():
        first = onnx.NodeProto()
        first.CopyFrom(node)
        first.name = unique_name(f"{node.name or node.output[0]}_enlarge", names)
        first.output[0] = node.input[0] = unique_name(f"{node.output[0]}_enlarged", names)
        _set(first, "nearest_mode", "floor")
        for each, part in ((first, np.maximum(scales, 1)), (node, np.minimum(scales, 1))):
            each.input[2] = unique_name(f"{each.output[0]}_scales", names)
            tensor = numpy_helper.from_array(part.astype(np.float32))
            yield helper.make_node(
                "Constant", [], [each.input[2]], name=unique_name(f"Constant:{each.input[2]}", names), value=tensor
            )
        yield first
    _set(node, "nearest_mode", "ceil" if shrinks else "floor")
    yield node


def _draft_of(raised: onnx.ModelProto, draft: Draft, stand_ins: dict[str, Weight]) -> Draft:
    """Take the stand-ins out again, and restore the parts the converter drops: symbols of dims, imports, metadata."""
    weights = dict(stand_ins)
    weights.update({tensor.name: typed_tensor(_owned(tensor)) for tensor in raised.graph.initializer})
    ordered = {name: weights.pop(name) for name in draft.weights if name in weights} | weights
    for field in ("input", "output"):
        raised.graph.ClearField(field)
        getattr(raised.graph, field).extend(getattr(draft.graph, field))
    raised.graph.ClearField("initializer")
    for graph in walk.graphs_of(raised.graph):
        graph.ClearField("value_info")
    known = {entry.domain for entry in raised.opset_import}
    for entry in draft.proto.opset_import:
        if entry.domain not in known and entry.domain not in ONNX_DOMAINS:
            raised.opset_import.append(entry)
    del raised.metadata_props[:]
    raised.metadata_props.extend(draft.proto.metadata_props)
    return Draft(raised, ordered)


def _owned(tensor: onnx.TensorProto) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    return copy
