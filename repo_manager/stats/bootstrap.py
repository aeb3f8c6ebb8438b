"""Moving-block bootstrap (Künsch 1989): resamples runs of neighbours, because they are not independent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from repo_manager.stats.intervals import Interval

__all__ = ["block_weights", "bootstrap_bounds"]

_BISECTIONS = 60
_RESAMPLES = 300
_BLOCKS = 100

Floats = npt.NDArray[np.floating[Any]]


def block_weights(slices: int, resamples: int, seed: int) -> npt.NDArray[np.float64]:
    """Return how often each slice is drawn in each resample, `[resamples, slices]`; rows sum to `slices`."""
    length = max(round(slices ** (1 / 3)), 1)
    blocks = -(-slices // length)
    starts = np.random.default_rng(seed).integers(0, slices, size=(resamples, blocks))
    # Circular blocks: every slice is drawn with the same probability.
    drawn = (starts[:, :, None] + np.arange(length)).reshape(resamples, -1)[:, :slices] % slices
    weights = np.zeros((resamples, slices))
    np.add.at(weights, (np.arange(resamples)[:, None], drawn), 1)
    return weights


def bootstrap_bounds(columns: Floats, of: Callable[[Floats], float], alpha: float, *, seed: int = 0) -> Interval:
    """Return a bootstrap interval over blocks of rows that follow one another in time.

    Args:
        columns: one row an observation, in order of time, `[rows, columns]`.
        of: the number that is asked for, of resampled rows.
        alpha: the probability that the interval misses; at least `2 / 300` in effect, as there are 300 resamples.
        seed: of the resampling.
    """
    rows = len(columns)
    length = max(rows // _BLOCKS, 1)
    starts = np.arange(0, rows - length + 1)
    blocks = -(-rows // length)
    random = np.random.default_rng(seed)
    values = np.empty(_RESAMPLES)
    for number in range(_RESAMPLES):
        chosen = random.choice(starts, blocks)
        picked = (chosen[:, None] + np.arange(length)).reshape(-1)[:rows]
        values[number] = of(columns[picked])
    centre, spread = float(np.mean(values)), float(np.std(values))
    # Far in the tails 300 resamples say nothing: there the normal approximation of their spread takes over.
    reach = spread * _normal_quantile(1 - alpha / 2)
    low, high = np.quantile(values, (alpha / 2, 1 - alpha / 2))
    return Interval(min(float(low), centre - reach), max(float(high), centre + reach))


def _normal_quantile(probability: float) -> float:
    low, high = 0.0, 40.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if 0.5 * math.erfc(-middle / math.sqrt(2)) < probability:
            low = middle
        else:
            high = middle
    return high
