"""Rules of operators to pick or place elements by indices, perhaps data: gather, scatter, compress."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.onnx_model.batch_layout import cut_out, reshaped
from repo_manager.onnx_model.batch_values import (
    MAYBE,
    SIZE,
    BatchCall,
    Marks,
    Rule,
    UnknownError,
    Value,
    loose,
    packed,
    restructured,
    total,
    with_marks,
)

__all__ = ["INDEX_RULES"]

_MAX_ROWS = 1 << 12  # rows of a ScatterND checked one by one


def _spread(value: Value, axis: int) -> Marks:
    """Return the marks of a value after a pick along an axis the graph does not decide."""
    if not value.varies(axis):
        return value.marks
    kept: Marks = np.bitwise_and.reduce(value.marks, axis=axis, keepdims=True)
    return kept | np.uint16(MAYBE)


def _gather(call: BatchCall) -> list[Value]:
    value, index = call.value(0), call.value(1)
    axis = call.get("axis", 0) % value.rank
    shape = (*value.dims[:axis], *index.dims, *value.dims[axis + 1 :])
    numbers = index.numbers
    marks_of_index = _index_marks(value, axis, index)
    around = marks_of_index.reshape((1,) * axis + marks_of_index.shape + (1,) * (value.rank - axis - 1))
    known = None
    if numbers is None or not value.varies(axis):
        picked = value.marks if not value.varies(axis) else _spread(value, axis)
        picked = picked.reshape((*picked.shape[:axis], *(1,) * index.rank, *picked.shape[axis + 1 :]))
    else:
        picked = value.marks.take(numbers, axis)
    if numbers is not None and value.numbers is not None:
        known = np.broadcast_to(value.numbers, value.dims).take(numbers, axis)
    return [Value(shape, packed(picked | around), known)]


def _index_marks(value: Value, axis: int, index: Value) -> Marks:
    """Return the marks of an index: a sample's number as an index is fine as long as it picks among samples.

    An index into several samples decided by data as well is left to a run, see `spread`.
    """
    if value.varies(axis):
        return index.marks & np.uint16(~SIZE & 0xFFFF)
    return index.marks


def _gather_elements(call: BatchCall) -> list[Value]:
    value, index = call.value(0), call.value(1)
    axis = call.get("axis", 0) % value.rank
    others = [a for a in range(value.rank) if a != axis]
    if any(index.dims[a] > value.dims[a] for a in others):
        raise UnknownError("its indices have more rows than its data")
    cut = cut_out(value, {a: slice(0, index.dims[a]) for a in others})
    if any(index.is_sized(a) and not value.is_sized(a) for a in others):
        cut = with_marks(cut, SIZE)
    marks_of_index = _index_marks(value, axis, index)
    if not cut.varies(axis):
        return [Value(index.dims, packed(cut.marks | marks_of_index))]
    if index.numbers is None:
        return [Value(index.dims, packed(_spread(cut, axis) | marks_of_index))]
    picked = np.take_along_axis(cut.full, np.broadcast_to(index.numbers, index.dims), axis)
    return [Value(index.dims, packed(picked | marks_of_index))]


def _components(value: Value, index: Value, first: int) -> tuple[list[NDArray[np.int64] | None], int]:
    """Return the indices per axis, `None` where data decides them, and the marks they add."""
    width = index.dims[-1]
    parts: list[NDArray[np.int64] | None] = []
    extra = 0
    for position in range(width):
        part = cut_out(index, {index.rank - 1: slice(position, position + 1)})
        known = None if part.numbers is None else np.broadcast_to(part.numbers, part.dims)[..., 0].astype(np.int64)
        parts.append(known)
        axis = first + position
        if known is not None and total(part) & SIZE and not value.varies(axis):
            extra |= SIZE
    return parts, extra


def _row_marks(index: Value) -> Marks:
    """Return the marks of each index tuple, without the part for the sample's number."""
    marks: Marks = np.bitwise_or.reduce(index.marks, axis=-1)
    return marks & np.uint16(~SIZE & 0xFFFF)


def _gather_nd(call: BatchCall) -> list[Value]:
    value, index = call.value(0), call.value(1)
    batch = call.get("batch_dims", 0)
    if value.dims[:batch] != index.dims[:batch]:
        raise UnknownError("its indices have other rows than its data")
    parts, extra = _components(value, index, batch)
    marks = value.marks
    for position, part in enumerate(parts):
        axis = batch + position
        if part is None and marks.shape[axis] > 1:
            marks = _spread(replace(value, marks=marks), axis)
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


def _scatter_nd(call: BatchCall) -> list[Value]:
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


def _scatter_elements(call: BatchCall) -> list[Value]:
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


def _one_hot(call: BatchCall) -> list[Value]:
    value, depth = call.value(0), call.integer(1)
    axis = call.get("axis", -1)
    axis = axis + value.rank + 1 if axis < 0 else axis
    marks = np.expand_dims(value.marks, axis) | np.uint16(call.extra(without=(0, 1)))
    extra = total(call.value(1)) & SIZE
    return [Value((*value.dims[:axis], depth, *value.dims[axis:]), marks | np.uint16(extra))]


def _reverse_sequence(call: BatchCall) -> list[Value]:
    value, lengths = call.value(0), call.value(1)
    batch, time = call.get("batch_axis", 1), call.get("time_axis", 0)
    marks: Marks = np.bitwise_or.reduce(value.marks, axis=time, keepdims=True) if value.varies(time) else value.marks
    shape = [1] * value.rank
    shape[batch] = lengths.marks.size
    if lengths.dims[0] != value.dims[batch]:
        raise UnknownError("it has lengths for another number of samples")
    return [Value(value.dims, packed(marks | lengths.marks.reshape(shape)))]


def _compress(call: BatchCall) -> list[Value]:
    value, condition = call.value(0), call.value(1)
    axis = call.get("axis")
    if condition.numbers is None:
        return [loose([value, condition])]
    flags = condition.numbers.astype(bool).reshape(-1)
    source = reshaped(value, (math.prod(value.dims),)) if axis is None else value
    extra = total(condition)
    picked = restructured(source, lambda array: np.compress(flags, array, axis=axis or 0))
    return [with_marks(picked, extra & ~SIZE)]


def _non_zero(call: BatchCall) -> list[Value]:
    value = call.value(0)
    if value.numbers is not None:
        array = np.array(np.nonzero(np.broadcast_to(value.numbers, value.dims)), np.int64)
        mark = total(value) | (SIZE if any(value.sized) else 0)
        return [Value(array.shape, np.full((1, 1), mark, np.uint16), array)]
    return [replace(loose([value]), extent=total(value) & ~MAYBE)]


INDEX_RULES: Mapping[str, Rule] = {
    "Compress": _compress,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "ReverseSequence": _reverse_sequence,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
}
