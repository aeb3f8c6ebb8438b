"""The quadratic a layer is solved by: the part common to all rows, its errors, and the best values for a fixed
mask."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.sparsity.pattern import GROUP, two_four_mask

__all__ = [
    "BLOCK",
    "DOUBLE_UP_TO",
    "PAIRS",
    "Array",
    "LayerProblem",
    "System",
    "dot",
    "errors_of",
    "fit",
]

Array = NDArray[Any]
PAIRS = np.array(list(itertools.combinations(range(GROUP), 2)))
_PLACES = np.arange(GROUP)[:, None]
_FIRST, _SECOND = np.triu_indices(GROUP)  # the ten products of a group's four values
BLOCK = 64  # columns: one matrix product applies their updates to the others
DOUBLE_UP_TO = 384  # columns: problems up to this size are solved in float64 at no noticeable cost
_MAX_FIT_STEPS = 24
_FITTED = 0.3  # share of the first residual: leaves 9 % of the possible gain, 0.01 % of the error
_EXACT_ROWS = 64  # rows of exact fits at a time
_DEAD, _DEAD_SHARE = 1e-6, 1e-3


@dataclass(frozen=True)
class LayerProblem:
    """The problem of one layer. Groups of four are consecutive columns.

    Attributes:
        dense: `[N, K]`, the weights w0.
        moments: `[K, K]` float64, the sum of x x' over all samples. float32 will do to choose a damping.
        target: `[N, K]` float64, the sum of z x'.
        energy: `[N]` float64, the sum of z^2.
    """

    dense: Array
    moments: Array
    target: Array
    energy: Array

    def damping(self, share: float) -> Array:
        """Return the addend to the diagonal, `[K]`: a share of its mean, next to nothing for a dead input."""
        diagonal = self.moments.diagonal()
        mean = float(diagonal.mean())
        if mean == 0:  # all inputs are zero: magnitudes decide
            return np.ones(len(diagonal))
        return share * mean * np.where(diagonal > _DEAD * mean, 1.0, _DEAD_SHARE)


@dataclass(frozen=True)
class _Choice:
    """For each group, the matrices from its four values to the six pairs' costs and answers.

    Attributes:
        costs: `[K / 4, 6, 10]`: v' (B_PP)^-1 v for each pair P, from the ten products of v's values.
        answers: `[K / 4, 24, 4]`: (B_PP)^-1 v_P for each pair, zero elsewhere.
    """

    costs: Array
    answers: Array

    @classmethod
    def of(cls, blocks: Array) -> _Choice:
        """Make the choices of symmetric positive blocks B `[K / 4, 4, 4]`."""
        inverses = np.zeros((len(blocks), len(PAIRS), GROUP, GROUP), blocks.dtype)
        for number, pair in enumerate(PAIRS):
            at = np.ix_(range(len(blocks)), pair, pair)
            inverses[:, number][at] = np.linalg.inv(blocks[at])
        twice = np.where(_FIRST == _SECOND, 1, 2)
        costs = inverses[:, :, _FIRST, _SECOND] * twice
        return cls(costs, inverses.reshape(len(blocks), -1, GROUP))

    def astype(self, real: type) -> _Choice:
        """Return it in another type."""
        return _Choice(self.costs.astype(real), self.answers.astype(real))

    def pick(self, group: int, values: Array, *, cheapest: bool) -> Array:
        """Return, for each column of `values` `[4, N]`, the answer of the best pair, `[4, N]`."""
        costs = self.costs[group] @ (values[_FIRST] * values[_SECOND])
        choice = costs.argmin(axis=0) if cheapest else costs.argmax(axis=0)
        answers = self.answers[group] @ values
        return np.asarray(answers[GROUP * choice + _PLACES, np.arange(values.shape[1])])


@dataclass(frozen=True)
class System:
    """The part common to all rows, in their type.

    Attributes:
        matrix: A, `[K, K]`: second moments of the layer's inputs, damping included.
        factor: U, upper, with A^-1 = U' U.
        removal: costs of removing each pair when the columns to the left are gone.
        fill: costs of keeping each pair when all other groups stay.
    """

    matrix: Array
    factor: Array
    removal: _Choice
    fill: _Choice

    @classmethod
    def of(cls, matrix: Array, real: type) -> System:
        """Factor A, in float64."""
        factor = _inverse_factor(matrix)
        corners = _diagonal_blocks(factor)
        return cls(
            matrix.astype(real),
            factor.astype(real),
            _Choice.of(corners.transpose(0, 2, 1) @ corners).astype(real),
            _Choice.of(_diagonal_blocks(matrix)).astype(real),
        )


def _diagonal_blocks(matrix: Array) -> Array:
    count = len(matrix) // GROUP
    numbers = np.arange(count)
    return matrix.reshape(count, GROUP, count, GROUP)[numbers, :, numbers, :]


def _inverse_factor(matrix: Array) -> Array:
    """Return the upper U with matrix^-1 = U' U: one Cholesky factor from the last row up, inverted."""
    lower = np.linalg.cholesky(matrix[::-1, ::-1])
    upper = np.ascontiguousarray(lower[::-1, ::-1])  # matrix = upper upper'
    _invert_upper(upper)
    return upper


def _invert_upper(matrix: Array) -> None:
    """Invert an upper triangular matrix in place, by halves: the work is in matrix products."""
    size = len(matrix)
    if size <= 2 * BLOCK:
        matrix[...] = np.triu(np.linalg.inv(matrix))
        return
    half = size // 2
    _invert_upper(matrix[:half, :half])
    _invert_upper(matrix[half:, half:])
    matrix[:half, half:] = -(matrix[:half, :half] @ matrix[:half, half:]) @ matrix[half:, half:]


def errors_of(system: System, weights: Array, wanted: Array) -> Array:
    """Return w A w' - 2 c w' of each row.

    Args:
        system: moments of the layer's inputs and outputs.
        weights: weights `[K, N]`, float32, one column per output.
        wanted: right-hand sides c, `[K, N]`, one column per output.
    """
    return np.asarray(np.einsum("ij,ij->j", system.matrix @ weights - 2 * wanted, weights))


def dot(left: Array, right: Array) -> float:
    """Return the sum of all products of two matrices' elements, summed in float64."""
    return float(np.einsum("ij,ij->", left, right, dtype=np.float64))


def fit(matrix: Array, weights: Array, wanted: Array) -> Array:
    """Find the best values for a fixed mask: exactly in small problems, else by conjugate gradients.

    Args:
        matrix: second moments A of the inputs, `[K, K]`.
        weights: weights `[K, N]`, 0 outside the mask.
        wanted: right-hand side c, `[K, N]`.
    """
    if len(weights) <= DOUBLE_UP_TO:
        return _fit_exactly(matrix, weights, wanted)
    return _fit_roughly(matrix, weights, wanted, _MAX_FIT_STEPS)


def _fit_roughly(matrix: Array, weights: Array, wanted: Array, steps: int) -> Array:
    """Improve the values for a fixed mask by some steps of preconditioned conjugate gradients.

    Args:
        matrix: second moments A of the inputs, `[K, K]`.
        weights: weights `[K, N]`, 0 outside the mask.
        wanted: right-hand side c, `[K, N]`.
        steps: most gradient steps. It ends earlier when every residual is small.
    """
    mask = weights != 0
    scale = mask / matrix.diagonal()[:, None]
    residual = (wanted - matrix @ weights) * mask
    step = scale * residual
    power = np.einsum("ij,ij->j", residual, step)
    enough = np.maximum(power * _FITTED**2, np.finfo(weights.dtype).tiny)
    for _ in range(steps):
        if not (power > enough).any():
            break
        curved = (matrix @ step) * mask
        bend = np.einsum("ij,ij->j", step, curved)
        length = np.where(power > enough, power / np.where(bend > 0, bend, 1), 0)
        weights = weights + length * step
        residual = residual - length * curved
        preconditioned = scale * residual
        next_power = np.einsum("ij,ij->j", residual, preconditioned)
        step = preconditioned + np.where(power > enough, next_power / np.maximum(power, enough), 0) * step
        power = np.where(power > enough, next_power, 0)
    return weights


def _fit_exactly(matrix: Array, weights: Array, wanted: Array) -> Array:
    """Solve each row for the values of its mask."""
    columns, rows = weights.shape
    kept = np.nonzero(two_four_mask(weights, 0).T)[1].reshape(rows, columns // 2)
    fitted = np.zeros((rows, columns), weights.dtype)
    for start in range(0, rows, _EXACT_ROWS):
        places = kept[start : start + _EXACT_ROWS]
        numbers = np.arange(start, start + len(places))[:, None]
        systems = matrix[places[:, :, None], places[:, None, :]]
        fitted[numbers, places] = np.linalg.solve(systems, wanted.T[numbers, places][..., None])[..., 0]
    return np.ascontiguousarray(fitted.T)
