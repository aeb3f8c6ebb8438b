"""Raise a draft to a later version of ONNX's operator set."""

from __future__ import annotations

import onnx

from repo_manager.errors import ModelError
from repo_manager.onnx_model import walk
from repo_manager.onnx_model.draft import ONNX_DOMAINS, Draft, Weight, opset_of, typed_tensor

__all__ = ["raise_opset"]

_SMALL_WEIGHT = 1024  # elements; larger ones stand in as inputs, so that the converter never sees their values


def raise_opset(draft: Draft, minimum: int) -> Draft:
    """Convert ONNX's own operators to at least opset `minimum`; a draft that is there already is returned as it is.

    Ensures: same weights; operators of other domains untouched.

    Raises:
        ModelError: onnx has no conversion for an operator of this model.
    """
    found = opset_of(draft.proto)
    if found >= minimum or found == 0:
        return draft
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(draft.proto)
    skeleton.ir_version = max(
        skeleton.ir_version, onnx.helper.find_min_ir_version_for(_imports(minimum), ignore_unknown=True)
    )
    stand_ins: dict[str, Weight] = {}
    for name, weight in draft.weights.items():
        if weight.size <= _SMALL_WEIGHT and weight.tensor is None:
            skeleton.graph.initializer.append(onnx.numpy_helper.from_array(weight.load(), name))
        else:
            skeleton.graph.input.append(onnx.helper.make_tensor_value_info(name, weight.data_type, weight.shape))
            stand_ins[name] = weight
    try:
        raised = onnx.version_converter.convert_version(skeleton, minimum)
    except (RuntimeError, ValueError, onnx.version_converter.ConvertError) as exc:
        reason = str(exc).strip().splitlines()[-1] if str(exc).strip() else type(exc).__name__
        raise ModelError(
            f"the model is of opset {found} and this precision needs {minimum}: onnx cannot convert it ({reason})",
            hint=f"Export the model again with opset {minimum} or later.",
        ) from exc
    return _draft_of(raised, draft, stand_ins)


def _imports(minimum: int) -> list[onnx.OperatorSetIdProto]:
    return [onnx.helper.make_opsetid("", minimum)]


def _draft_of(raised: onnx.ModelProto, draft: Draft, stand_ins: dict[str, Weight]) -> Draft:
    """Take the stand-ins out again, and restore what the converter drops: symbols of dims, imports, metadata."""
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
