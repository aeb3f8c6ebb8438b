"""Rules of operators with graphs of their own (If, Loop, Scan), and of those on sequences of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from repo_manager.onnx_model.batch_layout import LAYOUT_RULES
from repo_manager.onnx_model.batch_values import (
    MAYBE,
    SAMPLES,
    SIZE,
    BatchCall,
    Rule,
    UnknownError,
    Value,
    constant,
    loose,
    packed,
    restructured,
    total,
    with_marks,
)

if TYPE_CHECKING:
    import onnx

__all__ = ["CONTROL_RULES", "SEQUENCE_RULES", "name_of"]

Follow: TypeAlias = "Callable[[onnx.GraphProto, dict[str, Value], str], list[Value]]"
"""Follows a graph: its values so far by name, and its place in the model."""

_MAX_ROUNDS = 128  # iterations of a loop; longer loops are not followed


def name_of(node: onnx.NodeProto) -> str:
    """Return a node's name, else the first name it gives a value."""
    return node.name or next((name for name in node.output if name), "")


def _if(follow: Follow, call: BatchCall, scope: dict[str, Value], path: str) -> list[Value]:
    condition = call.value(0)
    bodies = {attribute.name: attribute.g for attribute in call.node.attribute}
    extra = total(condition)
    numbers = condition.numbers
    if numbers is not None:
        taken = "then_branch" if bool(np.reshape(numbers, -1)[0]) else "else_branch"
        results = follow(bodies[taken], dict(scope), f"{path}{name_of(call.node)}/{taken}/")
        return [with_marks(value, MAYBE if extra else 0) for value in results]
    both = [follow(body, dict(scope), f"{path}{name_of(call.node)}/{name}/") for name, body in sorted(bodies.items())]
    return [with_marks(_either(one, other), extra) for one, other in zip(*both, strict=True)]


def _either(one: Value, other: Value) -> Value:
    if one.shape is None or one.shape != other.shape or one.items is not None:
        return loose([one, other])
    return Value(one.shape, packed(one.marks | other.marks), blame=one.blame or other.blame)


def _loop(follow: Follow, call: BatchCall, scope: dict[str, Value], path: str) -> list[Value]:
    body = next(attribute.g for attribute in call.node.attribute if attribute.name == "body")
    trips, condition = call.optional(0), call.optional(1)
    limit = _MAX_ROUNDS + 1
    if trips is not None:
        if trips.numbers is None and condition is None:
            raise UnknownError("data decides how often it runs")
        limit = _MAX_ROUNDS + 1 if trips.numbers is None else int(np.reshape(trips.numbers, -1)[0])
    states = [call.value(index) for index in range(2, len(call.inputs))]
    stacks: list[list[Value]] = [[] for _ in range(len(body.output) - 1 - len(states))]
    extra, round_number = 0 if trips is None or trips.numbers is not None else total(trips), 0
    goes_on = condition if condition is not None else constant(np.array(True), ())
    while round_number < limit:
        if goes_on.numbers is not None and not bool(np.reshape(goes_on.numbers, -1)[0]):
            break
        if goes_on.numbers is None:
            extra |= total(goes_on) | (MAYBE if stacks and total(goes_on) & SAMPLES else 0)
        if round_number >= _MAX_ROUNDS:
            raise UnknownError(f"it runs more than {_MAX_ROUNDS} times")
        inner = dict(scope)
        names = [value.name for value in body.input]
        inner[names[0]] = constant(np.array(round_number, np.int64), ())
        inner[names[1]] = goes_on
        inner.update(zip(names[2:], states, strict=True))
        goes_on, *results = follow(body, inner, f"{path}{name_of(call.node)}/{round_number}/")
        states = results[: len(states)]
        for stack, value in zip(stacks, results[len(states) :], strict=True):
            stack.append(value)
        round_number += 1
    counts = trips is not None and total(trips) & SIZE
    passed = [value.name for value in body.input][2:]
    for index, output in enumerate(list(body.output)[1 : 1 + len(states)]):
        if counts and states[index].items is None and output.name != passed[index]:
            states[index] = with_marks(states[index], MAYBE)
    return [with_marks(value, extra & ~SIZE) for value in (*states, *(_stacked(stack, 0) for stack in stacks))]


def _stacked(values: Sequence[Value], axis: int) -> Value:
    """Put values along a new axis."""
    if not values:
        raise UnknownError("it may not run at all")
    shape = values[0].dims
    if any(value.shape != shape for value in values):
        return loose(values)
    axis = axis % (len(shape) + 1)
    marks = np.stack(np.broadcast_arrays(*(value.marks for value in values)), axis)
    known = None
    if all(value.numbers is not None for value in values):
        known = np.stack([np.broadcast_to(np.asarray(value.numbers), shape) for value in values], axis)
    return Value((*shape[:axis], len(values), *shape[axis:]), packed(marks), known)


def _scan(follow: Follow, call: BatchCall, scope: dict[str, Value], path: str) -> list[Value]:
    body = next(attribute.g for attribute in call.node.attribute if attribute.name == "body")
    count = call.get("num_scan_inputs")
    if call.opset < 9:
        raise UnknownError("an old Scan")
    values = [call.value(index) for index in range(len(call.inputs))]
    states, scanned = values[: len(values) - count], values[len(values) - count :]
    axes = [axis % value.rank for axis, value in zip(call.get("scan_input_axes") or [0] * count, scanned, strict=True)]
    directions = call.get("scan_input_directions") or [0] * count
    length = scanned[0].dims[axes[0]]
    if length > _MAX_ROUNDS:
        raise UnknownError(f"it runs more than {_MAX_ROUNDS} times")
    stacks: list[list[Value]] = [[] for _ in range(len(body.output) - len(states))]
    for step in range(length):
        inner = dict(scope)
        parts = [
            _taken(value, axis, step if forward == 0 else length - 1 - step)
            for value, axis, forward in zip(scanned, axes, directions, strict=True)
        ]
        inner.update(zip((value.name for value in body.input), [*states, *parts], strict=True))
        results = follow(body, inner, f"{path}{name_of(call.node)}/{step}/")
        states = results[: len(states)]
        for stack, value in zip(stacks, results[len(states) :], strict=True):
            stack.append(value)
    out_axes = call.get("scan_output_axes") or [0] * len(stacks)
    out_directions = call.get("scan_output_directions") or [0] * len(stacks)
    outputs = [
        _stacked(stack if forward == 0 else stack[::-1], axis)
        for stack, axis, forward in zip(stacks, out_axes, out_directions, strict=True)
    ]
    return [*states, *outputs]


def _taken(value: Value, axis: int, index: int) -> Value:
    return restructured(value, lambda array: array.take(index, axis))


CONTROL_RULES: Mapping[str, Callable[[Follow, BatchCall, dict[str, Value], str], list[Value]]] = {
    "If": _if,
    "Loop": _loop,
    "Scan": _scan,
}


def _sequence(values: Sequence[Value]) -> Value:
    return Value(None, np.zeros((), np.uint16), items=tuple(values))


def _members(value: Value) -> tuple[Value, ...]:
    if value.items is None:
        raise UnknownError("a sequence whose members are not known")
    return value.items


def _place(call: BatchCall, index: int, length: int, default: int) -> int:
    at = call.integer(index, default=default)
    return at + length if at < 0 else at


def _sequence_at(call: BatchCall) -> list[Value]:
    members = _members(call.value(0))
    return [replace(members[_place(call, 1, len(members), 0)], blame=None)]


def _sequence_insert(call: BatchCall) -> list[Value]:
    members = list(_members(call.value(0)))
    members.insert(_place(call, 2, len(members), len(members)), call.value(1))
    return [_sequence(members)]


def _sequence_erase(call: BatchCall) -> list[Value]:
    members = list(_members(call.value(0)))
    del members[_place(call, 1, len(members), len(members) - 1)]
    return [_sequence(members)]


def _split_to_sequence(call: BatchCall) -> list[Value]:
    value = call.value(0)
    axis = call.get("axis", 0) % value.rank
    split = call.optional(1)
    size = value.dims[axis]
    if split is None:
        sizes = [1] * size
    elif split.rank == 0:
        each = call.integer(1)
        sizes = [min(each, size - start) for start in range(0, size, each)]
    else:
        sizes = list(call.ints(1) or ())
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    drop = split is None and not call.get("keepdims", 1)
    members = []
    for start, length in zip(starts, sizes, strict=True):
        part = restructured(value, lambda array, at=start, n=length: array.take(range(at, at + n), axis))  # type: ignore[misc]
        members.append(_taken(part, axis, 0) if drop else part)
    return [_sequence(members)]


def _concat_from_sequence(call: BatchCall) -> list[Value]:
    members = _members(call.value(0))
    axis = call.get("axis")
    if call.get("new_axis", 0):
        return [_stacked(members, axis)]
    # A loop made one member for each sample: these concatenate like rows.
    alike = len(members) % call.samples == 0 and len({member.shape for member in members}) == 1
    inner = BatchCall(call.node, members, {"axis": axis}, call.opset, 1 if alike else call.samples)
    return list(LAYOUT_RULES["Concat"](inner))


def _sequence_length(call: BatchCall) -> list[Value]:
    return [constant(np.array(len(_members(call.value(0))), np.int64), ())]


SEQUENCE_RULES: Mapping[str, Rule] = {
    "ConcatFromSequence": _concat_from_sequence,
    "SequenceAt": _sequence_at,
    "SequenceConstruct": lambda call: [_sequence(call.given)],
    "SequenceEmpty": lambda _: [_sequence(())],
    "SequenceErase": _sequence_erase,
    "SequenceInsert": _sequence_insert,
    "SequenceLength": _sequence_length,
    "SplitToSequence": _split_to_sequence,
}
