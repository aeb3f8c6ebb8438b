"""Intervals for repeated looks while the data come in, without deciding wrongly more often.

A share (of errors, of slow requests, of equal answers) gets the beta-binomial confidence sequence. A share p leaves
the interval when the mixture of all shares explains the data 1/alpha times better than p. By Ville's inequality this
happens to the true share with probability alpha at most, whenever one stops (Robbins 1970; Howard, Ramdas, McAuliffe
and Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences", Annals of Statistics 2021).

Means and ratios get a moving-block bootstrap (`resampling.py`) whose look number k spends 6 / (pi k)^2 of alpha: the
sum over all looks is alpha (a union bound).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

__all__ = ["Z_95", "Interval", "share_bounds", "spent", "wilson_interval"]

_BISECTIONS = 60
Z_95 = 1.96
"""How many standard errors from the mean the ends of a 95 % interval of a normal distribution are."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """An interval, both ends included. Of 95 % unless its maker says otherwise."""

    low: float
    high: float


def share_bounds(hits: int, total: int, alpha: float) -> Interval:
    """Return the confidence sequence's interval of a share, with Jeffreys' mixture Beta(1/2, 1/2).

    Args:
        hits: observations with the event so far, 0 to `total`.
        total: all observations so far. 0 returns the interval from 0 to 1.
        alpha: the probability of ever leaving the true share out.
    """
    if total == 0:
        return Interval(0.0, 1.0)
    mixture = _log_beta(hits + 0.5, total - hits + 0.5) - _log_beta(0.5, 0.5)
    floor = mixture + math.log(alpha)

    def is_left_out(share: float) -> bool:
        return hits * math.log(share) + (total - hits) * math.log1p(-share) < floor

    seen = hits / total
    low = 0.0 if hits == 0 else _edge(1e-15, seen, is_left_out)
    high = 1.0 if hits == total else _edge(1 - 1e-15, seen, is_left_out)
    return Interval(low, high)


def _edge(outside: float, inside: float, is_left_out: Callable[[float], bool]) -> float:
    """Return the end of the interval between a share far out and the observed share."""
    inside = min(max(inside, 1e-15), 1 - 1e-15)
    for _ in range(_BISECTIONS):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if is_left_out(middle) else (outside, middle)
    return outside


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def spent(alpha: float, look: int) -> float:
    """Return the part of alpha look number `look` (from 1) may spend."""
    return alpha * 6.0 / (math.pi * look) ** 2


def wilson_interval(hits: int, total: int) -> Interval | None:
    """Return Wilson's 95 % interval of a share (Wilson 1927). Without a hit, the upper end is about 3.8 / total."""
    if not total:
        return None
    share, square = hits / total, Z_95 * Z_95
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = Z_95 / (1 + square / total) * (share * (1 - share) / total + square / (4 * total * total)) ** 0.5
    return Interval(max(centre - half, 0.0) if hits else 0.0, min(centre + half, 1.0))
