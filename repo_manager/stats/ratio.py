"""Intervals of a ratio from paired blocks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from repo_manager.stats.intervals import Interval

__all__ = ["ratio_interval"]

_RESAMPLES = 4000
_MIN_BOOTSTRAP_PAIRS = 20
_STUDENT_DRAWS = 200_000

Floats = npt.NDArray[np.float64]


def ratio_interval(logs: Floats, *, alpha: float, seed: int = 0) -> Interval:
    """Return an interval of the ratio by a studentised bootstrap of the mean log ratio.

    Below 20 pairs there is too little to resample: then it is Student's interval, which the random order within pairs
    makes a fair one (under no difference, a log ratio is as likely negative as positive).

    Args:
        logs: log ratio of each pair, float64 `[pairs]`.
        alpha: the share of such intervals that miss.
        seed: of the resampling.
    """
    count = logs.size
    mean, error = float(np.mean(logs)), float(np.std(logs, ddof=1) / np.sqrt(count))
    if error == 0:
        return Interval(float(np.exp(mean)), float(np.exp(mean)))
    if count < _MIN_BOOTSTRAP_PAIRS:
        students = np.random.default_rng(seed).standard_t(count - 1, _STUDENT_DRAWS)
        reach = float(np.quantile(np.abs(students), 1 - alpha)) * error
        return Interval(float(np.exp(mean - reach)), float(np.exp(mean + reach)))
    drawn = logs[np.random.default_rng(seed).integers(0, count, size=(_RESAMPLES, count))]
    errors = np.std(drawn, axis=1, ddof=1) / np.sqrt(count)
    kept = errors > 0
    students = (np.mean(drawn, axis=1)[kept] - mean) / errors[kept]
    low, high = np.quantile(students, (alpha / 2, 1 - alpha / 2))
    return Interval(float(np.exp(mean - high * error)), float(np.exp(mean - low * error)))
