"""A constant on its way from where it is stored to the operator that multiplies with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model.weights import WeightStore
from repo_manager.sparsity.steps import Step

__all__ = ["MAX_SMALL_ELEMENTS", "Weight"]

MAX_SMALL_ELEMENTS = 1 << 24
"""Scales, zero points, shapes, spread sparse tensors: beyond it no constant is worth computing with."""


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

    def then(self, step: Step | None, via: str, shape: tuple[int, ...] | None = None) -> Weight:
        """Return the weight with one more step towards its user."""
        steps = self.steps if step is None else (*self.steps, step)
        return replace(self, steps=steps, via=(*self.via, via), shape=self.shape if shape is None else shape)

    def values(self, store: WeightStore) -> NDArray[Any]:
        """Return the values as the user sees them, up to a scale per output channel; zero is zero.

        Raises:
            ModelError: the file no longer holds them.
        """
        array = self.stored(store)
        for step in self.steps:
            array = step.apply(array)
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
