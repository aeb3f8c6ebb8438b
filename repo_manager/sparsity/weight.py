"""A constant on its way from where it is stored to the operator that multiplies with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model.weights import WeightStore
from repo_manager.sparsity.steps import Cast, Dequantize, Permute, Quantize, Reshape, Step

__all__ = ["MAX_SMALL_ELEMENTS", "Weight"]

MAX_SMALL_ELEMENTS = 1 << 24
"""Scales, zero points, shapes, spread sparse tensors: beyond it no constant is worth computing with."""

_FLOAT4_SIZES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # OCP Microscaling Formats, E2M1


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant and the way it takes to its user.

    Attributes:
        name: of the stored tensor.
        source: the stored tensor; `None` for one number repeated (ConstantOfShape).
        sparse: the sparse initializer whose values `source` holds, if it is one.
        fill: the repeated number, rank 0.
        computed: values that the graph computes from constants (Slice, Concat, Mul, ...); no tensor holds them.
        dtype: element type as stored.
        stored_shape: shape as stored.
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
    steps: tuple[Step, ...] = ()
    via: tuple[str, ...] = ()
    computed: NDArray[Any] | None = None

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def holder(self) -> onnx.TensorProto | NDArray[Any]:
        """The object that holds the values; two weights without steps have the same values if it is the same object."""
        for holder in (self.source, self.computed, self.fill):
            if holder is not None:
                return holder
        raise ValueError(f"weight '{self.name}' has no values")

    @property
    def scale_is_known(self) -> bool:
        """Whether every scale on the way is a constant, so that the real numbers can be told."""
        return all(step.scale is not None for step in self.steps if isinstance(step, Dequantize))

    def then(self, step: Step | None, via: str, shape: tuple[int, ...] | None = None) -> Weight:
        """Return the weight with one more step towards its user."""
        steps = self.steps if step is None else (*self.steps, step)
        return replace(self, steps=steps, via=(*self.via, via), shape=self.shape if shape is None else shape)

    def values(self, store: WeightStore) -> NDArray[Any]:
        """Return the values as the user sees them; zero is zero.

        The scale of a quantised weight is left out, unless what follows it depends on the size of a number (a cast,
        another quantisation).

        Raises:
            ModelError: the file no longer holds them.
        """
        return self._after_steps(self.stored(store), self.steps)

    def single_value(self) -> NDArray[Any] | None:
        """Return the one number that all values are, as `values` gives it; `None` when they may differ."""
        if self.fill is None:
            return None
        steps = tuple(step for step in self.steps if not isinstance(step, Permute | Reshape))
        value = self._after_steps(self.fill.reshape(()), steps)
        return value if value.size == 1 else None

    def real_values(self, store: WeightStore) -> NDArray[Any]:
        """Return the values as the graph defines them, scales included; `scale_is_known` must hold.

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

    def _after_steps(self, array: NDArray[Any], steps: Sequence[Step]) -> NDArray[Any]:
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
