"""Rules of operators that compute: by element, along axes, products, convolutions, recurrences, quantisation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.onnx_model.batch_layout import LAYOUT_RULES
from repo_manager.onnx_model.batch_values import (
    MAYBE,
    SIZE,
    Call,
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

__all__ = ["COMPUTE_RULES"]

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


def _elementwise(call: Call) -> list[Value]:
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
    """Return the marks of factors; what a known zero meets has no part in the product."""
    marks = [value.marks for value in values]
    for value in values:
        numbers = value.numbers
        if numbers is not None and numbers.size and numbers.size < _MAX_NUMBERS and not np.all(numbers):
            rank = max(each.rank for each in values)
            kept = np.asarray(numbers != 0).reshape((1,) * (rank - value.rank) + value.dims)
            marks = [np.where(kept, each, 0).astype(np.uint16) for each in marks]
    return marks


def _elementwise_numbers(call: Call, shape: tuple[int, ...]) -> NDArray[Any] | None:
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


def _cast(call: Call) -> list[Value]:
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


def _reduce_axes(call: Call, value: Value) -> tuple[int, ...]:
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


def _reduce(call: Call) -> list[Value]:
    value = call.value(0)
    if value.shape is None:  # The sum over what data picked: every pick has a part in it.
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


def _arg(call: Call) -> list[Value]:
    value = call.value(0)
    axis = call.get("axis", 0) % value.rank
    result = _if_one(value, axis, reduced(value, (axis,), keep=bool(call.get("keepdims", 1))))
    if value.dims[axis] == 1 and math.prod(result.dims) <= _MAX_NUMBERS:
        return [replace(result, known=np.zeros(result.dims, np.int64))]
    return [result]


def _if_one(value: Value, axis: int, result: Value) -> Value:
    """Return what is chosen or shared out along an axis: of one element only, that depends on nothing."""
    if value.dims[axis] != 1 or value.is_sized(axis):
        return result
    return Value(result.shape, np.zeros((1,) * result.rank, np.uint16))


def _along(value: Value, axes: Sequence[int]) -> Value:
    """Return what an operator gives that makes each element depend on all along some axes."""
    if not axes or not value.rank:
        return value
    return Value(value.shape, packed(value.marks | reduced(value, axes, keep=True).marks))


def _softmax(call: Call) -> list[Value]:
    value = call.value(0)
    if call.opset >= 13 or call.node.domain not in ("", "ai.onnx"):
        axis = call.get("axis", -1) % value.rank
        return [_if_one(value, axis, _along(value, (axis,)))]
    axis = call.get("axis", 1) % max(value.rank, 1)
    return [_along(value, range(axis, value.rank))]  # One row from there on.


def _norm_axis(default: int) -> Rule:
    def rule(call: Call) -> list[Value]:
        return [_along(call.value(0), (call.get("axis", default),))]

    return rule


def _layer_norm(call: Call) -> list[Value]:
    value = call.value(0)
    axis = call.get("axis", -1) % value.rank
    axes = tuple(range(axis, value.rank))
    result = _along(value, axes)
    shape = value.dims
    if broadcast_shape([each.dims for each in call.given]) != shape:
        raise UnknownError("its scale has another shape")
    scaled = join(shape, [result.marks, *(each.marks for each in call.given[1:])])
    stats = reduced(value, axes, keep=True)
    return [Value(shape, scaled), *[stats] * (len(call.node.output) - 1)]


def _skip_layer_norm(call: Call) -> list[Value]:
    value = call.value(0)
    if broadcast_shape([value.dims, call.value(1).dims]) != value.dims:
        raise UnknownError("what it adds has another shape")
    added = join(value.dims, [value.marks, call.value(1).marks])
    both = Value(value.shape, added, sized=value.sized)
    others = [each.marks for each in call.given[2:]]
    result = Value(value.shape, join(value.dims, [_along(both, (-1,)).marks, *others]))
    stats = reduced(both, (-1,), keep=True)
    return [result, stats, stats, both][: len(call.node.output)]


def _per_channel(call: Call, result: Value) -> Value:
    """Add the parameters that stand one a channel, on axis 1."""
    marks = result.marks
    for each in call.given[1:]:
        marks = marks | each.marks.reshape((1, -1) + (1,) * (result.rank - 2))
    return Value(result.shape, packed(marks))


def _batch_norm(call: Call) -> list[Value]:
    value = call.value(0)
    outputs = len([name for name in call.node.output if name])
    training = bool(call.get("training_mode", 0)) if call.opset >= 14 else outputs > 1
    if not training:
        return [_per_channel(call, value)]
    axes = tuple(axis for axis in range(value.rank) if axis != 1)
    stats = reduced(value, axes, keep=False)
    return [_per_channel(call, _along(value, axes)), *[stats] * (len(call.node.output) - 1)]


def _instance_norm(call: Call) -> list[Value]:
    value = call.value(0)
    return [_per_channel(call, _along(value, range(2, value.rank)))]


def _rowwise(call: Call) -> list[Value]:
    """Each row along axis 0 of the first input, and only that; the shape stays."""
    return [_rows(call, call.value(0).dims, inputs=[0])] * max(1, len(call.node.output))


def _rows(call: Call, shape: tuple[int, ...], *, inputs: Sequence[int] | None = None) -> Value:
    """Return a value whose rows along axis 0 depend on the same rows of the inputs."""
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


def _lrn(call: Call) -> list[Value]:
    return [_along(call.value(0), (1,))]


def _mean_variance(call: Call) -> list[Value]:
    return [_along(call.value(0), call.ints(None, "axes") or (0, 2, 3))]


def _cum(call: Call) -> list[Value]:
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


def _top_k(call: Call) -> list[Value]:
    value = call.value(0)
    axis = call.get("axis", -1) % value.rank
    k = call.integer(1, "k")
    result = reduced(value, (axis,), keep=True)
    if any(total(each) & SIZE for each in call.given[1:]) and not value.varies(axis):
        result = with_marks(result, SIZE)
    shape = tuple(k if each == axis else size for each, size in enumerate(value.dims))
    chosen = Value(shape, result.marks)
    return [chosen, _if_one(value, axis, chosen)]


def _everything(call: Call) -> int:
    """Return the marks of all elements of the first input: a scale, or a set, of the whole tensor."""
    value = call.value(0)
    mark = total(value)
    return mark | SIZE if any(value.sized) and not value.marks.any() else mark


def _dynamic_quantize(call: Call) -> list[Value]:
    value = call.value(0)
    mark = np.uint16(_everything(call))
    scalar = Value((), np.array(mark, np.uint16))
    return [Value(value.shape, np.full((1,) * value.rank, mark, np.uint16)), scalar, scalar]


def _unique(call: Call) -> list[Value]:
    mark = np.array(_everything(call), np.uint16)
    value = Value(None, mark, extent=int(mark))
    return [value] * len(call.node.output)


def _matmul_marks(a: Value, b: Value) -> Value:
    """Return A x B: each element depends on a row and a column."""
    rank_a, rank_b = a.rank, b.rank
    left, right = reduced(a, (-1,), keep=True), reduced(b, (-2 if rank_b > 1 else -1,), keep=True)
    extra = SIZE if a.is_sized(rank_a - 1) or b.is_sized(max(0, rank_b - 2)) else 0
    shape_a, shape_b = a.dims, b.dims
    marks_a, marks_b = left.marks & ~np.uint16(0), right.marks
    if rank_a == 1:
        shape_a, marks_a = (1, *shape_a), marks_a.reshape(1, 1)
    if rank_b == 1:
        shape_b, marks_b = (*shape_b, 1), marks_b.reshape(1, 1)
    if shape_a[-1] != shape_b[-2]:
        raise UnknownError("the matrices do not fit")
    outer = broadcast_shape([shape_a[:-2], shape_b[:-2]])
    shape = (*outer, shape_a[-2], shape_b[-1])
    marks = join(shape, [marks_a, marks_b]) | np.uint16(extra)
    if rank_b == 1:
        shape, marks = shape[:-1], marks[..., 0]
    if rank_a == 1:
        at = len(shape) - 1 if rank_b > 1 else len(shape)
        shape = (*shape[: at - 1], *shape[at:])
        marks = marks.reshape(tuple(np.delete(marks.shape, at - 1)))
    return Value(shape, packed(marks))


def _swapped(value: Value) -> Value:
    axes = (*range(value.rank - 2), value.rank - 1, value.rank - 2)
    sized = tuple(value.is_sized(axis) for axis in axes)
    return Value(tuple(value.dims[axis] for axis in axes), value.marks.transpose(axes), sized=sized)


def _product(a: int, b: int) -> Rule:
    """Matrix products; the other inputs are scales and zero points, or added."""

    def rule(call: Call) -> list[Value]:
        result = _matmul_marks(call.value(a), call.value(b))
        extra = 0
        marks = result.marks
        for index, value in enumerate(call.inputs):
            if value is None or index in (a, b):
                continue
            if value.rank <= result.rank and value.marks.size > 1 and value.rank > 1:
                marks = join(result.dims, [marks, value.marks])
            else:
                extra |= total(value)
        return [Value(result.shape, marks | np.uint16(extra))]

    return rule


def _fused_matmul(call: Call) -> list[Value]:
    a, b = call.value(0), call.value(1)
    if call.get("transBatchA", 0) or call.get("transBatchB", 0):
        raise UnknownError("it transposes the batch")
    a = _swapped(a) if call.get("transA", 0) else a
    b = _swapped(b) if call.get("transB", 0) else b
    return [with_marks(_matmul_marks(a, b), call.extra(without=(0, 1)))]


def _gemm(call: Call) -> list[Value]:
    a, b, c = call.value(0), call.value(1), call.optional(2)
    a = _swapped(a) if call.get("transA", 0) else a
    b = _swapped(b) if call.get("transB", 0) else b
    result = _matmul_marks(a, b)
    if c is None:
        return [result]
    if broadcast_shape([result.dims, c.dims]) != result.dims:
        raise UnknownError("what it adds has another shape")
    return [Value(result.shape, join(result.dims, [result.marks, c.marks]))]


def _qgemm(call: Call) -> list[Value]:
    a, b = call.value(0), call.value(3)
    a = _swapped(a) if call.get("transA", 0) else a
    b = _swapped(b) if call.get("transB", 0) else b
    return [with_marks(_matmul_marks(a, b), call.extra(without=(0, 3)))]


def _matmul_nbits(call: Call) -> list[Value]:
    a = call.value(0)
    rows = reduced(a, (-1,), keep=True)
    return [Value((*a.dims[:-1], call.get("N")), rows.marks | np.uint16(call.extra(without=(0,))))]


def _dynamic_matmul(call: Call) -> list[Value]:
    a, b = call.value(0), call.value(1)
    return [with_marks(_matmul_marks(a, b), call.extra())]  # One scale for all of A.


def _einsum(call: Call) -> list[Value]:
    equation = re.sub(r"\s", "", call.get("equation"))
    operands = call.given
    given, arrow, wanted = equation.partition("->")
    terms = given.split(",")
    if len(terms) != len(operands):
        raise UnknownError("the equation does not fit")
    labels = [_labels(term, value.rank) for term, value in zip(terms, operands, strict=True)]
    widest = max((sum(1 for each in term if each.startswith("...")) for term in labels), default=0)
    dots = [f"...{index}" for index in range(widest)]
    if arrow:
        before, mark, after = wanted.partition("...")
        out = [*before, *(dots if mark else ()), *after]
    else:
        flat = [each for term in labels for each in term]
        out = [*dots, *sorted(each for each in set(flat) if len(each) == 1 and flat.count(each) == 1)]
    sizes: dict[str, int] = {}
    for term, value in zip(labels, operands, strict=True):
        for label, size in zip(term, value.dims, strict=True):
            if 1 not in (size, sizes.get(label, 1)) and size != sizes[label]:
                raise UnknownError("the operands do not fit")
            sizes[label] = max(size, sizes.get(label, 1))
    shape = tuple(sizes[label] for label in out)
    marks = [_einsum_term(term, value, out) for term, value in zip(labels, operands, strict=True)]
    return [Value(shape, packed(join(shape, marks)))]


def _labels(term: str, rank: int) -> list[str]:
    before, mark, after = term.partition("...")
    count = rank - len(before) - len(after) if mark else 0
    # Aligned at the right, as NumPy broadcasts; the callers' widest has the lowest number first.
    return [*before, *(f"...{index}" for index in range(count)), *after]


def _einsum_term(term: Sequence[str], value: Value, out: Sequence[str]) -> Marks:
    marks = value.marks
    names = list(term)
    for label in [each for each in dict.fromkeys(names) if names.count(each) > 1]:  # A diagonal.
        first, second = [axis for axis, each in enumerate(names) if each == label][:2]
        size = value.dims[first]
        stored = np.broadcast_to(
            marks, tuple(size if axis in (first, second) else each for axis, each in enumerate(marks.shape))
        )
        marks = np.moveaxis(np.diagonal(stored, axis1=first, axis2=second), -1, first)
        del names[second]
    gone = tuple(axis for axis, label in enumerate(names) if label not in out)
    sized = any(value.is_sized(axis) for axis, label in enumerate(term) if label not in out)
    marks = np.bitwise_or.reduce(marks, axis=gone, keepdims=False) if gone else marks
    kept = [label for label in names if label in out]
    order = sorted(range(len(kept)), key=lambda axis: list(out).index(kept[axis]))
    marks = marks.transpose(order)
    ordered = [kept[axis] for axis in order]
    shape = [marks.shape[ordered.index(label)] if label in ordered else 1 for label in out]
    return marks.reshape(shape) | np.uint16(SIZE if sized else 0)


def _window(marks: Marks, axis: int, length: int, geometry: tuple[int, int, int, int], out: int) -> Marks:
    """Unite what a sliding window covers; geometry: kernel, stride, dilation, padding before."""
    if marks.shape[axis] == 1:
        return marks
    kernel, stride, dilation, before = geometry
    windows = []
    for position in range(out):
        at = [position * stride + step * dilation - before for step in range(kernel)]
        inside = [each for each in at if 0 <= each < length]
        shape = tuple(1 if each == axis else size for each, size in enumerate(marks.shape))
        part = np.zeros(shape, np.uint16)
        if inside:
            part = np.bitwise_or.reduce(marks.take(inside, axis), axis=axis, keepdims=True)
        windows.append(part)
    return packed(np.concatenate(windows, axis))


def _slide(call: Call, value: Value, kernel: Sequence[int]) -> tuple[Marks, tuple[int, ...]]:
    """Slide a window over the axes from 2 on; return marks and sizes of these axes."""
    spatial = len(kernel)
    strides = call.get("strides") or [1] * spatial
    dilations = call.get("dilations") or [1] * spatial
    pads = call.get("pads") or [0] * (2 * spatial)
    auto = call.get("auto_pad", "NOTSET")
    marks, sizes = value.marks, []
    for index in range(spatial):
        length, reach = value.dims[2 + index], dilations[index] * (kernel[index] - 1) + 1
        before, after = pads[index], pads[spatial + index]
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            out = -(-length // strides[index])
            missing = max(0, (out - 1) * strides[index] + reach - length)
            before = missing // 2 if auto == "SAME_UPPER" else missing - missing // 2
        else:
            if auto == "VALID":
                before = after = 0
            room = length + before + after - reach
            out = room // strides[index] + 1
            if call.get("ceil_mode", 0):
                out = -(-room // strides[index]) + 1
                out -= (out - 1) * strides[index] >= length + before
        if out < 1:
            raise UnknownError("the window is larger than the image")
        sizes.append(out)
        marks = _window(marks, 2 + index, length, (kernel[index], strides[index], dilations[index], before), out)
    return marks, tuple(sizes)


def _convolution(x: int, w: int, bias: int | None) -> Rule:
    def rule(call: Call) -> list[Value]:
        value, weight = call.value(x), call.value(w)
        kernel = call.get("kernel_shape") or weight.dims[2:]
        group = call.get("group", 1)
        if value.dims[1] != weight.dims[1] * group:
            raise UnknownError("its weights have another number of channels")
        marks, sizes = _slide(call, value, kernel)
        outputs = weight.dims[0]
        marks = _by_group(marks, value.dims[1], group, outputs)
        of_weight: Marks = np.bitwise_or.reduce(weight.marks.reshape(weight.marks.shape[0], -1), axis=1)
        marks = marks | of_weight.reshape((1, -1) + (1,) * len(kernel))
        skipped = [x, w]
        offset = None if bias is None else call.optional(bias)
        if bias is not None and offset is not None:
            skipped.append(bias)
            marks = marks | offset.marks.reshape((1, -1) + (1,) * len(kernel))
        marks = marks | np.uint16(call.extra(without=skipped) if call.node.op_type != "FusedConv" else 0)
        if call.node.op_type == "FusedConv":
            for each in call.inputs[3:]:
                marks = marks if each is None else marks | each.marks
        return [Value((value.dims[0], outputs, *sizes), packed(marks))]

    return rule


def _by_group(marks: Marks, channels: int, group: int, outputs: int) -> Marks:
    """Unite the input channels of each group, and repeat that for the group's outputs."""
    if marks.shape[1] == 1:
        return marks
    grouped = marks.reshape((marks.shape[0], group, channels // group, *marks.shape[2:]))
    united: Marks = np.bitwise_or.reduce(grouped, axis=2)
    return np.repeat(united, outputs // group, axis=1)


def _conv_transpose(call: Call) -> list[Value]:
    value, weight = call.value(0), call.value(1)
    spatial = value.rank - 2
    group = call.get("group", 1)
    kernel = call.get("kernel_shape") or weight.dims[2:]
    strides = call.get("strides") or [1] * spatial
    dilations = call.get("dilations") or [1] * spatial
    pads = call.get("pads") or [0] * (2 * spatial)
    padding = call.get("output_padding") or [0] * spatial
    sizes = list(call.get("output_shape") or ())[-spatial:]
    if not sizes:
        for index in range(spatial):
            reach = dilations[index] * (kernel[index] - 1) + 1 + padding[index]
            size = strides[index] * (value.dims[2 + index] - 1) + reach
            same = call.get("auto_pad", "NOTSET").startswith("SAME")
            fixed = value.dims[2 + index] * strides[index]
            sizes.append(fixed if same else size - pads[index] - pads[spatial + index])
    marks: Marks = np.bitwise_or.reduce(value.marks, axis=tuple(range(2, value.rank)), keepdims=True)
    outputs = weight.dims[1] * group
    marks = _by_group(marks, value.dims[1], group, outputs) | np.uint16(call.extra(without=(0,)))
    return [Value((value.dims[0], outputs, *sizes), packed(marks))]


def _pool(call: Call) -> list[Value]:
    value = call.value(0)
    marks, sizes = _slide(call, value, call.get("kernel_shape"))
    result = Value((*value.dims[:2], *sizes), marks | np.uint16(call.extra(without=(0,))))
    if len([name for name in call.node.output if name]) > 1:
        # MaxPool's second output counts through the whole tensor, the batch axis included.
        return [result, with_marks(result, SIZE)]
    return [result]


def _max_unpool(call: Call) -> list[Value]:
    value = call.value(0)
    if total(call.value(1)) & SIZE:
        raise UnknownError("its indices count through the batch")
    return [loose([value])]


def _global_pool(call: Call) -> list[Value]:
    value = call.value(0)
    result = reduced(value, range(2, value.rank), keep=True)
    return [with_marks(result, call.extra(without=(0,)))]


def _resize(call: Call) -> list[Value]:
    value = call.value(0)
    upsample = call.node.op_type == "Upsample"
    sizes = None if upsample or call.opset < 11 else call.optional(3)
    scales = call.optional(1 if upsample or call.opset < 11 else 2)
    axes = [axis % value.rank for axis in call.get("axes") or range(value.rank)]
    shape = list(value.dims)
    if sizes is not None and sizes.shape != (0,):
        wanted = call.ints(3) or ()
        if call.get("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise UnknownError("the sizes are bounds")
        for axis, size in zip(axes, wanted, strict=True):
            shape[axis] = size
    else:
        factors = call.get("scales") if scales is None else scales.numbers
        if factors is None:
            raise UnknownError("the scales are computed from data")
        for axis, factor in zip(axes, np.asarray(factors).reshape(-1), strict=True):
            shape[axis] = math.floor(value.dims[axis] * float(factor) + 1e-6)
    marks = value.marks
    for axis, size in enumerate(shape):
        if size != value.dims[axis] and value.varies(axis):
            marks = np.bitwise_or.reduce(marks, axis=axis, keepdims=True)
    return [Value(tuple(shape), packed(marks))]


def _recurrent(states: int) -> Rule:
    """RNN, GRU (one state) and LSTM (two): time on axis 0, batch on axis 1, the other way round with `layout`."""

    def rule(call: Call) -> list[Value]:
        value, weight = call.value(0), call.value(1)
        batch_first = call.get("layout", 0) == 1
        steps, batch = value.dims[1::-1] if batch_first else value.dims[:2]
        marks = value.marks.transpose(1, 0, 2) if batch_first else value.marks
        marks = np.bitwise_or.reduce(marks, axis=2)
        around = np.uint16(call.extra(without=(0, 4, 5, 6)))
        lengths = call.optional(4)
        if lengths is not None:
            if lengths.dims != (batch,):
                raise UnknownError("it has lengths for another number of samples")
            marks = marks | lengths.marks.reshape(1, -1)
        for index in (5, 6)[:states]:
            state = call.optional(index)
            if state is not None:
                if state.dims[0 if batch_first else 1] != batch:
                    raise UnknownError("it has a state for another number of samples")
                axes = (1, 2) if batch_first else (0, 2)
                marks = marks | np.bitwise_or.reduce(state.marks, axis=axes).reshape(1, -1)
        directions = {"forward": [1], "reverse": [-1], "bidirectional": [1, -1]}[call.get("direction", "forward")]
        flows = [np.bitwise_or.accumulate(marks[::way], axis=0)[::way] for way in directions]
        all_steps = np.stack(np.broadcast_arrays(*flows), axis=1)[..., None] | around
        last: Marks = np.bitwise_or.reduce(all_steps, axis=0)
        hidden = call.get("hidden_size", weight.dims[1] // {"LSTM": 4, "GRU": 3, "RNN": 1}[_base(call)])
        if batch_first:
            full = Value((batch, steps, len(flows), hidden), packed(all_steps.transpose(2, 0, 1, 3)))
            state_value = Value((batch, len(flows), hidden), packed(last.transpose(1, 0, 2)))
        else:
            full = Value((steps, len(flows), batch, hidden), packed(all_steps))
            state_value = Value((len(flows), batch, hidden), packed(last))
        return [full, state_value, state_value][: len(call.node.output)]

    return rule


def _base(call: Call) -> str:
    return call.node.op_type.removeprefix("DynamicQuantize")


def _dynamic_lstm(call: Call) -> list[Value]:
    results = _recurrent(2)(call)
    mark = call.extra()  # One scale for each step's whole input.
    return [with_marks(value, mark) for value in results]


def _quantize(call: Call) -> list[Value]:
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


def _dropout(call: Call) -> list[Value]:
    value = call.value(0)
    training = call.optional(2)
    if training is not None and (training.numbers is None or bool(np.any(training.numbers))):
        return [with_marks(value, MAYBE)] * len(call.node.output)
    return [Value(value.shape, value.marks, value.known, value.sure), Value(value.shape, value.marks & np.uint16(0))]


def _random(call: Call) -> list[Value]:
    """Random numbers are other ones in another place of the batch."""
    shape = call.get("shape")
    if shape is None:
        shape = call.value(0).dims
        if call.node.op_type == "Multinomial":
            shape = (shape[0], call.get("sample_size", 1))
    marks: Marks = np.full((1,) * len(shape), MAYBE, np.uint16)
    if call.given and call.node.op_type in ("Multinomial", "Bernoulli"):
        marks = marks | _rows(call, tuple(shape)).marks
    return [Value(tuple(shape), marks)]


def _loss(call: Call) -> list[Value]:
    value, target = call.value(0), call.value(1)
    if (value.dims[0], *value.dims[2:]) != target.dims:
        raise UnknownError("it has scores for another number of samples")
    each = reduced(value, (1,), keep=False)
    marks = join(target.dims, [each.marks, target.marks])
    result = Value(target.shape, packed(marks), sized=target.sized)
    if call.get("reduction", "mean") != "none":
        result = reduced(result, range(result.rank), keep=False)
    if len(call.node.output) > 1:
        return [result, _along(value, (1,))]
    return [result]


def _quantized_pairs(call: Call) -> list[Value]:
    a, b = call.value(0), call.value(3)
    shape = broadcast_shape([a.dims, b.dims])
    return [Value(shape, join(shape, [a.marks, b.marks]) | np.uint16(call.extra(without=(0, 3))))]


def _quantized_unary(call: Call) -> list[Value]:
    return [with_marks(Value(call.value(0).shape, call.value(0).marks), call.extra(without=(0,)))]


def _quantized_softmax(call: Call) -> list[Value]:
    return [with_marks(_along(call.value(0), (call.get("axis", -1),)), call.extra(without=(0,)))]


def _quantized_concat(call: Call) -> list[Value]:
    values = [call.value(index) for index in range(2, len(call.inputs), 3)]
    inner = Call(call.node, values, call.attributes, call.opset, call.samples)
    extra = call.extra(without=tuple(range(2, len(call.inputs), 3)))
    return [with_marks(value, extra) for value in LAYOUT_RULES["Concat"](inner)]


def _attention(call: Call) -> list[Value]:
    """The fused attentions of ONNX Runtime that start from [batch, length, hidden]: each row by itself."""
    value, weight = call.value(0), call.optional(1)
    sizes = call.get("qkv_hidden_sizes")
    width = sizes[-1] if sizes else value.dims[-1]
    if not sizes and weight is not None and weight.rank == 2:
        width = weight.dims[1] // 3
    shape = (*value.dims[:2], width)
    if len([name for name in call.node.output if name]) > 1:
        raise UnknownError("it keeps a cache")
    return [_rows(call, shape, inputs=[0, 3] if call.node.op_type == "Attention" else [0, 5])]


def _scaled_attention(call: Call) -> list[Value]:
    """ONNX's own Attention: Q, K, V of rank 3 or 4, and a mask that broadcasts."""
    query, value, mask = call.value(0), call.value(2), call.optional(3)
    if len([name for name in call.node.output if name]) > 1 or call.optional(4) is not None:
        raise UnknownError("it keeps a cache")
    if mask is not None and mask.rank < 4 and total(mask):
        raise UnknownError("its mask has no rows")
    width = value.dims[-1]
    if query.rank == 3:
        width = width // call.get("kv_num_heads", 1) * call.get("q_num_heads", 1)
    return [_rows(call, (*query.dims[:-1], width), inputs=(0, 1, 2, 3))]


def _rotary(call: Call) -> list[Value]:
    """Each position turned by its angle; tables per sample have three axes."""
    rows = [0, 1] if call.node.domain == "com.microsoft" else [0, 3]
    tables = [index for index in (1, 2, 3) if index not in rows]
    rows += [index for index in tables if (table := call.optional(index)) is not None and table.rank == 3]
    return [_rows(call, call.value(0).dims, inputs=rows)]


def _multi_head(call: Call) -> list[Value]:
    value = call.value(0)
    if len([name for name in call.node.output if name]) > 1 or value.rank != 3:
        raise UnknownError("it keeps a cache")
    key = call.optional(1)
    marks = _rows(call, value.dims, inputs=(0, 1, 2, 4, 5) if key is not None else (0, 4, 5))
    return [marks]


def _embed_layer_norm(call: Call) -> list[Value]:
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


def _grid_sample(call: Call) -> list[Value]:
    value, grid = call.value(0), call.value(1)
    if value.dims[0] != grid.dims[0]:
        raise UnknownError("it has grids for another number of samples")
    return [_rows(call, (value.dims[0], value.dims[1], *grid.dims[1:-1]))]


def _affine_grid(call: Call) -> list[Value]:
    n, _, *sizes = call.ints(1) or ()
    return [_rows(call, (n, *sizes, len(sizes)), inputs=[0])]


def _deform_conv(call: Call) -> list[Value]:
    value, weight = call.value(0), call.value(1)
    _, sizes = _slide(call, Value(value.shape, np.zeros((1,) * value.rank, np.uint16)), weight.dims[2:])
    return [_rows(call, (value.dims[0], weight.dims[0], *sizes), inputs=[0, 2, 4])]


def _dft(call: Call) -> list[Value]:
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


def _detections(call: Call) -> list[Value]:
    return [_wider(loose(call.given), call.extra())]


def _wider(value: Value, extent: int) -> Value:
    """Return a value whose unknown shape depends on more."""
    return Value(None, value.marks, extent=value.extent | (extent & ~MAYBE))


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

COMPUTE_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_UNARY | _NARY, _elementwise),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), _layer_norm),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _skip_layer_norm),
    **dict.fromkeys(("GroupNormalization", "GroupNorm"), _rowwise),
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"), _global_pool),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys(("RNN", "GRU"), _recurrent(1)),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
    **dict.fromkeys(("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"), _random),
    **dict.fromkeys(("Bernoulli", "Multinomial"), _random),
    **dict.fromkeys(("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"), _loss),
    **dict.fromkeys(("QLinearAdd", "QLinearMul"), _quantized_pairs),
    **dict.fromkeys(("QLinearSigmoid", "QLinearLeakyRelu"), _quantized_unary),
    **dict.fromkeys(("NonMaxSuppression", "RoiAlign", "MaxRoiPool"), _detections),
    **dict.fromkeys(("Cast", "CastLike", "BitCast"), _cast),
    "AffineGrid": _affine_grid,
    "Attention": lambda call: (_attention if call.node.domain == "com.microsoft" else _scaled_attention)(call),
    "BatchNormalization": _batch_norm,
    "Conv": _convolution(0, 1, 2),
    "ConvInteger": _convolution(0, 1, None),
    "ConvTranspose": _conv_transpose,
    "CumProd": _cum,
    "CumSum": _cum,
    "DFT": _dft,
    "DeformConv": _deform_conv,
    "Dropout": _dropout,
    "DynamicQuantizeLSTM": _dynamic_lstm,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "Einsum": _einsum,
    "EmbedLayerNormalization": _embed_layer_norm,
    "FusedConv": _convolution(0, 1, 2),
    "FusedGemm": _gemm,
    "FusedMatMul": _fused_matmul,
    "Gemm": _gemm,
    "GridSample": _grid_sample,
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "LSTM": _recurrent(2),
    "LpNormalization": _norm_axis(-1),
    "MatMul": _product(0, 1),
    "MatMulInteger": _product(0, 1),
    "MatMulIntegerToFloat": _product(0, 1),
    "MatMulNBits": _matmul_nbits,
    "MaxUnpool": _max_unpool,
    "MeanVarianceNormalization": _mean_variance,
    "MultiHeadAttention": _multi_head,
    "QAttention": _attention,
    "QGemm": _qgemm,
    "QLinearAveragePool": _pool,
    "QLinearConcat": _quantized_concat,
    "QLinearConv": _convolution(0, 3, 8),
    "QLinearGlobalAveragePool": _global_pool,
    "QLinearMatMul": _product(0, 3),
    "QLinearSoftmax": _quantized_softmax,
    "RotaryEmbedding": _rotary,
    "TopK": _top_k,
    "Unique": _unique,
}
