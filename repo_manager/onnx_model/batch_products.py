"""Rules of multiplying operators: matrix products, einsum, recurrences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from repo_manager.onnx_model.batch_values import (
    SIZE,
    BatchCall,
    Marks,
    Rule,
    UnknownError,
    Value,
    broadcast_shape,
    join,
    packed,
    reduced,
    total,
    with_marks,
)

__all__ = ["PRODUCT_RULES"]


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
    """Matrix products. The other inputs are scales and zero points, or added."""

    def rule(call: BatchCall) -> list[Value]:
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


def _fused_matmul(call: BatchCall) -> list[Value]:
    a, b = call.value(0), call.value(1)
    if call.get("transBatchA", 0) or call.get("transBatchB", 0):
        raise UnknownError("it transposes the batch")
    a = _swapped(a) if call.get("transA", 0) else a
    b = _swapped(b) if call.get("transB", 0) else b
    return [with_marks(_matmul_marks(a, b), call.extra(without=(0, 1)))]


def _gemm(call: BatchCall) -> list[Value]:
    a, b, c = call.value(0), call.value(1), call.optional(2)
    a = _swapped(a) if call.get("transA", 0) else a
    b = _swapped(b) if call.get("transB", 0) else b
    result = _matmul_marks(a, b)
    if c is None:
        return [result]
    if broadcast_shape([result.dims, c.dims]) != result.dims:
        raise UnknownError("what it adds has another shape")
    return [Value(result.shape, join(result.dims, [result.marks, c.marks]))]


def _qgemm(call: BatchCall) -> list[Value]:
    a, b = call.value(0), call.value(3)
    a = _swapped(a) if call.get("transA", 0) else a
    b = _swapped(b) if call.get("transB", 0) else b
    return [with_marks(_matmul_marks(a, b), call.extra(without=(0, 3)))]


def _matmul_nbits(call: BatchCall) -> list[Value]:
    a = call.value(0)
    rows = reduced(a, (-1,), keep=True)
    return [Value((*a.dims[:-1], call.get("N")), rows.marks | np.uint16(call.extra(without=(0,))))]


def _dynamic_matmul(call: BatchCall) -> list[Value]:
    a, b = call.value(0), call.value(1)
    return [with_marks(_matmul_marks(a, b), call.extra())]  # one scale for all of A


def _einsum(call: BatchCall) -> list[Value]:
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
    # NumPy aligns ellipses at the right. These numbers count from the left: all ellipses need the same rank.
    return [*before, *(f"...{index}" for index in range(count)), *after]


def _einsum_term(term: Sequence[str], value: Value, out: Sequence[str]) -> Marks:
    marks = value.marks
    names = list(term)
    for label in [each for each in dict.fromkeys(names) if names.count(each) > 1]:  # a diagonal
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


def _recurrent(states: int) -> Rule:
    """RNN, GRU (one state) and LSTM (two): time on axis 0, batch on axis 1, the other way round with `layout`."""

    def rule(call: BatchCall) -> list[Value]:
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


def _base(call: BatchCall) -> str:
    return call.node.op_type.removeprefix("DynamicQuantize")


def _dynamic_lstm(call: BatchCall) -> list[Value]:
    results = _recurrent(2)(call)
    mark = call.extra()  # one scale for the whole input of a step
    return [with_marks(value, mark) for value in results]


PRODUCT_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("RNN", "GRU"), _recurrent(1)),
    "DynamicQuantizeLSTM": _dynamic_lstm,
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "Einsum": _einsum,
    "FusedGemm": _gemm,
    "FusedMatMul": _fused_matmul,
    "Gemm": _gemm,
    "LSTM": _recurrent(2),
    "MatMul": _product(0, 1),
    "MatMulInteger": _product(0, 1),
    "MatMulIntegerToFloat": _product(0, 1),
    "MatMulNBits": _matmul_nbits,
    "QGemm": _qgemm,
    "QLinearMatMul": _product(0, 3),
}
