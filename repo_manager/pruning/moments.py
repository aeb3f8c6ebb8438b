"""The sums a layer is solved from, column by column: no activation is kept."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.pruning.quadratic import LayerProblem

__all__ = ["Moments"]

Array = NDArray[Any]

_PANEL = 512  # columns of one task; fixed, so results do not depend on the number of threads


class _Sums:
    """Sums over some of the samples. `inputs` holds the lower half, `cross` a row for each output or dense input."""

    def __init__(self, outputs: int, columns: int, others: int) -> None:
        self.inputs = np.zeros((columns, columns))
        self.cross = np.zeros((others, columns))
        self.input_sum, self.output_sum = np.zeros(columns), np.zeros(outputs)
        self.energy = np.zeros(outputs)
        self.count = 0
        self.waiting: list[tuple[Array, Array, Array]] = []

    def join(self, other: _Sums) -> None:
        """Add another's sums."""
        for name in ("inputs", "cross", "input_sum", "output_sum", "energy"):
            total: Array = getattr(self, name)
            total += getattr(other, name)
        self.count += other.count


class Moments:
    """Sums of products of a layer's inputs and outputs, over two parts of the samples: one to judge by, and the rest.

    Products are computed in float32, of distances from the first columns' mean, and summed in float64. Of the outputs
    only their products with the inputs are needed. Outputs are the dense inputs times the dense weights, so these
    products follow from those of the inputs with the dense inputs: less work where a layer has more outputs than
    inputs, and none where the dense model's inputs are the same.

    Args:
        outputs: number of outputs N, the rows of the layer's weights.
        columns: number of inputs K of one output, the kernel included.
        pool: shares out the matrix products to its workers.
        same: the dense model sees the same inputs.
    """

    def __init__(self, outputs: int, columns: int, pool: Executor, *, same: bool = False) -> None:
        self.pool = pool
        self.same, self.by_inputs = same, same or outputs > columns
        self.others = 0 if same else min(outputs, columns)
        self.rest, self.judging = _Sums(outputs, columns, self.others), _Sums(outputs, columns, self.others)
        self.origin: Array | None = None
        self.dense_origin: Array | None = None

    @property
    def reads_dense_inputs(self) -> bool:
        """Whether `add` needs the dense model's inputs."""
        return self.by_inputs and not self.same

    def add(self, inputs: Array, outputs: Array, dense: Array | None = None, *, judging: bool = False) -> None:
        """Add columns, float32.

        Args:
            inputs: the layer's inputs, `[P, K]`.
            outputs: answers of the dense model without the bias, `[P, N]`.
            dense: inputs of the dense model, `[P, K]`. `None`: `reads_dense_inputs` is false.
            judging: they belong to the part to judge by.
        """
        sums = self.judging if judging else self.rest
        assert dense is not None or not self.reads_dense_inputs
        sums.waiting.append((inputs, outputs, outputs if dense is None else dense))
        if sum(len(one[0]) for one in sums.waiting) >= max(_PANEL, min(2048, inputs.shape[1])):
            self._flush(sums)

    def _flush(self, sums: _Sums) -> None:
        if not sums.waiting:
            return
        inputs = np.concatenate([one[0] for one in sums.waiting])
        outputs = np.concatenate([one[1] for one in sums.waiting])
        others = outputs
        if self.reads_dense_inputs:
            others = np.concatenate([one[2] for one in sums.waiting])
        sums.waiting = []
        if self.origin is None:
            self.origin = _mean(inputs)
            self.dense_origin = _mean(others) if self.reads_dense_inputs else self.origin
        inputs -= self.origin
        if self.reads_dense_inputs:
            others -= self.dense_origin

        def panel(start: int) -> None:
            stop = min(start + _PANEL, inputs.shape[1])
            part = np.ascontiguousarray(inputs[:, start:stop])
            sums.inputs[start:stop, :stop] += part.T @ inputs[:, :stop]
            if not self.same:
                sums.cross[:, start:stop] += others.T @ part

        list(self.pool.map(panel, range(0, inputs.shape[1], _PANEL)))
        sums.input_sum += inputs.sum(axis=0, dtype=np.float64)
        sums.output_sum += outputs.sum(axis=0, dtype=np.float64)
        sums.energy += np.einsum("ij,ij->j", outputs, outputs, dtype=np.float64)
        sums.count += len(inputs)

    def parts(self, dense: Array, rows: Array, *, centred: bool) -> tuple[LayerProblem, LayerProblem] | None:
        """Return the problem of the rest and the one of the samples to judge by, in float32; `None`: one is empty.

        Args:
            dense: weights of the dense layer, `[N, K]`.
            rows: numbers of the outputs to keep in both problems, from 0.
            centred: a constant is free to take up the means.
        """
        self._flush(self.rest)
        self._flush(self.judging)
        if not (self.rest.count and self.judging.count):
            return None
        return (
            self._problem(self.rest, dense, rows, centred, np.float32),
            self._problem(self.judging, dense, rows, centred, np.float32),
        )

    def whole(self, dense: Array, *, centred: bool) -> LayerProblem:
        """Return the problem of all samples. Ends the sums: nothing may be added afterwards.

        Args:
            dense: weights of the dense layer, `[N, K]`. Their answers are the aim.
            centred: a constant is free to take up the means.
        """
        self._flush(self.rest)
        self._flush(self.judging)
        self.rest.join(self.judging)
        self.judging = _Sums(0, 0, 0)
        return self._problem(self.rest, dense, np.arange(len(dense)), centred)

    def _problem(self, sums: _Sums, dense: Array, rows: Array, centred: bool, real: type = np.float64) -> LayerProblem:
        count = max(1, sums.count)
        origin = np.zeros(len(sums.inputs)) if self.origin is None else self.origin.astype(np.float64)
        # Around the mean or zero: sums of (x - a)(x - a)' follow from the sums around the origin.
        about = origin + sums.input_sum / count if centred else np.zeros_like(origin)
        offset, off_sum = origin - about, sums.input_sum
        moments: Array = np.empty(sums.inputs.shape, real)
        for start in range(0, len(moments), _PANEL):
            part = slice(start, min(start + _PANEL, len(moments)))
            panel = sums.inputs[part, : part.stop] + np.outer(offset[part], off_sum[: part.stop])
            panel += np.outer(off_sum[part] + sums.count * offset[part], offset[: part.stop])
            corner = np.tril(panel[:, start:])
            moments[part, :start] = panel[:, :start]
            moments[:start, part] = panel[:, :start].T
            moments[part, part] = corner + np.tril(corner, -1).T
        output_sum = sums.output_sum[rows]
        shared = output_sum / count if centred else np.zeros_like(output_sum)
        target = self._products(sums, dense, rows)
        target += np.outer(output_sum, offset)
        target -= np.outer(shared, off_sum + sums.count * offset)
        energy = np.maximum(sums.energy[rows] - sums.count * shared**2, 0)
        return LayerProblem(dense[rows], moments, target, energy)

    def _products(self, sums: _Sums, dense: Array, rows: Array) -> Array:
        """Return the sum of z (x - origin)' of some outputs."""
        if not self.by_inputs:
            return sums.cross[rows]
        cross = sums.cross
        if self.same:
            cross = np.tril(sums.inputs) + np.tril(sums.inputs, -1).T
        origin = np.zeros(len(cross)) if self.dense_origin is None else self.dense_origin.astype(np.float64)
        return np.asarray(dense[rows].astype(np.float64) @ (cross + np.outer(origin, sums.input_sum)))

    def shift(self, weights: Array) -> Array:
        """Return by how much the outputs' means are short with other weights, `[N]`, over the result of `whole`."""
        if not self.rest.count or self.origin is None:
            return np.zeros(len(self.rest.output_sum))
        total = self.rest.input_sum + self.rest.count * self.origin.astype(np.float64)
        return np.asarray((self.rest.output_sum - weights.astype(np.float64) @ total) / self.rest.count)


def _mean(columns: Array) -> Array:
    return np.asarray(columns.mean(axis=0, dtype=np.float64), np.float32)
