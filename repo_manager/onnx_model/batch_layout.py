"""Rules of operators to move elements, cut some out, or make shapes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.onnx_model.batch_values import (
    MAYBE,
    SAMPLES,
    SIZE,
    BatchCall,
    Rule,
    UnknownError,
    Value,
    broadcast_shape,
    constant,
    join,
    loose,
    packed,
    restructured,
    total,
    with_marks,
)
from repo_manager.optional import deferred

if TYPE_CHECKING:
    from onnx import numpy_helper
else:
    numpy_helper = deferred("onnx.numpy_helper")

__all__ = ["LAYOUT_RULES", "cut_out", "reshaped"]


def reshaped(value: Value, shape: Sequence[int]) -> Value:
    """Return a value in another shape of as many elements."""
    dims = tuple(shape)
    if math.prod(dims) != math.prod(value.dims):
        raise UnknownError(f"{list(value.dims)} does not fit into {list(dims)}")
    rows = value.marks.shape[:1]
    simple = value.marks.size == 1 or (dims[:1] == value.dims[:1] and math.prod(rows) == value.marks.size)
    if simple and value.known is None:
        size = value.marks.size
        return Value(dims, value.marks.reshape([size if axis == 0 else 1 for axis in range(len(dims))]))
    return restructured(value, lambda array: array.reshape(dims))


def _reshape(call: BatchCall) -> list[Value]:
    value = call.value(0)
    wanted = list(call.ints(1, "shape") or ())
    if not call.get("allowzero", 0):
        wanted = [value.dims[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    if -1 in wanted:
        rest = math.prod(size for size in wanted if size != -1)
        wanted[wanted.index(-1)] = math.prod(value.dims) // rest if rest else 0
    return [reshaped(value, wanted)]


def _flatten(call: BatchCall) -> list[Value]:
    value = call.value(0)
    axis = call.get("axis", 1)
    axis = axis + value.rank if axis < 0 else axis
    return [reshaped(value, (math.prod(value.dims[:axis]), math.prod(value.dims[axis:])))]


def _squeeze(call: BatchCall) -> list[Value]:
    value = call.value(0)
    axes = call.ints(1, "axes")
    gone = {axis for axis, size in enumerate(value.dims) if size == 1} if axes is None else _axes(axes, value.rank)
    if axes is None and any(value.is_sized(axis) for axis in gone):
        raise UnknownError("it drops the batch axis for one sample")
    return [restructured(value, lambda array: array.squeeze(tuple(gone)))]


def _axes(axes: Sequence[int], rank: int) -> set[int]:
    return {axis + rank if axis < 0 else axis for axis in axes}


def _unsqueeze(call: BatchCall) -> list[Value]:
    value = call.value(0)
    axes = call.ints(1, "axes") or ()
    return [restructured(value, lambda array: np.expand_dims(array, tuple(axes)))]


def _transpose(call: BatchCall) -> list[Value]:
    value = call.value(0)
    perm = call.get("perm") or list(range(value.rank))[::-1]
    known = None if value.known is None else np.broadcast_to(value.known, value.dims).transpose(perm)
    sure = None if value.sure is None else np.broadcast_to(value.sure, value.dims).transpose(perm)
    return [Value(tuple(value.dims[axis] for axis in perm), value.marks.transpose(perm), known, sure)]


def _expand(call: BatchCall) -> list[Value]:
    value = call.value(0)
    shape = broadcast_shape([value.dims, call.ints(1) or ()])
    if value.known is None:
        return [Value(shape, join(shape, [value.marks]))]
    return [restructured(value, lambda array: np.broadcast_to(array, shape))]


def _tile(call: BatchCall) -> list[Value]:
    value = call.value(0)
    repeats = call.ints(1) or ()
    return [restructured(value, lambda array: np.tile(array, repeats))]


def _concat(call: BatchCall) -> list[Value]:
    values = call.given
    axis = call.integer(None, "axis", 1) % values[0].rank
    if len(values) == 1:
        return [replace(values[0], blame=None)]
    shape = list(values[0].dims)
    shape[axis] = sum(value.dims[axis] for value in values)
    if all(not value.varies(axis) for value in values):
        masks = [np.broadcast_to(v.marks, broadcast_shape([v.marks.shape])) for v in values if v.dims[axis]]
        if masks and all(mask.shape == masks[0].shape and (mask == masks[0]).all() for mask in masks):
            known, sure = _concat_known(values, axis)
            return [Value(tuple(shape), masks[0], known, sure)]
    if math.prod(shape) > 1 << 26:
        raise UnknownError("a value is too large")
    sizes = broadcast_shape([tuple(s if a != axis else 1 for a, s in enumerate(v.marks.shape)) for v in values])
    parts = [np.broadcast_to(v.marks, (*sizes[:axis], v.dims[axis], *sizes[axis + 1 :])) for v in values]
    known, sure = _concat_known(values, axis)
    result = Value(tuple(shape), packed(np.concatenate(parts, axis)), known, sure)
    along = any(value.varies(axis) for value in values)
    if along and any(value.dims[axis] % call.samples for value in values) and total(result) & SAMPLES:
        return [with_marks(result, MAYBE)]  # only some places of the batch have rows of their own
    return [result]


def _concat_known(values: Sequence[Value], axis: int) -> tuple[NDArray[Any] | None, NDArray[np.bool_] | None]:
    """Join the facts of some values. An unknown value leaves a gap."""
    if all(value.known is None for value in values) or sum(math.prod(value.dims) for value in values) > 1 << 16:
        return None, None
    known = [np.zeros(v.dims, np.int64) if v.known is None else np.broadcast_to(v.known, v.dims) for v in values]
    if all(value.numbers is not None for value in values):
        return np.concatenate(known, axis), None
    sure = [
        np.zeros(v.dims, np.bool_)
        if v.known is None
        else np.broadcast_to(v.sure if v.sure is not None else True, v.dims)
        for v in values
    ]
    return np.concatenate(known, axis), np.concatenate(sure, axis)


def _split(call: BatchCall) -> list[Value]:
    value = call.value(0)
    axis = call.get("axis", 0) % value.rank
    count = len(call.node.output)
    sizes = call.ints(1, "split")
    if sizes is None:
        count = call.get("num_outputs", count)
        each = -(-value.dims[axis] // count)
        sizes = tuple(min(each, value.dims[axis] - each * index) for index in range(count))
        if value.is_sized(axis) and not value.varies(axis):
            value = with_marks(value, SIZE)
    ends = np.cumsum(sizes)
    starts = ends - np.array(sizes)
    return [cut_out(value, {axis: slice(start, end)}) for start, end in zip(starts, ends, strict=True)]


def cut_out(value: Value, slices: Mapping[int, slice]) -> Value:
    """Slice some axes. Others stay as they are stored."""
    index = tuple(slices.get(axis, slice(None)) for axis in range(value.rank))
    shape = tuple(len(range(*each.indices(size))) for each, size in zip(index, value.dims, strict=True))
    stored = tuple(each if value.varies(axis) else slice(None) for axis, each in enumerate(index))
    known = None if value.known is None else np.broadcast_to(value.known, value.dims)[index]
    sure = None if value.sure is None else np.broadcast_to(value.sure, value.dims)[index]
    return Value(shape, packed(value.marks[stored]), known, None if sure is None or sure.all() else sure)


def _slice(call: BatchCall) -> list[Value]:
    value = call.value(0)
    starts, ends = call.ints(1, "starts") or (), call.ints(2, "ends") or ()
    axes = call.ints(3, "axes") or tuple(range(len(starts)))
    steps = call.ints(4) or (1,) * len(starts)
    slices = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        at = axis % value.rank
        size = value.dims[at]
        # ONNX clamps a start below -size to 0. NumPy's slices do the same, except with a negative step.
        stop: int | None = end
        if step < 0 and end < -size:
            stop = None
        slices[at] = slice(start, stop, step)
    result = cut_out(value, slices)
    bounds = [call.optional(index) for index in (1, 2)]
    if any(bound is not None and total(bound) & SIZE for bound in bounds) and value.known is None:
        # The bounds depend on the batch size. A cut of the batch axis or of a uniform constant is harmless. Any other
        # cut makes the values depend on the batch size.
        sliced = [axis for axis in slices if result.dims[axis] != value.dims[axis]]
        if any(not value.varies(axis) for axis in sliced) and (total(value) & SAMPLES or not _is_uniform(value)):
            result = with_marks(result, SIZE)
    return [result]


def _is_uniform(value: Value) -> bool:
    """Whether a constant is the same number everywhere."""
    return value.known is not None and value.sure is None and (value.known == value.known.reshape(-1)[:1]).all()


def _pad(call: BatchCall) -> list[Value]:
    value = call.value(0)
    mode = call.get("mode", "constant")
    pads = call.ints(1, "pads") or ()
    axes = [axis % value.rank for axis in call.ints(3) or range(value.rank)]
    half = len(pads) // 2
    before, after = dict(zip(axes, pads[:half], strict=True)), dict(zip(axes, pads[half:], strict=True))
    value = cut_out(
        value,
        {
            axis: slice(max(0, -before[axis]), value.dims[axis] - max(0, -after[axis]))
            for axis in axes
            if before[axis] < 0 or after[axis] < 0
        },
    )
    widths = [(max(0, before.get(axis, 0)), max(0, after.get(axis, 0))) for axis in range(value.rank)]
    shape = tuple(size + sum(width) for size, width in zip(value.dims, widths, strict=True))
    fill = call.optional(2)
    if mode != "constant":
        if all(not sum(width) or not value.varies(axis) for axis, width in enumerate(widths)):
            return [Value(shape, value.marks)]
        return [Value(shape, packed(np.pad(value.full, widths, mode=mode)))]
    extra = 0 if fill is None else total(fill)
    if any(sum(width) and (value.varies(axis) or value.is_sized(axis)) for axis, width in enumerate(widths)):
        extra |= MAYBE
    if all(not sum(width) or not value.varies(axis) for axis, width in enumerate(widths)):
        return [Value(shape, value.marks | np.uint16(extra))]
    return [Value(shape, packed(np.pad(value.full, widths)) | np.uint16(extra))]


def _shape(call: BatchCall) -> list[Value]:
    value = call.value(0)
    if value.shape is None:
        return [Value(None, np.array(value.extent & 0xFFFF, np.uint16), extent=value.extent)]
    axes = range(value.rank)[slice(call.get("start", 0), call.get("end", value.rank))]
    numbers = np.array([value.dims[axis] for axis in axes], np.int64)
    marks = np.array([SIZE if value.is_sized(axis) else 0 for axis in axes], np.uint16)
    return [Value((len(axes),), packed(marks) if len(axes) else np.zeros((1,), np.uint16), numbers)]


def _size(call: BatchCall) -> list[Value]:
    value = call.value(0)
    if value.shape is None:
        return [Value((), np.array(value.extent, np.uint16))]
    mark = SIZE if any(value.sized) else 0
    return [Value((), np.array(mark, np.uint16), np.array(math.prod(value.dims), np.int64))]


def _constant_of_shape(call: BatchCall) -> list[Value]:
    shape = call.ints(0) or ()
    tensor = call.attributes.get("value")
    fill = np.zeros((), np.float32) if tensor is None else _scalar(tensor)
    small = math.prod(shape) <= 1 << 16 and fill is not None
    return [constant(np.broadcast_to(fill, shape) if small and fill is not None else None, shape)]


def _scalar(tensor: Any) -> NDArray[Any] | None:
    array = numpy_helper.to_array(tensor)
    return array.reshape(()) if array.size == 1 and array.dtype.kind in "iubf" else None


def _range(call: BatchCall) -> list[Value]:
    numbers = [call.value(index).numbers for index in range(3)]
    if any(number is None for number in numbers):
        return [loose(call.given)]
    start, limit, step = (np.asarray(number).reshape(-1)[0] for number in numbers)
    array = np.arange(start, limit, step)
    # An empty or one-element range contains no position.
    return [Value(array.shape, np.full((1,), call.extra(), np.uint16), array)]


def _depth_to_space(call: BatchCall) -> list[Value]:
    value = call.value(0)
    block = call.get("blocksize")
    n, c, h, w = value.dims
    if call.get("mode", "DCR") == "DCR":
        return [
            _steps(value, (n, block, block, c // block**2, h, w), (0, 3, 4, 1, 5, 2), (n, -1, h * block, w * block))
        ]
    return [_steps(value, (n, c // block**2, block, block, h, w), (0, 1, 4, 2, 5, 3), (n, -1, h * block, w * block))]


def _space_to_depth(call: BatchCall) -> list[Value]:
    value = call.value(0)
    b = call.get("blocksize")
    n, c, h, w = value.dims
    return [_steps(value, (n, c, h // b, b, w // b, b), (0, 3, 5, 1, 2, 4), (n, c * b * b, h // b, w // b))]


def _steps(value: Value, first: tuple[int, ...], perm: tuple[int, ...], last: tuple[int, ...]) -> Value:
    size = math.prod(value.dims)
    dims = tuple(size // -math.prod(last) if each == -1 else each for each in last)
    if value.marks.shape[1:] == (1,) * (value.rank - 1):
        return Value(dims, value.marks)
    return restructured(value, lambda array: array.reshape(first).transpose(perm).reshape(dims))


def _identity(call: BatchCall) -> list[Value]:
    return [replace(call.value(0), blame=None)]


def _trilu(call: BatchCall) -> list[Value]:
    value = call.value(0)
    k = call.optional(1)
    diagonal = 0 if k is None else int(np.asarray(k.numbers).reshape(-1)[0]) if k.numbers is not None else None
    if diagonal is None:
        return [with_marks(value, MAYBE)]
    cut = np.triu if call.get("upper", 1) else np.tril
    if any(value.is_sized(value.rank - back) and value.numbers is None for back in (1, 2)):
        return [with_marks(Value(value.dims, value.marks), SIZE)]
    if value.known is not None:
        return [restructured(value, lambda array: np.asarray(cut(array, diagonal), array.dtype))]
    if not (value.varies(value.rank - 1) or value.varies(value.rank - 2)) and value.shape != value.marks.shape:
        return [Value(value.dims, value.marks)]
    return [Value(value.dims, packed(cut(value.full, diagonal)))]


def _eye(call: BatchCall) -> list[Value]:
    value = call.value(0)
    mark = SIZE if any(value.sized) else 0
    eye = np.eye(value.dims[0], value.dims[1], call.get("k", 0))
    return [Value(value.dims, np.full((1, 1), mark, np.uint16), eye)]


def _center_crop_pad(call: BatchCall) -> list[Value]:
    value = call.value(0)
    sizes = call.ints(1) or ()
    axes = [axis % value.rank for axis in call.get("axes") or range(value.rank)]
    shape = list(value.dims)
    for axis, size in zip(axes, sizes, strict=True):
        if value.varies(axis) and size != shape[axis]:
            raise UnknownError("it crops the samples")
        shape[axis] = size
    return [Value(tuple(shape), value.marks)]


LAYOUT_RULES: Mapping[str, Rule] = {
    "CenterCropPad": _center_crop_pad,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "EyeLike": _eye,
    "Flatten": _flatten,
    "Identity": _identity,
    "Optional": _identity,
    "OptionalGetElement": _identity,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
