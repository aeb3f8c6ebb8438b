"""Rules of computing operators: the table of all. Here quantisation, attention, noise and losses."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from repo_manager.onnx_model.batch_elements import ELEMENT_RULES, along, by_rows
from repo_manager.onnx_model.batch_layout import LAYOUT_RULES
from repo_manager.onnx_model.batch_products import PRODUCT_RULES
from repo_manager.onnx_model.batch_values import (
    MAYBE,
    BatchCall,
    Marks,
    Rule,
    UnknownError,
    Value,
    broadcast_shape,
    join,
    loose,
    packed,
    reduced,
    total,
    with_marks,
)
from repo_manager.onnx_model.batch_windows import WINDOW_RULES

__all__ = ["COMPUTE_RULES"]


def _quantize(call: BatchCall) -> list[Value]:
    value = call.value(0)
    axis = call.get("axis", 1)
    marks = value.marks
    for each in call.given[1:]:
        at = axis % max(value.rank, 1)
        if each.rank == value.rank and value.rank > 1:
            if any(size != value.dims[a] for a, size in enumerate(each.dims) if a != at) or value.varies(at):
                raise UnknownError("it has scales for another number of samples")
            marks = marks | np.uint16(total(each))
        elif math.prod(each.dims) == 1:
            marks = marks | each.marks.reshape(())
        else:
            if each.dims[0] != value.dims[at]:
                raise UnknownError("it has scales for another number of samples")
            marks = marks | each.marks.reshape(tuple(-1 if each_axis == at else 1 for each_axis in range(value.rank)))
    return [Value(value.shape, marks)]


def _dropout(call: BatchCall) -> list[Value]:
    value = call.value(0)
    training = call.optional(2)
    if training is not None and (training.numbers is None or bool(np.any(training.numbers))):
        return [with_marks(value, MAYBE)] * len(call.node.output)
    return [Value(value.shape, value.marks, value.known, value.sure), Value(value.shape, value.marks & np.uint16(0))]


def _random(call: BatchCall) -> list[Value]:
    """Random numbers are other ones in another place of the batch."""
    shape = call.get("shape")
    if shape is None:
        shape = call.value(0).dims
        if call.node.op_type == "Multinomial":
            shape = (shape[0], call.get("sample_size", 1))
    marks: Marks = np.full((1,) * len(shape), MAYBE, np.uint16)
    if call.given and call.node.op_type in ("Multinomial", "Bernoulli"):
        marks = marks | by_rows(call, tuple(shape)).marks
    return [Value(tuple(shape), marks)]


def _loss(call: BatchCall) -> list[Value]:
    value, target = call.value(0), call.value(1)
    if (value.dims[0], *value.dims[2:]) != target.dims:
        raise UnknownError("it has scores for another number of samples")
    each = reduced(value, (1,), keep=False)
    marks = join(target.dims, [each.marks, target.marks])
    result = Value(target.shape, packed(marks), sized=target.sized)
    if call.get("reduction", "mean") != "none":
        result = reduced(result, range(result.rank), keep=False)
    if len(call.node.output) > 1:
        return [result, along(value, (1,))]
    return [result]


def _quantized_pairs(call: BatchCall) -> list[Value]:
    a, b = call.value(0), call.value(3)
    shape = broadcast_shape([a.dims, b.dims])
    return [Value(shape, join(shape, [a.marks, b.marks]) | np.uint16(call.extra(without=(0, 3))))]


def _quantized_unary(call: BatchCall) -> list[Value]:
    return [with_marks(Value(call.value(0).shape, call.value(0).marks), call.extra(without=(0,)))]


def _quantized_softmax(call: BatchCall) -> list[Value]:
    return [with_marks(along(call.value(0), (call.get("axis", -1),)), call.extra(without=(0,)))]


def _quantized_concat(call: BatchCall) -> list[Value]:
    values = [call.value(index) for index in range(2, len(call.inputs), 3)]
    inner = BatchCall(call.node, values, call.attributes, call.opset, call.samples)
    extra = call.extra(without=tuple(range(2, len(call.inputs), 3)))
    return [with_marks(value, extra) for value in LAYOUT_RULES["Concat"](inner)]


def _attention(call: BatchCall) -> list[Value]:
    """The fused attentions of ONNX Runtime on [batch, length, hidden]: each row on its own."""
    value, weight = call.value(0), call.optional(1)
    sizes = call.get("qkv_hidden_sizes")
    width = sizes[-1] if sizes else value.dims[-1]
    if not sizes and weight is not None and weight.rank == 2:
        width = weight.dims[1] // 3
    shape = (*value.dims[:2], width)
    if len([name for name in call.node.output if name]) > 1:
        raise UnknownError("it keeps a cache")
    return [by_rows(call, shape, inputs=[0, 3] if call.node.op_type == "Attention" else [0, 5])]


def _scaled_attention(call: BatchCall) -> list[Value]:
    """ONNX's own Attention: Q, K, V of rank 3 or 4, and a broadcast mask."""
    query, value, mask = call.value(0), call.value(2), call.optional(3)
    if len([name for name in call.node.output if name]) > 1 or call.optional(4) is not None:
        raise UnknownError("it keeps a cache")
    if mask is not None and mask.rank < 4 and total(mask):
        raise UnknownError("its mask has no rows")
    width = value.dims[-1]
    if query.rank == 3:
        width = width // call.get("kv_num_heads", 1) * call.get("q_num_heads", 1)
    return [by_rows(call, (*query.dims[:-1], width), inputs=(0, 1, 2, 3))]


def _rotary(call: BatchCall) -> list[Value]:
    """Each position turned by its angle. Tables per sample have three axes."""
    rows = [0, 1] if call.node.domain == "com.microsoft" else [0, 3]
    tables = [index for index in (1, 2, 3) if index not in rows]
    rows += [index for index in tables if (table := call.optional(index)) is not None and table.rank == 3]
    return [by_rows(call, call.value(0).dims, inputs=rows)]


def _multi_head(call: BatchCall) -> list[Value]:
    value = call.value(0)
    if len([name for name in call.node.output if name]) > 1 or value.rank != 3:
        raise UnknownError("it keeps a cache")
    key = call.optional(1)
    marks = by_rows(call, value.dims, inputs=(0, 1, 2, 4, 5) if key is not None else (0, 4, 5))
    return [marks]


def _embed_layer_norm(call: BatchCall) -> list[Value]:
    ids, table = call.value(0), call.value(2)
    shape = (*ids.dims, table.dims[1])
    positions = call.optional(8)
    marks = [ids.marks[..., None]]
    for each in (call.optional(1), positions):
        if each is not None:
            marks.append(each.marks[..., None])
    mask = call.optional(7)
    of_mask = np.zeros((1,), np.uint16)
    if mask is not None:
        of_mask = np.bitwise_or.reduce(mask.marks, axis=1)
    return [Value(shape, join(shape, marks)), Value(ids.dims[:1], packed(of_mask)), Value(shape, join(shape, marks))]


def _dft(call: BatchCall) -> list[Value]:
    value = call.value(0)
    axis = call.integer(2, "axis", 1 if call.opset < 20 else -2) % value.rank
    length = call.optional(1)
    if length is not None or call.get("onesided", 0):
        size = value.dims[axis] if length is None else call.integer(1)
        size = size // 2 + 1 if call.get("onesided", 0) else size
    else:
        size = value.dims[axis]
    shape = [size if each == axis else each_size for each, each_size in enumerate(value.dims)]
    shape[-1] = 2
    return [Value(tuple(shape), reduced(value, (axis, value.rank - 1), keep=True).marks)]


def _detections(call: BatchCall) -> list[Value]:
    return [_wider(loose(call.given), call.extra())]


def _wider(value: Value, extent: int) -> Value:
    """Return a value whose unknown shape depends on more."""
    return Value(None, value.marks, extent=value.extent | (extent & ~MAYBE))


COMPUTE_RULES: Mapping[str, Rule] = {
    **ELEMENT_RULES,
    **PRODUCT_RULES,
    **WINDOW_RULES,
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
    **dict.fromkeys(("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"), _random),
    **dict.fromkeys(("Bernoulli", "Multinomial"), _random),
    **dict.fromkeys(("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"), _loss),
    **dict.fromkeys(("QLinearAdd", "QLinearMul"), _quantized_pairs),
    **dict.fromkeys(("QLinearSigmoid", "QLinearLeakyRelu"), _quantized_unary),
    **dict.fromkeys(("NonMaxSuppression", "RoiAlign", "MaxRoiPool"), _detections),
    "Attention": lambda call: (_attention if call.node.domain == "com.microsoft" else _scaled_attention)(call),
    "DFT": _dft,
    "Dropout": _dropout,
    "EmbedLayerNormalization": _embed_layer_norm,
    "MultiHeadAttention": _multi_head,
    "QAttention": _attention,
    "QLinearConcat": _quantized_concat,
    "QLinearSoftmax": _quantized_softmax,
    "RotaryEmbedding": _rotary,
}
