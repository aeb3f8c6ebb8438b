"""Prune one matrix to 2:4 with the least change of its products: second-order, with every other weight adjusted.

The problem, for each output row w of a layer: find two values in each group of four to minimise

    sum over samples (z - w x)^2 + damping |w - w0|^2

where x is the layer's input, z the dense model's answer there, and w0 the dense row. With A = X X' + damping and c = z
X' + damping w0 this is the quadratic w A w' - 2 c w'. Three steps:

1. *Start*: optimal brain surgeon for groups (Frantar and Alistarh, OBC, 2022; SparseGPT, 2023). From the unconstrained
   optimum, group after group loses the cheapest pair, and all columns to the right adjust. The cost of each of the six
   pairs is exact, not the sum of two single ones.
2. *Sweeps*: block coordinate descent. Each group in turn takes the best two of its four values given all others: the
   error can only fall, and a group may change its mind.
3. *Fit*: conjugate gradients on the values left, with the mask fixed.

Rows are independent: they are solved in chunks of a fixed size, so results do not depend on the number of threads.
"""

from __future__ import annotations

import itertools
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from repo_manager.pruning.quadratic import BLOCK, DOUBLE_UP_TO, PAIRS, Array, LayerProblem, System, dot, errors_of, fit
from repo_manager.sparsity.pattern import GROUP, two_four_mask

__all__ = ["Solution", "best_damping", "judged_rows", "reconstruction_error", "solve"]


_LEAST_ROWS, _MOST_ROWS, _CHUNKS = 128, 512, 4  # rows of a chunk, and chunks of a medium layer
_MAX_SWEEPS = 8
_WORTH = 0.05  # stop when a sweep reduces the error by less than this share
_NEAR_NOTHING = 1e-3  # share of the energy: smaller squared errors need float64
_ALL_TRIED_UP_TO = 16  # columns: 6^4 masks
_ANY_ORDER_UP_TO = 128
_RETRIED_UP_TO = 64
_RETRIES = 16  # at 64 columns; smaller layers get more, because all later layers inherit the first layers' errors
_SEED = 20180
_DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_JUDGED_ROWS = 32


@dataclass(frozen=True)
class Solution:
    """A pruned matrix.

    Attributes:
        weights: `[N, K]` float32. At most two values in each group of four are not zero.
        error: of the layer's answers against the dense model's, relative (Euclidean), on the data of `moments`.
        magnitude_error: the same for the largest two of each four, unchanged: one-shot magnitude pruning.
    """

    weights: Array
    error: float
    magnitude_error: float


def judged_rows(count: int) -> Array:
    """Return the rows a layer's damping is chosen by.

    Args:
        count: how many outputs the layer has.
    """
    return np.asarray(np.unique(np.linspace(0, count - 1, _JUDGED_ROWS).astype(int)))


def best_damping(given: LayerProblem, judge: LayerProblem) -> float:
    """Return the damping for which values fitted to one part of the data do best on another.

    Few columns, or many similar ones, fix fewer weights than there are: only a pull to the dense ones helps then. The
    masks are by magnitude here: the damping is for the values. The search goes downhill from 0.1.

    Args:
        given: the problem to fit. Some rows will do, see `judged_rows`.
        judge: the same rows on the other part.
    """
    real = np.float64 if given.dense.shape[1] <= DOUBLE_UP_TO else np.float32
    start = np.where(two_four_mask(given.dense, 1), given.dense, 0).T.astype(real)
    matrix = given.moments.astype(real)
    diagonal, errors = np.diag_indices(len(matrix)), dict[int, float]()

    def error(place: int) -> float:
        if not 0 <= place < len(_DAMPINGS):
            return np.inf
        if place not in errors:
            damping = given.damping(_DAMPINGS[place])
            matrix[diagonal] = given.moments.diagonal() + damping
            wanted = (given.target + damping * given.dense).T.astype(real)
            errors[place] = reconstruction_error(judge, fit(matrix, start, wanted).T)
        return errors[place]

    place = _DAMPINGS.index(0.1)
    while (better := min(place - 1, place + 1, key=error)) in range(len(_DAMPINGS)) and error(better) < error(place):
        place = better
    return _DAMPINGS[place]


def solve(problem: LayerProblem, pool: Executor, damping: float = 0.01) -> Solution:
    """Solve one layer. Call it with BLAS at one thread: `pool` is where the work is shared out.

    Args:
        problem: finite numbers, K divides by 4.
        pool: runs the chunks of rows.
        damping: share of the mean of the diagonal of `moments`.
    """
    rows, columns = problem.dense.shape
    real = np.float64 if columns <= DOUBLE_UP_TO else np.float32
    added = problem.damping(damping)
    damped = problem.moments + np.diag(added)
    system = System.of(damped, real)
    count = min(max(_LEAST_ROWS, rows // _CHUNKS), _MOST_ROWS)

    def one(start: int) -> Array:
        part = slice(start, start + count)
        wanted = problem.target[part] + added * problem.dense[part]
        return _solve_rows(system, np.ascontiguousarray(wanted.T, real)).T

    parts = list(pool.map(one, range(0, rows, count)))
    weights = np.concatenate(parts).astype(np.float32) + np.float32(0)  # removes negative zeros
    by_magnitude = np.where(two_four_mask(problem.dense, 1), problem.dense, 0)
    return Solution(weights, reconstruction_error(problem, weights), reconstruction_error(problem, by_magnitude))


def reconstruction_error(problem: LayerProblem, weights: Array) -> float:
    """Return the relative error of a layer's answers with other weights."""
    energy = float(problem.energy.sum())
    if energy <= 0:
        return 0.0
    exact = weights.shape[1] <= DOUBLE_UP_TO
    square = _square_error(problem, weights, problem.moments if exact else problem.moments.astype(np.float32))
    if not exact and square < _NEAR_NOTHING * energy:  # a small difference of large sums
        square = _square_error(problem, weights, problem.moments)
    return float(np.sqrt(max(0.0, square) / energy))


def _square_error(problem: LayerProblem, weights: Array, moments: Array) -> float:
    square = float(problem.energy.sum())
    for start in range(0, len(weights), _LEAST_ROWS):
        part = weights[start : start + _LEAST_ROWS].astype(moments.dtype)
        products = (part @ moments).astype(np.float64)
        products -= 2 * problem.target[start : start + _LEAST_ROWS]
        square += float(np.einsum("ij,ij->", products, part))
    return square


def _solve_rows(system: System, wanted: Array) -> Array:
    """Return the weights of some rows. All arrays are transposed, `[K, N]`, so a group is contiguous."""
    if len(wanted) <= _ALL_TRIED_UP_TO:
        return _best_of_all(system.matrix, wanted)
    best = system.factor.T @ (system.factor @ wanted)
    floor = -np.einsum("ij,ij->j", wanted, best)
    exact = _surgeon_in_any_order(system, best.copy()) if len(wanted) <= _ANY_ORDER_UP_TO else None
    weights = _descend(system, _surgeon(system, best), wanted, floor)
    if exact is None:
        return weights
    errors, random = errors_of(system, weights, wanted), np.random.default_rng(_SEED)
    for number in range(1 + _RETRIES * _RETRIED_UP_TO**2 // len(weights) ** 2):
        start = _shaken(weights, random) if number else fit(system.matrix, exact, wanted)
        candidate = _descend(system, start, wanted, floor)
        found = errors_of(system, candidate, wanted)
        better = found < errors
        weights, errors = np.where(better, candidate, weights), np.where(better, found, errors)
    return weights


def _best_of_all(matrix: Array, wanted: Array) -> Array:
    """Try every mask."""
    columns, rows = wanted.shape
    starts = range(0, columns, GROUP)
    lowest, weights = np.full(rows, np.inf), np.zeros_like(wanted)
    for pairs in itertools.product(PAIRS, repeat=len(starts)):
        kept = np.concatenate([start + pair for start, pair in zip(starts, pairs, strict=True)])
        values = np.linalg.solve(matrix[np.ix_(kept, kept)], wanted[kept])
        error = -np.einsum("ij,ij->j", values, wanted[kept])
        better = np.flatnonzero(error < lowest)
        lowest[better] = error[better]
        weights[:, better] = 0
        weights[np.ix_(kept, better)] = values[:, better]
    return weights


def _descend(system: System, weights: Array, wanted: Array, floor: Array) -> Array:
    """Sweep until a sweep gains little, then fit."""
    gradient: Array = system.matrix @ weights - wanted
    least = float(floor.sum(dtype=np.float64))
    error = dot(weights, gradient - wanted) - least
    for _ in range(_MAX_SWEEPS):
        _sweep(system, weights, gradient)
        before, error = error, dot(weights, gradient - wanted) - least
        if before - error <= _WORTH * before:
            break
    return fit(system.matrix, weights, wanted)


def _shaken(weights: Array, random: np.random.Generator) -> Array:
    """Return weights with two random places filled in some groups, other ones in each row."""
    columns, rows = weights.shape
    groups = columns // GROUP
    shaken = np.repeat(random.random((groups, rows)) < max(0.15, 1.5 / groups), GROUP, axis=0)
    places = random.random((groups, GROUP, rows)).argsort(axis=1).reshape(columns, rows) < 2
    size = np.sqrt((weights * weights).mean(axis=0))
    other = places * random.standard_normal((columns, rows)).astype(weights.dtype) * size
    return np.where(shaken, other, weights)


def _surgeon(system: System, weights: Array) -> Array:
    """Prune group after group. The columns behind a group make up for it. Changes `weights`."""
    factor, columns = system.factor, len(weights)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = np.empty((stop - start, weights.shape[1]), weights.dtype)
        for place in range(start, stop, GROUP):
            group = slice(place, place + GROUP)
            multipliers = system.removal.pick(place // GROUP, weights[group], cheapest=True)
            error = factor[group, group] @ multipliers
            weights[place:stop] -= factor[group, place:stop].T @ error
            errors[place - start : place - start + GROUP] = error
        weights[stop:] -= factor[start:stop, stop:].T @ errors
    weights *= two_four_mask(weights, 0)
    return weights


def _surgeon_in_any_order(system: System, weights: Array) -> Array:
    """Remove, from each row, one value after the other: the cheapest of all groups with more than two."""
    columns, rows = weights.shape
    inverse = np.repeat((system.factor.T @ system.factor)[None], rows, axis=0)
    values, here = np.ascontiguousarray(weights.T), np.arange(rows)
    alive, left = np.ones((rows, columns), bool), np.full((rows, columns // GROUP), GROUP // 2)
    for _ in range(columns // 2):
        diagonal = inverse[:, np.arange(columns), np.arange(columns)]
        costs = np.where(alive, values**2, np.inf) / np.where(alive, diagonal, 1)
        costs[np.repeat(left == 0, GROUP, axis=1)] = np.inf
        place = costs.argmin(axis=1)
        column = inverse[here, :, place]
        column /= np.sqrt(diagonal[here, place])[:, None]
        values -= column * (values[here, place] / column[here, place])[:, None]
        inverse -= column[:, :, None] * column[:, None, :]
        alive[here, place] = False
        left[here, place // GROUP] -= 1
        values *= alive
    return np.ascontiguousarray(values.T)


def _sweep(system: System, weights: Array, gradient: Array) -> None:
    """Let each group in turn take its best two values, all others fixed. Changes both arrays.

    Args:
        system: A of the layer, and the costs of each pair (`System.fill`).
        weights: `[K, N]`, one column per output. Changed in place.
        gradient: A w - c, `[K, N]`. Kept in step with `weights`, in place.
    """
    matrix, columns = system.matrix, len(weights)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        changes = np.empty((stop - start, weights.shape[1]), weights.dtype)
        for place in range(start, stop, GROUP):
            group = slice(place, place + GROUP)
            old, block = weights[group].copy(), matrix[group, group]
            without = gradient[group] - block @ old
            answer = system.fill.pick(place // GROUP, without, cheapest=False)
            change = -answer - old
            weights[group] = -answer
            gradient[start:stop] += matrix[start:stop, group] @ change
            changes[place - start : place - start + GROUP] = change
        gradient[:start] += matrix[:start, start:stop] @ changes
        gradient[stop:] += matrix[stop:, start:stop] @ changes
