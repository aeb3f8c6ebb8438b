"""The batch analysis's facts of a value, and one operator as its rules see it.

The mark of an element names the samples it depends on. A model is followed with a few samples. Every value carries one
bit set per element, a mark: bit i says the element depends on sample i. Marks equal along an axis are stored once, so
a value of a million elements usually costs as many words as there are samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.optional import deferred

if TYPE_CHECKING:
    import onnx
else:
    onnx = deferred("onnx")

__all__ = [
    "MAYBE",
    "NOTHING",
    "SAMPLES",
    "SIZE",
    "BatchCall",
    "Blame",
    "Marks",
    "Rule",
    "UnknownError",
    "Value",
    "broadcast_shape",
    "common",
    "constant",
    "is_mixed",
    "join",
    "loose",
    "packed",
    "reduced",
    "restructured",
    "total",
    "with_marks",
]


Marks = NDArray[np.uint16]

SAMPLES = 0x00FF
"""Bits of the samples, the first one lowest."""
SIZE = 0x0100
"""The element depends on the number of samples, or on the place of a sample among them."""
MAYBE = 0x0200
"""The element may depend on any sample: the graph does not tell."""

_MAX_ELEMENTS = 1 << 26
_MAX_KNOWN = 1 << 16
_SEVERAL = np.array([bin(number).count("1") > 1 for number in range(256)])


class UnknownError(Exception):
    """The graph does not tell an operator's effect on the samples."""


@dataclass(frozen=True)
class Blame:
    """The first operator to make samples depend on each other.

    Attributes:
        node: its name, or its first output's.
        op_type: operator of the node.
        why: its effect, in words to follow "it".
    """

    node: str
    op_type: str
    why: str


@dataclass(frozen=True)
class Value:
    """A tensor (or a sequence of them) in the analysis.

    Attributes:
        shape: with the analysed number of samples. `None` when it depends on data.
        marks: one mark per element, broadcastable to `shape` and of the same rank. 0-d when the shape is `None`.
        known: the numbers themselves where the graph decides them (shapes, indices, masks), in `shape`.
        sure: true where a value of `known` is decided. `None`: all.
        extent: marks of the samples the unknown shape depends on.
        sized: per axis, whether its length follows the number of samples. Empty: no axis.
        items: the members of a sequence.
        blame: the first operator on the way to mix samples.
    """

    shape: tuple[int, ...] | None
    marks: Marks
    known: NDArray[Any] | None = None
    sure: NDArray[np.bool_] | None = None
    extent: int = 0
    sized: tuple[bool, ...] = ()
    items: tuple[Value, ...] | None = None
    blame: Blame | None = field(default=None, compare=False)

    @property
    def rank(self) -> int:
        """Number of axes.

        Raises:
            UnknownError: the shape is not known.
        """
        return len(self.dims)

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape.

        Raises:
            UnknownError: it is not known.
        """
        if self.shape is None:
            raise UnknownError("a shape depends on data")
        return self.shape

    @property
    def full(self) -> Marks:
        """The marks in the value's shape, as a read-only view."""
        if math.prod(self.dims) > _MAX_ELEMENTS:
            raise UnknownError("a value is too large")
        return np.broadcast_to(self.marks, self.dims)

    @property
    def numbers(self) -> NDArray[Any] | None:
        """The numbers when every one is known."""
        return self.known if self.sure is None else None

    def is_sized(self, axis: int) -> bool:
        """Whether an axis is as long as the number of samples says."""
        return axis < len(self.sized) and self.sized[axis]

    def varies(self, axis: int) -> bool:
        """Whether marks differ along an axis."""
        return self.marks.shape[axis] > 1


NOTHING = np.zeros((), np.uint16)


def constant(array: NDArray[Any] | None, shape: Sequence[int]) -> Value:
    """Return a value no sample has part in. `array` are its numbers where they are small.

    Args:
        array: the numbers, if they are few. `None`: unknown.
        shape: shape of the constant, needed also where the numbers are unknown.
    """
    dims = tuple(int(size) for size in shape)
    known = array if array is not None and array.size <= _MAX_KNOWN and array.dtype.kind in "iubf" else None
    return Value(dims, np.zeros((1,) * len(dims), np.uint16), known)


def total(value: Value) -> int:
    """Return the marks of all elements together."""
    found = value.extent | int(np.bitwise_or.reduce(value.marks, axis=None))
    for item in value.items or ():
        found |= total(item)
    return found


def common(value: Value) -> int:
    """Return the samples every element has in common, when these are several, else 0."""
    if value.marks.size == 0:
        return 0
    bits = int(np.bitwise_and.reduce(value.marks, axis=None))
    samples = bits & SAMPLES
    return bits & (SAMPLES | SIZE) if _SEVERAL[samples] else 0


def is_mixed(value: Value) -> bool:
    """Whether some element depends on several samples, or on a sample and on the number of samples."""
    for item in value.items or ():
        if is_mixed(item):
            return True
    samples = value.marks & SAMPLES
    return bool((_SEVERAL[samples] | ((samples != 0) & ((value.marks & SIZE) != 0))).any())


def packed(marks: NDArray[Any], shape: Sequence[int] | None = None) -> Marks:
    """Store equal values along an axis once.

    Args:
        marks: dependence of each element on the samples.
        shape: shape of the value. `None`: the array's.
    """
    result: Marks = np.asarray(marks, np.uint16)
    for axis in range(result.ndim):
        if result.shape[axis] > 1:
            first = result.take([0], axis)
            if (result == first).all():
                result = first
        elif result.shape[axis] == 0:
            return np.zeros((1,) * result.ndim, np.uint16)
    return np.ascontiguousarray(result) if result.ndim else result


def broadcast_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return NumPy's broadcast shape. `ValueError` when there is none."""
    return np.broadcast_shapes(*shapes)


def _at_rank(marks: Marks, rank: int) -> Marks:
    return marks.reshape((1,) * (rank - marks.ndim) + marks.shape)


def join(shape: tuple[int, ...], marks: Sequence[Marks]) -> Marks:
    """Unite marks, broadcast to a shape."""
    result: Marks = np.zeros((1,) * len(shape), np.uint16)
    for each in marks:
        result = result | _at_rank(each, len(shape))
    return result


def loose(values: Sequence[Value], *, extra: int = MAYBE) -> Value:
    """Return a value known by its origin only: the common marks of all elements of its origins, and a doubt."""
    marks, extent = 0, 0
    for value in values:
        marks |= common(value) | (MAYBE if total(value) & (SAMPLES | MAYBE) else 0)
        extent |= total(value)
    if marks or extent:
        marks |= extra
    return Value(None, np.array(marks, np.uint16), extent=extent)


def reduced(value: Value, axes: Sequence[int], *, keep: bool) -> Value:
    """Return the union along axes. One whose length follows the number of samples adds `SIZE`.

    Args:
        value: the value to reduce. A scalar keeps its marks.
        axes: axes to reduce, counted from 0.
        keep: keep reduced axes with size 1.
    """
    wanted = tuple(sorted({axis % value.rank for axis in axes})) if value.rank else ()
    marks: Marks = np.bitwise_or.reduce(value.marks, axis=wanted, keepdims=True) if wanted else value.marks
    if any(value.is_sized(axis) for axis in wanted):
        marks = marks | np.uint16(SIZE)
    shape = tuple(1 if axis in wanted else size for axis, size in enumerate(value.dims))
    if not keep:
        marks = marks.reshape([size for axis, size in enumerate(marks.shape) if axis not in wanted])
        shape = tuple(size for axis, size in enumerate(value.dims) if axis not in wanted)
    return Value(shape, marks)


def restructured(value: Value, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Value:
    """Return the result of an operator to move elements only: the change works on marks and numbers alike."""
    marks = change(value.full)
    known = sure = None
    if value.known is not None:
        known = change(np.broadcast_to(value.known, value.dims))
        if known.size > _MAX_KNOWN:
            known = None
        elif value.sure is not None:
            sure = np.asarray(change(np.broadcast_to(value.sure, value.dims)), np.bool_)
            if sure.all():
                sure = None
    return Value(tuple(marks.shape), packed(marks), known, sure)


def with_marks(value: Value, extra: int) -> Value:
    """Return a value with more marks on every element."""
    return replace(value, marks=value.marks | np.uint16(extra)) if extra else value


# One operator, in the form used by the rules of the batch analysis.


@dataclass(frozen=True)
class BatchCall:
    """A node and the facts of its inputs.

    Attributes:
        node: the node, for its name and inputs.
        inputs: `None` for an input left out.
        attributes: by name, subgraphs left out.
        opset: version of the node's domain.
        samples: how many samples the batch of this walk has.
    """

    node: onnx.NodeProto
    inputs: Sequence[Value | None]
    attributes: Mapping[str, Any]
    opset: int
    samples: int

    def value(self, index: int) -> Value:
        """Return a required input."""
        found = self.optional(index)
        if found is None:
            raise UnknownError(f"input {index} is missing")
        return found

    def optional(self, index: int) -> Value | None:
        """Return an input, or `None`."""
        return self.inputs[index] if index < len(self.inputs) else None

    @property
    def given(self) -> tuple[Value, ...]:
        """The inputs present."""
        return tuple(value for value in self.inputs if value is not None)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute. Text as `str`."""
        found = self.attributes.get(name, default)
        return found.decode() if isinstance(found, bytes) else found

    def ints(self, index: int | None, name: str = "") -> tuple[int, ...] | None:
        """Return integers from an attribute or from an input, or `None` when neither is there.

        Args:
            index: position of the input. `None`: the attribute alone counts.
            name: attribute to look for first. Empty: the input alone counts.

        Raises:
            UnknownError: the input's numbers are not known.
        """
        if name and name in self.attributes:
            found = self.attributes[name]
            return tuple(int(each) for each in found) if isinstance(found, list | tuple) else (int(found),)
        value = None if index is None else self.optional(index)
        if value is None:
            return None
        if value.numbers is None:
            raise UnknownError(f"input {index} is computed from data")
        return tuple(int(each) for each in np.broadcast_to(value.numbers, value.dims).reshape(-1))

    def integer(self, index: int | None, name: str = "", default: int | None = None) -> int:
        """Return one integer. See `ints`.

        Args:
            index: position of the input. `None`: the attribute alone counts.
            name: attribute to look for first. Of several numbers the first counts.
            default: value if neither is stated. `None`: there is no default.
        """
        found = self.ints(index, name)
        if found:
            return found[0]
        if default is None:
            raise UnknownError("a number is missing")
        return default

    def extra(self, *, without: Sequence[int] = ()) -> int:
        """Return the marks of all inputs but some."""
        marks = 0
        for index, value in enumerate(self.inputs):
            if value is not None and index not in without:
                marks |= total(value)
        return marks


Rule = Callable[[BatchCall], Sequence[Value]]
