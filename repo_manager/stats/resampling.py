"""Intervals by resampling: of one series by moving blocks, and of pairs of blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from repo_manager.stats.intervals import Interval

__all__ = ["ComparedNumber", "block_weights", "bootstrap_bounds", "compared_numbers", "ratio_interval", "verdict_of"]


# Moving-block bootstrap (Künsch 1989): resamples runs of neighbours, because neighbours are not independent.

_BISECTIONS = 60
_RESAMPLES = 300
_BLOCKS = 100

Floats = npt.NDArray[np.floating[Any]]


def block_weights(slices: int, resamples: int, seed: int) -> npt.NDArray[np.float64]:
    """Return how often each slice is drawn in each resample, `[resamples, slices]`. Rows sum to `slices`.

    Args:
        slices: number of slices to draw from.
        resamples: number of resamples to draw.
        seed: seed of the random numbers. Equal seeds give equal results.
    """
    length = max(round(slices ** (1 / 3)), 1)
    blocks = -(-slices // length)
    starts = np.random.default_rng(seed).integers(0, slices, size=(resamples, blocks))
    # Circular blocks: every slice is drawn with the same probability.
    drawn = (starts[:, :, None] + np.arange(length)).reshape(resamples, -1)[:, :slices] % slices
    weights = np.zeros((resamples, slices))
    np.add.at(weights, (np.arange(resamples)[:, None], drawn), 1)
    return weights


def bootstrap_bounds(columns: Floats, of: Callable[[Floats], float], alpha: float, *, seed: int = 0) -> Interval:
    """Return a bootstrap interval over blocks of rows consecutive in time.

    Args:
        columns: one row an observation, in order of time, `[rows, columns]`.
        of: the number asked for, of resampled rows.
        alpha: the probability the interval misses. At least `2 / 300` in effect, as there are 300 resamples.
        seed: seed of the random numbers. Equal seeds give equal results.
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
    # 300 resamples are too few far in the tails: use the normal approximation of their spread.
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


# Compare pairs of blocks: each number's ratio B/A with its interval, and the verdict in words.

_ALPHA = 0.02
Numbers = Mapping[str, float]
_PAIR_RESAMPLES = 4000
_MIN_BOOTSTRAP_PAIRS = 20
_STUDENT_DRAWS = 200_000

Doubles = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class ComparedNumber:
    """One number of A and B.

    Attributes:
        name: title of the metric: `throughput`, `p99 latency`, ...
        a: over all blocks of A (nanoseconds for latencies).
        b: over all blocks of B.
        ratio: B by A, the geometric mean over pairs.
        interval: of the ratio, simultaneous over all compared numbers.
        shown: whether it leaves 1 out.
        better: `A` or `B`. `None` when no difference is shown.
    """

    name: str
    a: float
    b: float
    ratio: float
    interval: Interval
    shown: bool
    better: str | None


def compared_numbers(
    of_a: Sequence[Numbers],
    of_b: Sequence[Numbers],
    wholes: tuple[Numbers, Numbers],
    *,
    lower_is_better: Mapping[str, bool],
    seed: int = 0,
) -> tuple[tuple[ComparedNumber, ...], dict[str, tuple[float, ...]]]:
    """Compare paired measurements.

    The intervals are simultaneous over the numbers compared: with no difference, at most 2 % of all comparisons show
    any (Bonferroni). The pairs' ratios may be treated as independent, because the order within each pair is
    randomised. With no real difference, the sign of each log ratio is then a fair coin, even if noise carries over
    between pairs.

    Args:
        of_a: for each pair, name -> A's number. Above 0.
        of_b: B's numbers of the same pairs, in the same order. Above 0.
        wholes: the numbers of A and of B over all pairs, for display.
        lower_is_better: the names to compare, in order of display, and whether less is better.
        seed: seed of the random numbers. Equal seeds give equal results.

    Returns:
        The compared numbers, and each one's ratios B/A in order of time.
    """
    names = [name for name in lower_is_better if all(name in numbers for numbers in (*of_a, *of_b))]
    compared, ratios = [], {}
    for name in names:
        logs = np.log([numbers[name] for numbers in of_b]) - np.log([numbers[name] for numbers in of_a])
        ratios[name] = tuple(np.exp(logs).tolist())
        interval = ratio_interval(logs, alpha=_ALPHA / len(names), seed=seed)
        shown = interval.low > 1 or interval.high < 1
        larger = float(np.mean(logs)) > 0
        better = ("B" if larger != lower_is_better[name] else "A") if shown else None
        ratio = float(np.exp(np.mean(logs)))
        compared.append(ComparedNumber(name, wholes[0][name], wholes[1][name], ratio, interval, shown, better))
    return tuple(compared), ratios


def verdict_of(numbers: Sequence[ComparedNumber]) -> str:
    """Return one sentence: the difference and its size, or the absence of one."""
    shown = [number for number in numbers if number.shown]
    if not shown:
        reach = max(max(number.interval.high, 1 / number.interval.low) - 1 for number in numbers[:1])
        name = numbers[0].name
        return f"no difference shown; in {name} only one of about {reach:.1%} or more would show above the noise"
    parts = [
        f"{number.name} of B is {number.ratio:.3f} of A's [{number.interval.low:.3f}, {number.interval.high:.3f}]"
        for number in shown
    ]
    return "; ".join(parts)


def ratio_interval(logs: Doubles, *, alpha: float, seed: int = 0) -> Interval:
    """Return an interval of the ratio by a studentised bootstrap of the mean log ratio.

    Below 20 pairs there is too little to resample, so it is Student's interval. The random order within pairs makes it
    fair: under no difference, a log ratio is as likely negative as positive.

    Args:
        logs: log ratio of each pair, float64 `[pairs]`.
        alpha: the share of such intervals without the true value.
        seed: seed of the random numbers. Equal seeds give equal results.
    """
    count = logs.size
    mean, error = float(np.mean(logs)), float(np.std(logs, ddof=1) / np.sqrt(count))
    if error == 0:
        return Interval(float(np.exp(mean)), float(np.exp(mean)))
    if count < _MIN_BOOTSTRAP_PAIRS:
        students = np.random.default_rng(seed).standard_t(count - 1, _STUDENT_DRAWS)
        reach = float(np.quantile(np.abs(students), 1 - alpha)) * error
        return Interval(float(np.exp(mean - reach)), float(np.exp(mean + reach)))
    drawn = logs[np.random.default_rng(seed).integers(0, count, size=(_PAIR_RESAMPLES, count))]
    errors = np.std(drawn, axis=1, ddof=1) / np.sqrt(count)
    kept = errors > 0
    students = (np.mean(drawn, axis=1)[kept] - mean) / errors[kept]
    low, high = np.quantile(students, (alpha / 2, 1 - alpha / 2))
    return Interval(float(np.exp(mean - high * error)), float(np.exp(mean - low * error)))
