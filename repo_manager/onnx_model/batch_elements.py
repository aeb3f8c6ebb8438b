"""Rules of operators by element or along axes: arithmetic, casts, reductions, normalisations, sorting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.onnx_model.batch_values import (
    SIZE,
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

__all__ = ["ELEMENT_RULES", "along", "by_rows"]

_NUMBERS: Mapping[str, Callable[..., Any]] = {
    "Abs": np.abs,
    "Add": np.add,
    "And": np.logical_and,
    "Ceil": np.ceil,
    "Equal": np.equal,
    "Floor": np.floor,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Max": lambda *each: np.maximum.reduce(np.broadcast_arrays(*each)),
    "Min": lambda *each: np.minimum.reduce(np.broadcast_arrays(*each)),
    "Mul": np.multiply,
    "Neg": np.negative,
    "Not": np.logical_not,
    "Or": np.logical_or,
    "Pow": np.power,
    "Round": np.round,
    "Sign": np.sign,
    "Sqrt": np.sqrt,
    "Sub": np.subtract,
    "Where": np.where,
    "Xor": np.logical_xor,
}
"""Elementwise operators whose small results are worth knowing: shapes, indices and masks are made of them."""

_MAX_NUMBERS = 1 << 16


_FLOAT, _FLOAT16, _DOUBLE, _BOOL = 1, 10, 11, 9


def _elementwise(call: BatchCall) -> list[Value]:
    values = call.given
    unknown = [value for value in values if value.shape is None]
    if unknown:
        return [loose(values)] * len(call.node.output)
    shape = broadcast_shape([value.dims for value in values])
    op = call.node.op_type
    marks = [value.marks for value in values]
    if op == "Where" and values[0].numbers is not None:
        condition, yes, no = _aligned([values[0].numbers, values[1].marks, values[2].marks])
        marks = [packed(np.where(condition, yes, no)), values[0].marks]
    elif op in ("Mul", "And"):
        marks = _without_zeros(values)
    known = _elementwise_numbers(call, shape)
    joined = join(shape, marks)
    return [Value(shape, packed(joined) if op in ("Where", "Mul", "And") else joined, known)] * len(call.node.output)


def _aligned(arrays: Sequence[NDArray[Any] | None]) -> list[NDArray[Any]]:
    """Give arrays one rank, as broadcasting does."""
    found = [np.asarray(each) for each in arrays]
    rank = max(each.ndim for each in found)
    return [each.reshape((1,) * (rank - each.ndim) + each.shape) for each in found]


def _without_zeros(values: Sequence[Value]) -> list[Marks]:
    """Return the marks of factors. A factor of a known zero has no part in the product."""
    marks = [value.marks for value in values]
    for value in values:
        numbers = value.numbers
        if numbers is not None and numbers.size and numbers.size < _MAX_NUMBERS and not np.all(numbers):
            rank = max(each.rank for each in values)
            kept = np.asarray(numbers != 0).reshape((1,) * (rank - value.rank) + value.dims)
            marks = [np.where(kept, each, 0).astype(np.uint16) for each in marks]
    return marks


def _elementwise_numbers(call: BatchCall, shape: tuple[int, ...]) -> NDArray[Any] | None:
    numbers = [value.numbers for value in call.given]
    if math.prod(shape) > _MAX_NUMBERS or any(each is None for each in numbers):
        return None
    op = call.node.op_type
    arrays = [np.asarray(each) for each in numbers]
    with np.errstate(all="ignore"):
        if op in _NUMBERS:
            return np.broadcast_to(_NUMBERS[op](*arrays), shape)
        if op == "Div":
            if arrays[0].dtype.kind in "iu":
                return np.trunc(arrays[0] / arrays[1]).astype(arrays[0].dtype) if np.all(arrays[1]) else None
            return np.asarray(arrays[0] / arrays[1])
        if op == "Mod":
            function = np.fmod if call.get("fmod", 0) else np.mod
            return np.asarray(function(*arrays)) if np.all(arrays[1]) else None
    return None


def _cast(call: BatchCall) -> list[Value]:
    value = call.value(0)
    if value.shape is None:
        return [loose([value])]
    known = value.known
    to = call.get("to")
    if known is not None:
        if to == _BOOL:
            known = known.astype(bool)
        elif to in (_FLOAT, _FLOAT16, _DOUBLE):
            known = known.astype(np.float64)
        elif to is None:
            known = None
        elif known.dtype.kind in "fb":
            known = np.trunc(known.astype(np.float64)).astype(np.int64) if np.isfinite(known).all() else None
    return [Value(value.shape, value.marks, known, None if known is None else value.sure)]


def _reduce_axes(call: BatchCall, value: Value) -> tuple[int, ...]:
    axes = call.ints(1, "axes")
    if not axes:
        return () if call.get("noop_with_empty_axes", 0) else tuple(range(value.rank))
    return axes


_REDUCERS: Mapping[str, Callable[..., Any]] = {
    "ReduceMax": np.max,
    "ReduceMin": np.min,
    "ReduceProd": np.prod,
    "ReduceSum": np.sum,
}


def _reduce(call: BatchCall) -> list[Value]:
    value = call.value(0)
    if value.shape is None:  # data decides the number of elements: every element contributes
        marks = value.extent | total(value)
        return [Value(None, np.array(marks, np.uint16), extent=value.extent)]
    axes = _reduce_axes(call, value)
    keep = bool(call.get("keepdims", 1))
    result = reduced(value, axes, keep=keep) if axes else value
    function = _REDUCERS.get(call.node.op_type)
    if function is not None and value.numbers is not None and axes and value.numbers.size:
        at = tuple(axis % value.rank for axis in axes) if value.rank else None
        known = np.asarray(function(np.broadcast_to(value.numbers, value.dims), axis=at, keepdims=keep))
        return [Value(result.shape, result.marks, known)]
    return [Value(result.shape, result.marks)]


def _arg(call: BatchCall) -> list[Value]:
    value = call.value(0)
    axis = call.get("axis", 0) % value.rank
    result = _if_one(value, axis, reduced(value, (axis,), keep=bool(call.get("keepdims", 1))))
    if value.dims[axis] == 1 and math.prod(result.dims) <= _MAX_NUMBERS:
        return [replace(result, known=np.zeros(result.dims, np.int64))]
    return [result]


def _if_one(value: Value, axis: int, result: Value) -> Value:
    """Return the result of a choice or share along an axis: of one element only, it depends on nothing."""
    if value.dims[axis] != 1 or value.is_sized(axis):
        return result
    return Value(result.shape, np.zeros((1,) * result.rank, np.uint16))


def along(value: Value, axes: Sequence[int]) -> Value:
    """Return the result of an operator whose elements depend on all others along some axes."""
    if not axes or not value.rank:
        return value
    return Value(value.shape, packed(value.marks | reduced(value, axes, keep=True).marks))


def _softmax(call: BatchCall) -> list[Value]:
    value = call.value(0)
    if call.opset >= 13 or call.node.domain not in ("", "ai.onnx"):
        axis = call.get("axis", -1) % value.rank
        return [_if_one(value, axis, along(value, (axis,)))]
    axis = call.get("axis", 1) % max(value.rank, 1)
    return [along(value, range(axis, value.rank))]  # flattened to one row from this axis on


def _norm_axis(default: int) -> Rule:
    def rule(call: BatchCall) -> list[Value]:
        return [along(call.value(0), (call.get("axis", default),))]

    return rule


def _layer_norm(call: BatchCall) -> list[Value]:
    value = call.value(0)
    axis = call.get("axis", -1) % value.rank
    axes = tuple(range(axis, value.rank))
    result = along(value, axes)
    shape = value.dims
    if broadcast_shape([each.dims for each in call.given]) != shape:
        raise UnknownError("its scale has another shape")
    scaled = join(shape, [result.marks, *(each.marks for each in call.given[1:])])
    stats = reduced(value, axes, keep=True)
    return [Value(shape, scaled), *[stats] * (len(call.node.output) - 1)]


def _skip_layer_norm(call: BatchCall) -> list[Value]:
    value = call.value(0)
    if broadcast_shape([value.dims, call.value(1).dims]) != value.dims:
        raise UnknownError("what it adds has another shape")
    added = join(value.dims, [value.marks, call.value(1).marks])
    both = Value(value.shape, added, sized=value.sized)
    others = [each.marks for each in call.given[2:]]
    result = Value(value.shape, join(value.dims, [along(both, (-1,)).marks, *others]))
    stats = reduced(both, (-1,), keep=True)
    return [result, stats, stats, both][: len(call.node.output)]


def _per_channel(call: BatchCall, result: Value) -> Value:
    """Add the parameters given one a channel, on axis 1."""
    marks = result.marks
    for each in call.given[1:]:
        marks = marks | each.marks.reshape((1, -1) + (1,) * (result.rank - 2))
    return Value(result.shape, packed(marks))


def _batch_norm(call: BatchCall) -> list[Value]:
    value = call.value(0)
    outputs = len([name for name in call.node.output if name])
    training = bool(call.get("training_mode", 0)) if call.opset >= 14 else outputs > 1
    if not training:
        return [_per_channel(call, value)]
    axes = tuple(axis for axis in range(value.rank) if axis != 1)
    stats = reduced(value, axes, keep=False)
    return [_per_channel(call, along(value, axes)), *[stats] * (len(call.node.output) - 1)]


def _instance_norm(call: BatchCall) -> list[Value]:
    value = call.value(0)
    return [_per_channel(call, along(value, range(2, value.rank)))]


def _rowwise(call: BatchCall) -> list[Value]:
    """Each row along axis 0 of the first input, and nothing else. The shape stays."""
    return [by_rows(call, call.value(0).dims, inputs=[0])] * max(1, len(call.node.output))


def by_rows(call: BatchCall, shape: tuple[int, ...], *, inputs: Sequence[int] | None = None) -> Value:
    """Return a value whose rows along axis 0 depend on the same rows of the inputs.

    Args:
        call: the node and its inputs.
        shape: shape of the result. Each counted input has as many rows, or one.
        inputs: positions of the inputs to count. `None`: all inputs.
    """
    marks: Marks = np.zeros((1,) * len(shape), np.uint16)
    for index, value in enumerate(call.inputs):
        if value is None:
            continue
        if value.rank == 0 or (inputs is not None and index not in inputs):
            marks = marks | np.uint16(total(value))
            continue
        each: Marks = np.bitwise_or.reduce(value.marks.reshape(value.marks.shape[0], -1), axis=1)
        if value.dims[0] not in (1, shape[0]):
            raise UnknownError("an input has other rows")
        marks = marks | each.reshape((-1,) + (1,) * (len(shape) - 1))
    return Value(shape, packed(marks))


def _lrn(call: BatchCall) -> list[Value]:
    return [along(call.value(0), (1,))]


def _mean_variance(call: BatchCall) -> list[Value]:
    return [along(call.value(0), call.ints(None, "axes") or (0, 2, 3))]


def _cum(call: BatchCall) -> list[Value]:
    value = call.value(0)
    axis = call.integer(1) % value.rank
    marks = value.marks
    if value.varies(axis):
        marks = np.flip(marks, axis) if call.get("reverse", 0) else marks
        marks = np.bitwise_or.accumulate(marks, axis)
        if call.get("exclusive", 0):
            marks = np.roll(marks, 1, axis)
            first = tuple(slice(0, 1) if each == axis else slice(None) for each in range(value.rank))
            marks[first] = 0
        marks = np.flip(marks, axis) if call.get("reverse", 0) else marks
    elif value.is_sized(axis) and value.numbers is None:
        marks = marks | np.uint16(SIZE)
    known = None
    if value.numbers is not None:
        ones = np.broadcast_to(value.numbers, value.dims)
        ones = np.flip(ones, axis) if call.get("reverse", 0) else ones
        known = np.cumsum(ones, axis, dtype=ones.dtype if ones.dtype.kind != "b" else np.int64)
        known = known - ones if call.get("exclusive", 0) else known
        known = np.flip(known, axis) if call.get("reverse", 0) else known
        marks = marks | np.uint16(SIZE if value.is_sized(axis) else 0)
    return [Value(value.shape, packed(marks), known)]


def _top_k(call: BatchCall) -> list[Value]:
    value = call.value(0)
    axis = call.get("axis", -1) % value.rank
    k = call.integer(1, "k")
    result = reduced(value, (axis,), keep=True)
    if any(total(each) & SIZE for each in call.given[1:]) and not value.varies(axis):
        result = with_marks(result, SIZE)
    shape = tuple(k if each == axis else size for each, size in enumerate(value.dims))
    chosen = Value(shape, result.marks)
    return [chosen, _if_one(value, axis, chosen)]


def _everything(call: BatchCall) -> int:
    """Return the marks of all elements of the first input: a scale, or a set, of the whole tensor."""
    value = call.value(0)
    mark = total(value)
    return mark | SIZE if any(value.sized) and not value.marks.any() else mark


def _dynamic_quantize(call: BatchCall) -> list[Value]:
    value = call.value(0)
    mark = np.uint16(_everything(call))
    scalar = Value((), np.array(mark, np.uint16))
    return [Value(value.shape, np.full((1,) * value.rank, mark, np.uint16)), scalar, scalar]


def _unique(call: BatchCall) -> list[Value]:
    mark = np.array(_everything(call), np.uint16)
    value = Value(None, mark, extent=int(mark))
    return [value] * len(call.node.output)


_UNARY = {
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Ceil", "Celu", "Cos", "Cosh", "Elu"),
    *("Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg"),
    *("Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign"),
    *(
        "Sqrt",
        "Swish",
        "Tan",
        "Tanh",
        "ThresholdedRelu",
        "Affine",
        "ParametricSoftplus",
        "ScaledTanh",
        "RegexFullMatch",
    ),
    *("LabelEncoder", "Binarizer", "QuickGelu", "ImageScaler"),
}


_NARY = {
    *("Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual"),
    *("Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor"),
    *("Clip", "StringConcat", "BiasGelu", "FastGelu", "BiasAdd", "BiasDropout"),
}


_REDUCE = {
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("ReduceProd", "ReduceSum", "ReduceSumSquare"),
}


ELEMENT_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_UNARY | _NARY, _elementwise),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), _layer_norm),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _skip_layer_norm),
    **dict.fromkeys(("GroupNormalization", "GroupNorm"), _rowwise),
    **dict.fromkeys(("Cast", "CastLike", "BitCast"), _cast),
    "BatchNormalization": _batch_norm,
    "CumProd": _cum,
    "CumSum": _cum,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "LpNormalization": _norm_axis(-1),
    "MeanVarianceNormalization": _mean_variance,
    "TopK": _top_k,
    "Unique": _unique,
}
