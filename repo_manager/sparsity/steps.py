"""What lies between a stored weight and the operator that uses it: layout changes and value changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cast", "Dequantize", "Permute", "Quantize", "Reshape", "Step", "SubtractZeroPoint", "per_axis"]

_Array = NDArray[Any]


class Step(Protocol):
    """One change. `apply` gives what the next operator sees; `invert` carries a mask back to the storage."""

    def apply(self, values: _Array) -> _Array:
        """Return the changed values; a view where the layout allows."""
        ...

    def invert(self, mask: _Array) -> _Array:
        """Return a mask for the values before this step from one for those after it."""
        ...


@dataclass(frozen=True)
class Permute:
    """Transpose."""

    order: tuple[int, ...]

    def apply(self, values: _Array) -> _Array:
        """See `Step`."""
        return values.transpose(self.order)

    def invert(self, mask: _Array) -> _Array:
        """See `Step`."""
        return mask.transpose(np.argsort(self.order))


@dataclass(frozen=True)
class Reshape:
    """Reshape, Flatten, Squeeze and Unsqueeze: same values in the same order."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def apply(self, values: _Array) -> _Array:
        """See `Step`."""
        return values.reshape(self.after)

    def invert(self, mask: _Array) -> _Array:
        """See `Step`."""
        return mask.reshape(self.before)


@dataclass(frozen=True)
class Cast:
    """Cast: a small value can become zero."""

    dtype: np.dtype[Any]

    def apply(self, values: _Array) -> _Array:
        """See `Step`."""
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(self.dtype)

    def invert(self, mask: _Array) -> _Array:
        """See `Step`."""
        return mask


@dataclass(frozen=True)
class Quantize:
    """QuantizeLinear: `saturate(round(x / scale) + zero)`, in the stored type.

    Rounds half to even (ONNX, QuantizeLinear). `bounds` are the stored type's; `None` for float8, which
    only rounds to `dtype`.
    """

    scale: _Array
    zero_point: _Array
    bounds: tuple[int, int] | None
    dtype: np.dtype[Any]

    def apply(self, values: _Array) -> _Array:
        """See `Step`."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scaled: _Array = values.astype(np.float32) / self.scale.astype(np.float32)
            if self.bounds is None:
                return scaled.astype(self.dtype)
            zero = self.zero_point.astype(np.float32)
            return np.asarray(np.clip(np.rint(scaled) + zero, *self.bounds).astype(self.dtype))

    def invert(self, mask: _Array) -> _Array:
        """See `Step`."""
        return mask


@dataclass(frozen=True)
class SubtractZeroPoint:
    """Stored integers as distance from their zero point: what an integer operator multiplies with."""

    zero_point: _Array

    def apply(self, values: _Array) -> _Array:
        """See `Step`."""
        if not self.zero_point.any():
            return values
        wide = np.int64 if values.dtype.itemsize > 2 else np.int32
        return np.asarray(values.astype(wide) - self.zero_point.astype(wide))

    def invert(self, mask: _Array) -> _Array:
        """See `Step`."""
        return mask


@dataclass(frozen=True)
class Dequantize(SubtractZeroPoint):
    """DequantizeLinear. `apply` gives the distance from the zero point: zero is zero, the scale is left out.

    An INT8 kernel sees these integers, whatever their scale; `real` gives the numbers themselves.

    Attributes:
        scale: broadcasts to the values; `None` when it is computed at run time.
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
    """Spread a scale or zero point (one number, one an axis, or blocked) so that it broadcasts to `shape`.

    Returns:
        The parameter, broadcastable; `None` when it does not fit the shape.
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
