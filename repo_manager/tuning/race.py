"""A race: the best settings of the search take turns under load, two at a time.

The search asks each setting for a few seconds only. On a busy machine such an answer is off by 10 % or more, so the
search ends at a good and lucky setting, and others as good look worse. In a race two settings are served side by
side, and run short blocks of load in turn. Whatever slows the machine slows both.

For the largest rate each one climbs its own staircase (Dixon and Mood, 1948): the next block of a setting has more load
if the last one held the limits, and less if not. The distance of its latency from the limit tells the rate that the
block would just have held. Other objectives have a fixed rate, where the number itself is read. The readings of two
blocks in turn are compared.

Each comparison says how much better one of two is. All of them and the values of the search give the likeliest place
of every setting and its error, by least squares. The next two in turn are the leader and the one with the largest
possible lead (LUCB of Kalyanakrishnan et al., 2012), until no other one may be better by 3 %.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from repo_manager.gates import Gate
from repo_manager.loadtest.metrics import metric_of
from repo_manager.loadtest.result import LoadPoint
from repo_manager.stats.quantiles import PERCENTILES
from repo_manager.tuning.search import MeasuredSetting, score_of

__all__ = [
    "ROUNDS",
    "Bout",
    "Finalist",
    "RaceBlock",
    "Side",
    "Standings",
    "bout",
    "judged",
    "side_of",
]

ROUNDS = (2, 6)  # of a bout: those to count, and the most with those on the way to the rate sought
_FIRST_STEP, _STEP = 0.1, 0.05
_REACH = 0.25  # of a reading: a stall of the machine tells no more
_CLEAR = 2.0  # standard errors
_INDIFFERENT = 0.03  # the wrong one of two so near to each other is no loss
_SEEN, _LOST = 0.12, 0.25  # standard errors of the logarithm of a value in the search, and of the guess for a loser
_VARIETY, _ANYWHERE = 0.35, 3.0  # standard deviations of the logarithms of all settings, and of their mean
_SPREAD, _SPREAD_PAIRS = 0.1, 4  # usual standard deviation between the two of a pair, and as how many pairs it counts
_TELLING = 0.03  # share of a block: the queue of an overloaded block passes a shorter limit at once
_Array = np.ndarray[Any, np.dtype[np.float64]]
_SHARES = {**{row.key: row.share for row in PERCENTILES}, "mean": 0.5, "max": 1.0}  # of a block's time, see `judged`


@dataclasses.dataclass(frozen=True)
class RaceBlock:
    """One block of load on one side of a race.

    Attributes:
        is_held: every number of the block is within the gates, and the server kept up.
        number: the p99 in nanoseconds, or the joules an inference, if these are sought. `None`: it is not known.
        rows: the load level of each model asked, as `MeasuredSetting.levels`.
        shift: logarithm of the rate at which this block would just have held, divided by its own rate. `None`: its
            latency does not tell.
    """

    is_held: bool
    number: float | None
    rows: tuple[Mapping[str, Any], ...]
    shift: float | None = None


@dataclasses.dataclass(frozen=True)
class Finalist:
    """One setting of a race.

    Attributes:
        label: of the setting.
        ratio: how many times as good as the winner it is: its rate divided by the winner's, or the winner's p99 or
            energy divided by its own. 1 for the winner.
        low: lower end of the 95 % interval of `ratio`.
        high: upper end of it.
        rounds: its blocks of load.
    """

    label: str
    ratio: float
    low: float
    high: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Bout:
    """Two settings in turn under load.

    Attributes:
        gains: of each round that counts the logarithm of how many times better the second one was.
        rounds: blocks of each.
    """

    gains: tuple[float, ...]
    rounds: int

    @property
    def ratio(self) -> float:
        """How many times as good the second one is."""
        return math.exp(statistics.mean(self.gains))

    @property
    def error(self) -> float:
        """Standard error of the logarithm of `ratio`. Infinite with a single round."""
        return statistics.stdev(self.gains) / math.sqrt(len(self.gains)) if len(self.gains) > 1 else math.inf


def judged(points: Mapping[str, LoadPoint], gates_of: Callable[[str], Sequence[Gate]]) -> tuple[bool, float | None]:
    """Return whether a block's numbers are within the gates, and its `RaceBlock.shift`.

    Requests come evenly for `T` seconds, at `L` times the rate of the answers. One sent at `t` is `t * (L - 1)` late.
    So the quantile `q` of the latency grows by `q * T * (L - 1)`, and the mean by half of `T * (L - 1)`. The distance
    from the limit tells by how much `L` is too large or too small.

    Args:
        points: each model under load, with its level.
        gates_of: returns the gates of a model.
    """
    held, shifts = True, []
    for model, point in points.items():
        held = held and point.outcome not in ("failed", "overloaded")
        for gate in gates_of(model):
            metric = metric_of(gate.metric)
            value, share = metric.get(point), _SHARES.get(metric.key)
            held = held and value is not None and (value < gate.limit) == gate.below
            if share is not None and gate.below:
                grown_ns = share * point.duration_s * 1e9
                tells = value is not None and gate.limit > _TELLING * grown_ns
                shifts.append(math.log((grown_ns + gate.limit) / (grown_ns + value)) if tells and value else None)
    known = [each for each in shifts if each is not None]
    if not known or len(known) < len(shifts):
        return held, None
    return held, min(known) if held else min(*known, 0.0)


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


def bout(
    sides: tuple[Side, Side],
    run: Callable[[int, float], RaceBlock],
    *,
    has_time: Callable[[float], bool] = lambda _: True,
    rounds: tuple[int, int] = ROUNDS,
) -> Bout:
    """Let two settings take turns.

    Args:
        sides: the two, with their earlier blocks.
        run: runs a block: of the first one (0) or the second (1), at a rate in requests a second.
        has_time: whether there is time for one more round, by its rate.
        rounds: how many have to count, and the largest number of them.
    """
    before = [side.rounds for side in sides]
    gains: list[float] = []
    done = 0
    while done < rounds[1] and has_time(max(side.level for side in sides)):
        for each in (0, 1) if done % 2 == 0 else (1, 0):
            sides[each].add(run(each, sides[each].level))
        done += 1
        read = [
            [reading if at >= side.first else None for at, reading in enumerate(side.readings)][start:]
            for side, start in zip(sides, before, strict=True)
        ]
        gains = [two - one for one, two in zip(*read, strict=True) if one is not None and two is not None]
        if len(gains) >= rounds[0] and all(side.is_near for side in sides):
            break
    return Bout(tuple(gains), done)


def side_of(level: float, *, is_rate_sought: bool) -> Side:
    """Return a setting's side, whose first block has a level, in requests a second."""
    return _Staircase(level) if is_rate_sought else _Fixed(level)


class Side(ABC):
    """One setting in a race.

    Args:
        level: rate of its first block, in requests a second.

    Attributes:
        level: rate of its next block.
        rows: the load levels of its blocks.
        readings: of each block the logarithm of what is compared, more is better. `None`: it does not tell.
    """

    def __init__(self, level: float) -> None:
        self.level = level
        self.rows: list[Mapping[str, Any]] = []
        self.readings: list[float | None] = []
        self._blocks: list[RaceBlock] = []

    @property
    def rounds(self) -> int:
        """Number of its blocks."""
        return len(self._blocks)

    def add(self, block: RaceBlock) -> None:
        """Take in a block at `level`."""
        self.rows += block.rows
        self._blocks.append(block)
        self.readings.append(self._reading(block))

    @property
    def is_out(self) -> bool:
        """Whether most of its blocks are outside the gates, where that does not decide its rate."""
        return False

    @property
    def is_near(self) -> bool:
        """Whether its level is near the rate sought."""
        return True

    @property
    def first(self) -> int:
        """The first block that counts."""
        return 0

    @abstractmethod
    def _reading(self, block: RaceBlock) -> float | None:
        """Return the logarithm of what is compared of a block."""

    @abstractmethod
    def level_held(self) -> float:
        """Return the rate that half of its blocks hold, or the fixed one, in requests a second."""


class _Staircase(Side):
    """Seeks the rate that half of its blocks hold."""

    def add(self, block: RaceBlock) -> None:
        super().add(block)
        step = _STEP if self.is_near else _FIRST_STEP
        self.level = float(f"{self.level * (1 + step if block.is_held else 1 / (1 + step)):.4g}")

    @property
    def is_near(self) -> bool:
        return len({each.is_held for each in self._blocks}) == 2

    def _reading(self, block: RaceBlock) -> float | None:
        # Without a limited latency a block is half a step from the rate sought on average.
        half = math.log1p(_STEP) / 2
        shift = block.shift if block.shift is not None else half if block.is_held else -half
        return math.log(self.level) + min(max(shift, -_REACH), _REACH)

    @property
    def first(self) -> int:
        """The last block on the way from the first level to the rate sought: those before tell the direction only."""
        turn = next((at for at, each in enumerate(self._blocks) if each.is_held != self._blocks[0].is_held), None)
        return max(self.rounds - 2, 0) if turn is None else turn - 1

    def level_held(self) -> float:
        known = [each for each in self.readings[self.first :] if each is not None]
        return float(f"{math.exp(statistics.mean(known)):.4g}")


class _Fixed(Side):
    """Has one rate, at which a number is compared. Less of it is better."""

    @property
    def is_out(self) -> bool:
        return statistics.mean(block.is_held for block in self._blocks) < 0.5

    def _reading(self, block: RaceBlock) -> float | None:
        return -math.log(block.number) if block.number else None

    def level_held(self) -> float:
        return self.level
