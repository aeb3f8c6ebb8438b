"""Rules of operators that put elements elsewhere, pick some, or make shapes of them."""

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
    Call,
    Marks,
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

__all__ = ["LAYOUT_RULES", "reshaped", "spread"]

_MAX_ROWS = 1 << 12  # of a ScatterND that are looked at one by one


def spread(value: Value, axis: int) -> Marks:
    """Return the marks of a value after a pick along an axis that the graph does not decide."""
    if not value.varies(axis):
        return value.marks
    kept: Marks = np.bitwise_and.reduce(value.marks, axis=axis, keepdims=True)
    return kept | np.uint16(MAYBE)


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


def _reshape(call: Call) -> list[Value]:
    value = call.value(0)
    wanted = list(call.ints(1, "shape") or ())
    if not call.get("allowzero", 0):
        wanted = [value.dims[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    if -1 in wanted:
        rest = math.prod(size for size in wanted if size != -1)
        wanted[wanted.index(-1)] = math.prod(value.dims) // rest if rest else 0
    return [reshaped(value, wanted)]


def _flatten(call: Call) -> list[Value]:
    value = call.value(0)
    axis = call.get("axis", 1)
    axis = axis + value.rank if axis < 0 else axis
    return [reshaped(value, (math.prod(value.dims[:axis]), math.prod(value.dims[axis:])))]


def _squeeze(call: Call) -> list[Value]:
    value = call.value(0)
    axes = call.ints(1, "axes")
    gone = {axis for axis, size in enumerate(value.dims) if size == 1} if axes is None else _axes(axes, value.rank)
    if axes is None and any(value.is_sized(axis) for axis in gone):
        raise UnknownError("it drops the batch axis for one sample")
    return [restructured(value, lambda array: array.squeeze(tuple(gone)))]


def _axes(axes: Sequence[int], rank: int) -> set[int]:
    return {axis + rank if axis < 0 else axis for axis in axes}


def _unsqueeze(call: Call) -> list[Value]:
    value = call.value(0)
    axes = call.ints(1, "axes") or ()
    return [restructured(value, lambda array: np.expand_dims(array, tuple(axes)))]


def _transpose(call: Call) -> list[Value]:
    value = call.value(0)
    perm = call.get("perm") or list(range(value.rank))[::-1]
    known = None if value.known is None else np.broadcast_to(value.known, value.dims).transpose(perm)
    sure = None if value.sure is None else np.broadcast_to(value.sure, value.dims).transpose(perm)
    return [Value(tuple(value.dims[axis] for axis in perm), value.marks.transpose(perm), known, sure)]


def _expand(call: Call) -> list[Value]:
    value = call.value(0)
    shape = broadcast_shape([value.dims, call.ints(1) or ()])
    if value.known is None:
        return [Value(shape, join(shape, [value.marks]))]
    return [restructured(value, lambda array: np.broadcast_to(array, shape))]


def _tile(call: Call) -> list[Value]:
    value = call.value(0)
    repeats = call.ints(1) or ()
    return [restructured(value, lambda array: np.tile(array, repeats))]


def _concat(call: Call) -> list[Value]:
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
        return [with_marks(result, MAYBE)]  # Rows of their own for some places in the batch.
    return [result]


def _concat_known(values: Sequence[Value], axis: int) -> tuple[NDArray[Any] | None, NDArray[np.bool_] | None]:
    """Join what is known of some values; a value of which nothing is known leaves a gap."""
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


def _split(call: Call) -> list[Value]:
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
    return [_cut(value, {axis: slice(start, end)}) for start, end in zip(starts, ends, strict=True)]


def _cut(value: Value, slices: Mapping[int, slice]) -> Value:
    """Slice some axes; others stay as they are stored."""
    index = tuple(slices.get(axis, slice(None)) for axis in range(value.rank))
    shape = tuple(len(range(*each.indices(size))) for each, size in zip(index, value.dims, strict=True))
    stored = tuple(each if value.varies(axis) else slice(None) for axis, each in enumerate(index))
    known = None if value.known is None else np.broadcast_to(value.known, value.dims)[index]
    sure = None if value.sure is None else np.broadcast_to(value.sure, value.dims)[index]
    return Value(shape, packed(value.marks[stored]), known, None if sure is None or sure.all() else sure)


def _slice(call: Call) -> list[Value]:
    value = call.value(0)
    starts, ends = call.ints(1, "starts") or (), call.ints(2, "ends") or ()
    axes = call.ints(3, "axes") or tuple(range(len(starts)))
    steps = call.ints(4) or (1,) * len(starts)
    slices = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        at = axis % value.rank
        size = value.dims[at]
        # ONNX clamps: a start below -size is 0; NumPy's slices do the same, but for a negative step.
        stop: int | None = end
        if step < 0 and end < -size:
            stop = None
        slices[at] = slice(start, stop, step)
    result = _cut(value, slices)
    bounds = [call.optional(index) for index in (1, 2)]
    if any(bound is not None and total(bound) & SIZE for bound in bounds) and value.known is None:
        # A part of the samples, or a constant cut to their number; from another axis it depends on the number.
        sliced = [axis for axis in slices if result.dims[axis] != value.dims[axis]]
        if any(not value.varies(axis) for axis in sliced) and (total(value) & SAMPLES or not _is_uniform(value)):
            result = with_marks(result, SIZE)
    return [result]


def _is_uniform(value: Value) -> bool:
    """Whether a constant is the same number everywhere."""
    return value.known is not None and value.sure is None and (value.known == value.known.reshape(-1)[:1]).all()


def _pad(call: Call) -> list[Value]:
    value = call.value(0)
    mode = call.get("mode", "constant")
    pads = call.ints(1, "pads") or ()
    axes = [axis % value.rank for axis in call.ints(3) or range(value.rank)]
    half = len(pads) // 2
    before, after = dict(zip(axes, pads[:half], strict=True)), dict(zip(axes, pads[half:], strict=True))
    value = _cut(
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


def _gather(call: Call) -> list[Value]:
    value, index = call.value(0), call.value(1)
    axis = call.get("axis", 0) % value.rank
    shape = (*value.dims[:axis], *index.dims, *value.dims[axis + 1 :])
    numbers = index.numbers
    marks_of_index = _index_marks(value, axis, index)
    around = marks_of_index.reshape((1,) * axis + marks_of_index.shape + (1,) * (value.rank - axis - 1))
    known = None
    if numbers is None or not value.varies(axis):
        picked = value.marks if not value.varies(axis) else spread(value, axis)
        picked = picked.reshape((*picked.shape[:axis], *(1,) * index.rank, *picked.shape[axis + 1 :]))
    else:
        picked = value.marks.take(numbers, axis)
    if numbers is not None and value.numbers is not None:
        known = np.broadcast_to(value.numbers, value.dims).take(numbers, axis)
    return [Value(shape, packed(picked | around), known)]


def _index_marks(value: Value, axis: int, index: Value) -> Marks:
    """Return the marks of an index: one that says which sample is fine as long as it picks among samples.

    An index into several samples that data decides besides is left to a run, see `spread`.
    """
    if value.varies(axis):
        return index.marks & np.uint16(~SIZE & 0xFFFF)
    return index.marks


def _gather_elements(call: Call) -> list[Value]:
    value, index = call.value(0), call.value(1)
    axis = call.get("axis", 0) % value.rank
    others = [a for a in range(value.rank) if a != axis]
    if any(index.dims[a] > value.dims[a] for a in others):
        raise UnknownError("its indices have more rows than its data")
    cut = _cut(value, {a: slice(0, index.dims[a]) for a in others})
    if any(index.is_sized(a) and not value.is_sized(a) for a in others):
        cut = with_marks(cut, SIZE)
    marks_of_index = _index_marks(value, axis, index)
    if not cut.varies(axis):
        return [Value(index.dims, packed(cut.marks | marks_of_index))]
    if index.numbers is None:
        return [Value(index.dims, packed(spread(cut, axis) | marks_of_index))]
    picked = np.take_along_axis(cut.full, np.broadcast_to(index.numbers, index.dims), axis)
    return [Value(index.dims, packed(picked | marks_of_index))]


def _components(value: Value, index: Value, first: int) -> tuple[list[NDArray[np.int64] | None], int]:
    """Return the indices per axis, `None` where data decides them, and the marks that they add."""
    width = index.dims[-1]
    parts: list[NDArray[np.int64] | None] = []
    extra = 0
    for position in range(width):
        part = _cut(index, {index.rank - 1: slice(position, position + 1)})
        known = None if part.numbers is None else np.broadcast_to(part.numbers, part.dims)[..., 0].astype(np.int64)
        parts.append(known)
        axis = first + position
        if known is not None and total(part) & SIZE and not value.varies(axis):
            extra |= SIZE
    return parts, extra


def _row_marks(index: Value) -> Marks:
    """Return the marks of each index tuple, without what only says which sample."""
    marks: Marks = np.bitwise_or.reduce(index.marks, axis=-1)
    return marks & np.uint16(~SIZE & 0xFFFF)


def _gather_nd(call: Call) -> list[Value]:
    value, index = call.value(0), call.value(1)
    batch = call.get("batch_dims", 0)
    if value.dims[:batch] != index.dims[:batch]:
        raise UnknownError("its indices have other rows than its data")
    parts, extra = _components(value, index, batch)
    marks = value.marks
    for position, part in enumerate(parts):
        axis = batch + position
        if part is None and marks.shape[axis] > 1:
            marks = spread(replace(value, marks=marks), axis)
    rows = index.dims[:-1]
    rest = value.dims[batch + len(parts) :]
    grids = np.meshgrid(*(np.arange(size) for size in rows), indexing="ij", sparse=True)
    at: list[Any] = [
        *(grids[axis] if marks.shape[axis] > 1 else np.zeros(1, np.int64) for axis in range(batch)),
        *(
            np.zeros(1, np.int64) if part is None or marks.shape[batch + position] == 1 else part
            for position, part in enumerate(parts)
        ),
    ]
    at = [np.asarray(each).reshape((1,) * (len(rows) - np.ndim(each)) + np.shape(each)) for each in at]
    picked = marks[tuple(np.broadcast_arrays(*at))] if at else marks
    around = _row_marks(index)
    around = around.reshape(around.shape + (1,) * len(rest))
    return [Value((*rows, *rest), packed(picked | around | np.uint16(extra)))]


def _scatter_nd(call: Call) -> list[Value]:
    value, index, updates = call.value(0), call.value(1), call.value(2)
    parts, extra = _components(value, index, 0)
    around = _row_marks(index)
    rest = value.dims[len(parts) :]
    rows = index.dims[:-1]
    written = np.broadcast_to(
        updates.marks | around.reshape(around.shape + (1,) * len(rest)) | np.uint16(extra), (*rows, *rest)
    ).reshape((math.prod(rows), *rest))
    marks = np.array(value.full)
    touched = np.zeros(value.dims, np.bool_)
    keeps = call.get("reduction", "none") != "none"
    flat = [None if part is None else part.reshape(-1) for part in parts]
    if all(part is not None for part in flat):
        everywhere = tuple(np.asarray(part) for part in flat)
        touched[everywhere] = True
        if keeps:
            np.bitwise_or.at(marks, everywhere, written)
        else:
            marks[everywhere] = written
    elif math.prod(rows) > _MAX_ROWS:
        raise UnknownError("it writes too many parts")
    else:
        doubt = any(part is None and value.varies(axis) for axis, part in enumerate(parts))
        for row in range(math.prod(rows)):
            at = tuple(slice(None) if part is None else int(part[row]) for part in flat)
            marks[at] |= written[row] | np.uint16(MAYBE if doubt else 0)
            touched[at] = True
    return [Value(value.dims, packed(marks) | np.uint16(_uneven(value, packed(marks), touched)))]


def _uneven(value: Value, marks: Marks, touched: NDArray[np.bool_]) -> int:
    """Return a doubt when not all places in the batch are written to alike."""
    for axis in range(value.rank):
        if marks.shape[axis] > 1 and (touched != touched.take([0], axis)).any() and marks.any():
            return MAYBE
    return 0


def _scatter_elements(call: Call) -> list[Value]:
    value, index, updates = call.value(0), call.value(1), call.value(2)
    axis = call.get("axis", 0) % value.rank
    new = np.broadcast_to(updates.marks | _index_marks(value, axis, index), index.dims)
    marks = np.array(value.full)
    area = tuple(slice(None) if a == axis else slice(0, size) for a, size in enumerate(index.dims))
    if index.numbers is None:
        landed: Marks = np.bitwise_or.reduce(new, axis=axis, keepdims=True)
        samples_meet = value.varies(axis) or (new != new.take([0], axis)).any()
        whole = all(size == value.dims[a] for a, size in enumerate(index.dims) if a != axis and marks.shape[a] > 1)
        doubt = samples_meet or (not whole and packed(marks).size != 1)
        marks[area] |= landed if not samples_meet else (landed & np.uint16(0)) | np.uint16(MAYBE)
        marks |= np.uint16(MAYBE if doubt and marks.any() else 0)
        return [Value(value.dims, packed(marks))]
    if call.get("reduction", "none") != "none":
        grids = list(np.meshgrid(*(np.arange(size) for size in index.dims), indexing="ij"))
        grids[axis] = np.broadcast_to(index.numbers, index.dims) % value.dims[axis]
        np.bitwise_or.at(marks, tuple(grids), new)
    else:
        part = np.array(marks[area])
        np.put_along_axis(part, np.broadcast_to(index.numbers, index.dims) % value.dims[axis], new, axis)
        marks[area] = part
    touched = np.zeros(value.dims, np.bool_)
    inside = np.array(touched[area])
    np.put_along_axis(inside, np.broadcast_to(index.numbers, index.dims) % value.dims[axis], True, axis)
    touched[area] = inside
    return [Value(value.dims, packed(marks) | np.uint16(_uneven(value, packed(marks), touched)))]


def _shape(call: Call) -> list[Value]:
    value = call.value(0)
    if value.shape is None:
        return [Value(None, np.array(value.extent & 0xFFFF, np.uint16), extent=value.extent)]
    axes = range(value.rank)[slice(call.get("start", 0), call.get("end", value.rank))]
    numbers = np.array([value.dims[axis] for axis in axes], np.int64)
    marks = np.array([SIZE if value.is_sized(axis) else 0 for axis in axes], np.uint16)
    return [Value((len(axes),), packed(marks) if len(axes) else np.zeros((1,), np.uint16), numbers)]


def _size(call: Call) -> list[Value]:
    value = call.value(0)
    if value.shape is None:
        return [Value((), np.array(value.extent, np.uint16))]
    mark = SIZE if any(value.sized) else 0
    return [Value((), np.array(mark, np.uint16), np.array(math.prod(value.dims), np.int64))]


def _constant_of_shape(call: Call) -> list[Value]:
    shape = call.ints(0) or ()
    tensor = call.attributes.get("value")
    fill = np.zeros((), np.float32) if tensor is None else _scalar(tensor)
    small = math.prod(shape) <= 1 << 16 and fill is not None
    return [constant(np.broadcast_to(fill, shape) if small and fill is not None else None, shape)]


def _scalar(tensor: Any) -> NDArray[Any] | None:
    array = numpy_helper.to_array(tensor)
    return array.reshape(()) if array.size == 1 and array.dtype.kind in "iubf" else None


def _range(call: Call) -> list[Value]:
    numbers = [call.value(index).numbers for index in range(3)]
    if any(number is None for number in numbers):
        return [loose(call.given)]
    start, limit, step = (np.asarray(number).reshape(-1)[0] for number in numbers)
    array = np.arange(start, limit, step)
    # An empty or one-element range says nothing of a place.
    return [Value(array.shape, np.full((1,), call.extra(), np.uint16), array)]


def _one_hot(call: Call) -> list[Value]:
    value, depth = call.value(0), call.integer(1)
    axis = call.get("axis", -1)
    axis = axis + value.rank + 1 if axis < 0 else axis
    marks = np.expand_dims(value.marks, axis) | np.uint16(call.extra(without=(0, 1)))
    extra = total(call.value(1)) & SIZE
    return [Value((*value.dims[:axis], depth, *value.dims[axis:]), marks | np.uint16(extra))]


def _depth_to_space(call: Call) -> list[Value]:
    value = call.value(0)
    block = call.get("blocksize")
    n, c, h, w = value.dims
    if call.get("mode", "DCR") == "DCR":
        return [
            _steps(value, (n, block, block, c // block**2, h, w), (0, 3, 4, 1, 5, 2), (n, -1, h * block, w * block))
        ]
    return [_steps(value, (n, c // block**2, block, block, h, w), (0, 1, 4, 2, 5, 3), (n, -1, h * block, w * block))]


def _space_to_depth(call: Call) -> list[Value]:
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


def _identity(call: Call) -> list[Value]:
    return [replace(call.value(0), blame=None)]


def _trilu(call: Call) -> list[Value]:
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


def _eye(call: Call) -> list[Value]:
    value = call.value(0)
    mark = SIZE if any(value.sized) else 0
    eye = np.eye(value.dims[0], value.dims[1], call.get("k", 0))
    return [Value(value.dims, np.full((1, 1), mark, np.uint16), eye)]


def _reverse_sequence(call: Call) -> list[Value]:
    value, lengths = call.value(0), call.value(1)
    batch, time = call.get("batch_axis", 1), call.get("time_axis", 0)
    marks: Marks = np.bitwise_or.reduce(value.marks, axis=time, keepdims=True) if value.varies(time) else value.marks
    shape = [1] * value.rank
    shape[batch] = lengths.marks.size
    if lengths.dims[0] != value.dims[batch]:
        raise UnknownError("it has lengths for another number of samples")
    return [Value(value.dims, packed(marks | lengths.marks.reshape(shape)))]


def _compress(call: Call) -> list[Value]:
    value, condition = call.value(0), call.value(1)
    axis = call.get("axis")
    if condition.numbers is None:
        return [loose([value, condition])]
    flags = condition.numbers.astype(bool).reshape(-1)
    source = reshaped(value, (math.prod(value.dims),)) if axis is None else value
    extra = total(condition)
    picked = restructured(source, lambda array: np.compress(flags, array, axis=axis or 0))
    return [with_marks(picked, extra & ~SIZE)]


def _non_zero(call: Call) -> list[Value]:
    value = call.value(0)
    if value.numbers is not None:
        array = np.array(np.nonzero(np.broadcast_to(value.numbers, value.dims)), np.int64)
        mark = total(value) | (SIZE if any(value.sized) else 0)
        return [Value(array.shape, np.full((1, 1), mark, np.uint16), array)]
    return [replace(loose([value]), extent=total(value) & ~MAYBE)]


def _center_crop_pad(call: Call) -> list[Value]:
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
    "Compress": _compress,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "EyeLike": _eye,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Identity": _identity,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "Optional": _identity,
    "OptionalGetElement": _identity,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ReverseSequence": _reverse_sequence,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
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
