"""What a layer is solved from, summed up column by column: no activation is kept."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.pruning.quadratic import Problem

__all__ = ["Moments"]

Array = NDArray[Any]

_PANEL = 512  # columns of one task; fixed, so that results do not depend on the number of threads


class _Sums:
    """Sums over some of the samples. `inputs` holds the lower half only."""

    def __init__(self, outputs: int, columns: int) -> None:
        self.inputs = np.zeros((columns, columns))
        self.cross = np.zeros((outputs, columns))
        self.input_sum, self.output_sum = np.zeros(columns), np.zeros(outputs)
        self.energy = np.zeros(outputs)
        self.count = 0
        self.waiting: list[tuple[Array, Array]] = []

    def join(self, other: _Sums) -> None:
        """Add another's sums."""
        for name in ("inputs", "cross", "input_sum", "output_sum", "energy"):
            total: Array = getattr(self, name)
            total += getattr(other, name)
        self.count += other.count


class Moments:
    """Sums of products of a layer's inputs and outputs, over two parts of the samples: one to judge by, and the rest.

    Products are computed in float32, of distances from the first columns' mean, and summed in float64.

    Args:
        outputs: number of outputs N.
        columns: number of inputs K.
        pool: shares out the products.
    """

    def __init__(self, outputs: int, columns: int, pool: Executor) -> None:
        self.pool = pool
        self.rest, self.judging = _Sums(outputs, columns), _Sums(outputs, columns)
        self.origin: Array | None = None

    def add(self, inputs: Array, outputs: Array, *, judging: bool = False) -> None:
        """Add columns: inputs `[P, K]`, outputs `[P, N]`, float32.

        Args:
            inputs: inputs `[P, K]`, float32.
            outputs: outputs `[P, N]`, float32.
            judging: whether the columns are held out to judge by.
        """
        sums = self.judging if judging else self.rest
        sums.waiting.append((inputs, outputs))
        if sum(len(pair[0]) for pair in sums.waiting) >= max(_PANEL, min(2048, inputs.shape[1])):
            self._flush(sums)

    def _flush(self, sums: _Sums) -> None:
        if not sums.waiting:
            return
        inputs = np.concatenate([pair[0] for pair in sums.waiting])
        outputs = np.concatenate([pair[1] for pair in sums.waiting])
        sums.waiting = []
        if self.origin is None:
            self.origin = inputs.mean(axis=0, dtype=np.float64).astype(np.float32)
        inputs -= self.origin

        def panel(start: int) -> None:
            stop = min(start + _PANEL, inputs.shape[1])
            part = np.ascontiguousarray(inputs[:, start:stop])
            sums.inputs[start:stop, :stop] += part.T @ inputs[:, :stop]
            sums.cross[:, start:stop] += outputs.T @ part

        list(self.pool.map(panel, range(0, inputs.shape[1], _PANEL)))
        sums.input_sum += inputs.sum(axis=0, dtype=np.float64)
        sums.output_sum += outputs.sum(axis=0, dtype=np.float64)
        sums.energy += np.einsum("ij,ij->j", outputs, outputs, dtype=np.float64)
        sums.count += len(inputs)

    def parts(self, dense: Array, *, centred: bool) -> tuple[Problem, Problem] | None:
        """Return the problem of the rest and that of the samples to judge by, in float32. `None`: one is empty."""
        self._flush(self.rest)
        self._flush(self.judging)
        if not (self.rest.count and self.judging.count):
            return None
        return (
            self._problem(self.rest, dense, centred, np.float32),
            self._problem(self.judging, dense, centred, np.float32),
        )

    def whole(self, dense: Array, *, centred: bool) -> Problem:
        """Return the problem of all samples. Ends the sums: nothing may be added afterwards.

        Args:
            dense: dense weights `[N, K]`.
            centred: a constant is free to take up the means.
        """
        self._flush(self.rest)
        self._flush(self.judging)
        self.rest.join(self.judging)
        self.judging = _Sums(0, 0)
        return self._problem(self.rest, dense, centred)

    def _problem(self, sums: _Sums, dense: Array, centred: bool, real: type = np.float64) -> Problem:
        count = max(1, sums.count)
        origin = np.zeros(len(sums.inputs)) if self.origin is None else self.origin.astype(np.float64)
        # About the mean, or about zero: sums of (x - a)(x - a)' follow from those about the origin.
        about = origin + sums.input_sum / count if centred else np.zeros_like(origin)
        offset, off_sum = origin - about, sums.input_sum
        moments: Array = np.empty(sums.inputs.shape, real)
        for start in range(0, len(moments), _PANEL):
            part = slice(start, min(start + _PANEL, len(moments)))
            rows = sums.inputs[part, : part.stop] + np.outer(offset[part], off_sum[: part.stop])
            rows += np.outer(off_sum[part] + sums.count * offset[part], offset[: part.stop])
            corner = np.tril(rows[:, start:])
            moments[part, :start] = rows[:, :start]
            moments[:start, part] = rows[:, :start].T
            moments[part, part] = corner + np.tril(corner, -1).T
        shared = sums.output_sum / count if centred else np.zeros_like(sums.output_sum)
        target = sums.cross + np.outer(sums.output_sum, offset)
        target -= np.outer(shared, off_sum + sums.count * offset)
        energy = np.maximum(sums.energy - sums.count * shared**2, 0)
        return Problem(dense, moments, target, energy)

    def shift(self, weights: Array) -> Array:
        """Return by how much the outputs' means are short with other weights, `[N]`, over what `whole` gave."""
        if not self.rest.count or self.origin is None:
            return np.zeros(len(self.rest.cross))
        total = self.rest.input_sum + self.rest.count * self.origin.astype(np.float64)
        return np.asarray((self.rest.output_sum - weights.astype(np.float64) @ total) / self.rest.count)
