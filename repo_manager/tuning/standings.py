"""What is known of the settings of a race: each one's place, with its error.

Each comparison of a race says how much better one of two settings is. All of them and the values of the search give the
likeliest place of every setting and its error, by least squares. The next two in turn are the leader and the one with
the largest possible lead (LUCB of Kalyanakrishnan et al., 2012), until no other one may be better by 3 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from repo_manager.tuning.search import MeasuredSetting, score_of

__all__ = ["Standings"]

_CLEAR = 2.0  # standard errors
_INDIFFERENT = 0.03  # the wrong one of two so near to each other is no loss
_SEEN, _LOST = 0.12, 0.25  # standard errors of the logarithm of a value in the search, and of the guess for a loser
_VARIETY, _ANYWHERE = 0.35, 3.0  # standard deviations of the logarithms of all settings, and of their mean
_SPREAD, _SPREAD_PAIRS = 0.07, 4  # usual standard deviation between the two of a pair, and as how many pairs it counts
_Array = np.ndarray[Any, np.dtype[np.float64]]


def _likeness(one: MeasuredSetting, other: MeasuredSetting) -> float:
    """Return the expected correlation of two settings: 1 for the same, less with each axis that differs."""
    distance = 0.0
    for name, mine in one.state.items():
        theirs = other.state[name]
        distance += 0.5 * abs(math.log2(mine.instances / theirs.instances))
        distance += 0.25 * abs(math.log2(max(mine.max_batch_size, 1) / max(theirs.max_batch_size, 1)))
        distance += 1.0 if (mine.queue_delay is None) != (theirs.queue_delay is None) else 0.0
        distance += 0.2 * ((mine.queue_delay or 0) != (theirs.queue_delay or 0))
        distance += 0.5 * (mine.threads != theirs.threads) + 0.2 * (mine.preferred != theirs.preferred)
    return math.exp(-distance)


class Standings:
    """What is known of the settings of a race: each one's place, with its error.

    The places are the least squares of the scores in the search and of every round of two in turn. Settings with nearly
    the same values have nearly the same places: a Gaussian process, as in Bayesian optimization. So where one proves
    much better than the search saw it, those like it are expected to be better, too.

    Args:
        settings: the settings, each with a score, see `score_of`.
        seeks: `throughput`, `latency` or `energy`.

    Attributes:
        scores: of the settings in the search.
    """

    def __init__(self, settings: Sequence[MeasuredSetting], seeks: str) -> None:
        scores = [score_of(each, seeks) for each in settings]
        assert None not in scores
        self.scores = [each for each in scores if each is not None]
        self._seen = np.log(np.array(self.scores))
        self._certainty = np.array([(_SEEN if each.value is not None else _LOST) ** -2.0 for each in settings])
        alike = np.array([[_likeness(one, other) for other in settings] for one in settings])
        self._expected = np.linalg.inv(_VARIETY**2 * alike + _ANYWHERE**2 + 1e-6 * np.eye(len(settings)))
        self._gains: dict[tuple[int, int], list[float]] = {}
        self.out: set[int] = set()

    def add(self, own: int, other: int, gains: Sequence[float]) -> None:
        """Take in rounds of two settings.

        Args:
            own: index of the first one.
            other: index of the second one.
            gains: of each round the logarithm of how many times better the second one was.
        """
        self._gains.setdefault((own, other), []).extend(gains)

    @property
    def compared(self) -> set[int]:
        """Those with rounds that count."""
        return {at for pair in self._gains for at in pair}

    def _places(self) -> tuple[_Array, _Array]:
        """Return the place of each, and their covariance.

        With few rounds their own spread says little, so the usual one counts, too.
        """
        rounds = sum(len(gains) for gains in self._gains.values())
        squares = sum(statistics.pvariance(gains) * len(gains) for gains in self._gains.values())
        freedom = _SPREAD_PAIRS + rounds - len(self._gains)
        variance = (squares + _SPREAD_PAIRS * _SPREAD**2) / freedom
        weights = self._expected + np.diag(self._certainty)
        sums = self._seen * self._certainty
        for (own, other), gains in self._gains.items():
            side = np.zeros(len(self._seen))
            side[own], side[other] = -1.0, 1.0
            weights += np.outer(side, side) * len(gains) / variance
            sums += side * sum(gains) / variance
        covariance = np.linalg.inv(weights)
        return covariance @ sums, covariance

    def against(self, own: int) -> tuple[_Array, _Array]:
        """Return how much better than one of them each is, as a logarithm, and its standard error."""
        places, covariance = self._places()
        spread = covariance.diagonal() + covariance[own, own] - 2 * covariance[own]
        return places - places[own], np.sqrt(np.maximum(spread, 0.0))

    def place(self, own: int) -> float:
        """Return the logarithm of how good one is."""
        return float(self._places()[0][own])

    @property
    def leader(self) -> int:
        """The likeliest best one."""
        places, _ = self._places()
        return max(set(range(len(places))) - self.out, key=lambda each: float(places[each]))

    @property
    def challenger(self) -> int | None:
        """The one that may be better than the leader by most. `None`: no one may be so by 3 %."""
        leader = self.leader
        gains, errors = self.against(leader)
        may_be = {each: gains[each] + _CLEAR * errors[each] for each in range(len(gains)) if each not in self.out}
        del may_be[leader]
        found = max(may_be, key=lambda each: may_be[each], default=None)
        return None if found is None or may_be[found] < _INDIFFERENT else found
