"""A constant on its way from where it is stored to the multiplying operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model.weights import WeightStore

__all__ = [
    "MAX_SMALL_ELEMENTS",
    "Cast",
    "Dequantize",
    "Permute",
    "Quantize",
    "Reshape",
    "SubtractZeroPoint",
    "Weight",
    "WeightStep",
    "per_axis",
]


# Steps between a stored weight and its operator: changes of layout and of values.

_Array = NDArray[Any]


class WeightStep(Protocol):
    """One change. `apply` gives the next operator's input. `invert` carries a mask back to the storage."""

    def apply(self, values: _Array) -> _Array:
        """Return the changed values. A view where the layout allows."""
        ...

    def invert(self, mask: _Array) -> _Array:
        """Return a mask for the values before this step from one for those after it."""
        ...


@dataclass(frozen=True)
class Permute:
    """Transpose."""

    order: tuple[int, ...]

    def apply(self, values: _Array) -> _Array:
        """See `WeightStep`."""
        return values.transpose(self.order)

    def invert(self, mask: _Array) -> _Array:
        """See `WeightStep`."""
        return mask.transpose(np.argsort(self.order))


@dataclass(frozen=True)
class Reshape:
    """Reshape, Flatten, Squeeze and Unsqueeze: same values in the same order."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def apply(self, values: _Array) -> _Array:
        """See `WeightStep`."""
        return values.reshape(self.after)

    def invert(self, mask: _Array) -> _Array:
        """See `WeightStep`."""
        return mask.reshape(self.before)


@dataclass(frozen=True)
class Cast:
    """Cast: a small value can become zero."""

    dtype: np.dtype[Any]

    def apply(self, values: _Array) -> _Array:
        """See `WeightStep`."""
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(self.dtype)

    def invert(self, mask: _Array) -> _Array:
        """See `WeightStep`."""
        return mask


@dataclass(frozen=True)
class Quantize:
    """QuantizeLinear: `saturate(round(x / scale) + zero)`, in the stored type.

    Rounds half to even (ONNX, QuantizeLinear). `bounds` are the stored type's. `None` for float8: it only rounds to
    `dtype`.
    """

    scale: _Array
    zero_point: _Array
    bounds: tuple[int, int] | None
    dtype: np.dtype[Any]

    def apply(self, values: _Array) -> _Array:
        """See `WeightStep`."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scaled: _Array = values.astype(np.float32) / self.scale.astype(np.float32)
            if self.bounds is None:
                return scaled.astype(self.dtype)
            zero = self.zero_point.astype(np.float32)
            return np.asarray(np.clip(np.rint(scaled) + zero, *self.bounds).astype(self.dtype))

    def invert(self, mask: _Array) -> _Array:
        """See `WeightStep`."""
        return mask


@dataclass(frozen=True)
class SubtractZeroPoint:
    """Stored integers as distance from their zero point: the factor of an integer operator."""

    zero_point: _Array

    def apply(self, values: _Array) -> _Array:
        """See `WeightStep`."""
        if not self.zero_point.any():
            return values
        wide = np.int64 if values.dtype.itemsize > 2 else np.int32
        return np.asarray(values.astype(wide) - self.zero_point.astype(wide))

    def invert(self, mask: _Array) -> _Array:
        """See `WeightStep`."""
        return mask


@dataclass(frozen=True)
class Dequantize(SubtractZeroPoint):
    """DequantizeLinear. `apply` gives the distance from the zero point: zero is zero, the scale is left out.

    An INT8 kernel sees these integers, regardless of their scale. `real` gives the numbers themselves.

    Attributes:
        scale: broadcasts to the values. `None` when it is computed at run time.
    """

    scale: _Array | None

    def real(self, values: _Array) -> _Array:
        """Return `(x - zero) * scale`, in the scale's type.

        Raises:
            ValueError: the scale is not known.
        """
        if self.scale is None:
            raise ValueError("the scale is computed at run time")
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            wide = self.apply(values).astype(np.float32) * self.scale.astype(np.float32)
            return np.asarray(wide.astype(self.scale.dtype, copy=False))


def per_axis(parameter: _Array, shape: tuple[int, ...], axis: int, block: int) -> _Array | None:
    """Spread a scale or zero point (one number, one an axis, or blocked) to broadcast to `shape`.

    Args:
        parameter: scale or zero point: one number, rank 1, or the weight's rank.
        shape: shape of the weight, as the quantising operator reads it.
        axis: axis of the channels or blocks.
        block: size of a block. 0: not blocked.

    Returns:
        The parameter, broadcastable. `None` when it does not fit the shape.
    """
    if parameter.size == 1:
        return parameter.reshape(())
    if not shape or not -len(shape) <= axis < len(shape):
        return None
    axis %= len(shape)
    if parameter.ndim == 1 and parameter.shape[0] == shape[axis]:
        return parameter.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    if parameter.ndim == len(shape) and all(a in (1, b) for a, b in zip(parameter.shape, shape, strict=True)):
        return parameter
    if parameter.ndim == len(shape) and block > 0:
        spread = np.repeat(parameter, block, axis=axis).take(range(shape[axis]), axis=axis, mode="clip")
        return spread if spread.shape == shape else None
    return None


MAX_SMALL_ELEMENTS = 1 << 24
"""Scales, zero points, shapes, spread sparse tensors: beyond it no constant is worth computing with."""

_FLOAT4_SIZES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # OCP Microscaling Formats, E2M1


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant and the way it takes to its user.

    Attributes:
        name: of the stored tensor. Without one, of the output of the node with the values.
        source: the stored tensor. `None` for one number repeated (ConstantOfShape).
        sparse: the sparse initializer whose values `source` holds, if it is one.
        fill: the repeated number, rank 0.
        computed: values the graph computes from constants (Slice, Concat, Mul, ...). No tensor holds them.
        dtype: element type as stored, before any step, such as `float4_e2m1fn`.
        stored_shape: shape as stored, before any step.
        shape: shape as the user sees it.
        steps: from the storage to the user.
        via: operator names of these steps.
    """

    name: str
    source: onnx.TensorProto | None
    sparse: onnx.SparseTensorProto | None
    fill: NDArray[Any] | None
    dtype: str
    stored_shape: tuple[int, ...]
    shape: tuple[int, ...]
    steps: tuple[WeightStep, ...] = ()
    via: tuple[str, ...] = ()
    computed: NDArray[Any] | None = None

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def holder(self) -> onnx.TensorProto | NDArray[Any]:
        """The object with the values. Two weights without steps have the same values if it is the same object."""
        for holder in (self.source, self.computed, self.fill):
            if holder is not None:
                return holder
        raise ValueError(f"weight '{self.name}' has no values")

    @property
    def scale_is_known(self) -> bool:
        """Whether every scale on the way is a constant, so the real numbers is known."""
        return all(step.scale is not None for step in self.steps if isinstance(step, Dequantize))

    def then(self, step: WeightStep | None, via: str, shape: tuple[int, ...] | None = None) -> Weight:
        """Return the weight with one more step towards its user.

        Args:
            step: change of the values. `None`: the values stay.
            via: name of the operator, added to `Weight.via`.
            shape: shape after the step. `None`: the shape stays.
        """
        steps = self.steps if step is None else (*self.steps, step)
        return replace(self, steps=steps, via=(*self.via, via), shape=self.shape if shape is None else shape)

    def values(self, store: WeightStore) -> NDArray[Any]:
        """Return the values as the user sees them. Zero is zero.

        The scale of a quantised weight is left out, unless a later step depends on the size of a number (a cast,
        another quantisation).

        Raises:
            ModelError: the file no longer holds them.
        """
        return self._after_steps(self.stored(store), self.steps)

    def single_value(self) -> NDArray[Any] | None:
        """Return the one number common to all values, as `values` gives it, or `None` when they may differ."""
        if self.fill is None:
            return None
        steps = tuple(step for step in self.steps if not isinstance(step, Permute | Reshape))
        value = self._after_steps(self.fill.reshape(()), steps)
        return value if value.size == 1 else None

    def real_values(self, store: WeightStore) -> NDArray[Any]:
        """Return the values as the graph defines them, scales included. `scale_is_known` must hold.

        Raises:
            ModelError: the file no longer holds them.
        """
        array = self.real_as_stored(self.stored(store))
        for step in self.steps:
            array = step.real(array) if isinstance(step, Dequantize) else step.apply(array)
        return array

    def real_as_stored(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return stored values as numbers: a `float4_e2m1fn` is read as its place in the order of magnitudes."""
        if self.dtype != "float4_e2m1fn" or self.computed is not None:
            return array
        return np.asarray(np.sign(array) * _FLOAT4_SIZES[np.abs(array)])

    def _after_steps(self, array: NDArray[Any], steps: Sequence[WeightStep]) -> NDArray[Any]:
        scales = [index for index, step in enumerate(steps) if isinstance(step, Dequantize)]
        sized = [index for index, step in enumerate(steps) if isinstance(step, Cast | Quantize)]
        real_until = max(sized, default=-1) if scales and self.scale_is_known else -1
        if scales and scales[0] < real_until:
            array = self.real_as_stored(array)
        for index, step in enumerate(steps):
            array = step.real(array) if isinstance(step, Dequantize) and index < real_until else step.apply(array)
        return array

    def stored(self, store: WeightStore) -> NDArray[Any]:
        """Return the values as stored, before any step."""
        if self.fill is not None:
            return np.broadcast_to(self.fill, self.stored_shape)
        if self.computed is not None:
            return self.computed
        assert self.source is not None
        if self.sparse is None:
            return store.array(self.source)
        return _densify(self.sparse, store)


def _densify(sparse: onnx.SparseTensorProto, store: WeightStore) -> NDArray[Any]:
    values, indices = store.array(sparse.values), store.array(sparse.indices).astype(np.int64)
    dims = tuple(sparse.dims)
    if math.prod(dims) > MAX_SMALL_ELEMENTS:
        raise ModelError(f"sparse tensor '{sparse.values.name}' is too large to spread")
    dense = np.zeros(math.prod(dims), values.dtype)
    try:
        place = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), dims)
        dense[place] = values
    except (ValueError, IndexError) as exc:
        raise ModelError(f"sparse tensor '{sparse.values.name}' has indices outside its shape") from exc
    return dense.reshape(dims)
