"""A race: the settings that the search found best take turns under load, two at a time.

The search asks each setting for a few seconds only. On a busy machine such an answer is off by 10 % or more, so the
search ends at a good setting that was lucky, and others as good look worse. In a race the best one and a rival are
served side by side, and run short blocks of load in turn. Whatever slows the machine slows both.

For the largest rate each one climbs its own staircase (Dixon and Mood, 1948): the next block of a setting has more load
if the last one held the limits, and less if not. The rate that half of the blocks hold is the maximum of the likelihood
of a logistic curve over all blocks. Other objectives have a fixed rate, where the number itself is compared.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from repo_manager.tuning.search import MeasuredSetting

__all__ = ["FEWEST_ROUNDS", "MOST_RIVALS", "MOST_ROUNDS", "Duel", "RaceBlock", "duel", "rivals_of"]

MOST_RIVALS = 8
FEWEST_ROUNDS, MOST_ROUNDS = 5, 20
_NEAR = 0.85  # share of the best's value that makes another setting a rival
_FIRST_STEP, _STEP = 0.1, 0.05
_WIDTH = 0.05  # of the logistic curve: a load so much larger is held in 27 % of the blocks instead of 50 %
_REACH = 0.2  # beyond the smallest and the largest level: the rate is somewhere there if no block failed, or each did
_CLEAR = 2.0  # standard errors
_INDIFFERENT = 0.05  # the wrong one of two so near to each other is no loss
_EQUAL = 0.01
_OPEN = 1.05  # share of a load with an undecided answer, as a guess of the rate held


@dataclasses.dataclass(frozen=True)
class RaceBlock:
    """One block of load on one side of a race.

    Attributes:
        is_held: every number of the block is within the gates, and the server kept up.
        number: the p99 in nanoseconds, or the joules an inference, if these are sought. `None`: it is not known.
        rows: the load level of each model asked, as `MeasuredSetting.levels`.
    """

    is_held: bool
    number: float | None
    rows: tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Duel:
    """The best setting and a rival, in turn under load.

    Attributes:
        best: label of the best setting before it.
        rival: label of the other one.
        ratio: how many times better the rival is: its rate divided by the best one's, or the best one's p99 or energy
            divided by its own.
        error: standard error of the logarithm of `ratio`.
        rounds: blocks of each side.
        is_won: the rival takes the place of the best one.
        levels: the blocks of the best one, and those of the rival, in order of time.
        level: the rate that half of the winner's blocks hold, or the fixed rate, in requests a second.
    """

    best: str
    rival: str
    ratio: float
    error: float
    rounds: int
    is_won: bool
    levels: tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...]]
    level: float

    @property
    def text(self) -> str:
        """In words."""
        said = "takes its place" if self.is_won else "does not take its place"
        return f"{self.rival} is {self.ratio:.2f} times as good as {self.best} ({self.rounds} rounds) and {said}"


def rivals_of(best: MeasuredSetting, measured: Sequence[MeasuredSetting], seeks: str) -> list[MeasuredSetting]:
    """Return the few settings that may be better than the best one, the most promising first.

    Args:
        best: the best setting of the search. It holds a value.
        measured: every measurement of the search.
        seeks: `throughput`, `latency` or `energy`.
    """
    found: dict[str, tuple[float, MeasuredSetting]] = {}
    for each in measured:
        score = _score(each, seeks)
        if score is not None and each.state != best.state:
            known = found.get(each.label)
            found[each.label] = max(known, (score, each), key=lambda pair: pair[0]) if known else (score, each)
    own = _score(best, seeks)
    assert own is not None
    near = [pair for pair in found.values() if pair[0] >= own * _NEAR]
    near.sort(key=lambda pair: (-pair[0], _cost(pair[1])))
    return [each for _, each in near[:MOST_RIVALS]]


def _score(measured: MeasuredSetting, seeks: str) -> float | None:
    """Return how good a setting seems, more is better: also one that was only shown not to beat the best."""
    if seeks != "throughput":
        last = measured.levels[-1] if measured.levels else {}
        number: float | None = measured.value or last.get("p99_ns" if seeks == "latency" else "joules_per_inference")
        return 1 / number if number else None
    if measured.value is not None:
        return measured.value
    asked = [level for level in measured.levels if level.get("throughput_per_s")]
    if not asked:
        return None
    smallest = min(float(level["level"]) for level in asked)
    answered = {level.get("model"): float(level["throughput_per_s"]) for level in asked if level["level"] == smallest}
    return min(smallest, sum(answered.values())) * (_OPEN if measured.is_open else 1.0)


def _cost(measured: MeasuredSetting) -> tuple[int, ...]:
    """Return what the settings of all models take of the machine, see `Setting.cost`."""
    states = list(measured.state.values()) or [measured.setting]
    return tuple(sum(numbers) for numbers in zip(*(each.cost for each in states), strict=True))


def duel(
    best: MeasuredSetting,
    rival: MeasuredSetting,
    run: Callable[[int, float], RaceBlock],
    *,
    rate: float,
    is_rate_sought: bool,
    has_time: Callable[[float], bool] = lambda _: True,
    rounds: tuple[int, int] = (FEWEST_ROUNDS, MOST_ROUNDS),
    margin: float = 0.0,
) -> Duel | None:
    """Let two settings take turns until the one ahead is clearly no worse by 5 %, or for the largest number of rounds.

    What counts is to end with a setting that is nearly the best, not to know which of two equals is better. So they
    take turns for as long as the wrong choice may be a loss: the indifference zone of Bechhofer (1954).

    Args:
        best: the best setting so far.
        rival: the one that may take its place. One that takes less of the machine needs to be as good only.
        run: runs a block: of the best one (0) or the rival (1), at a rate in requests a second.
        rate: of the first block. The fixed one of all blocks if no rate is sought.
        is_rate_sought: whether the largest rate is sought.
        has_time: whether there is time for one more round, by its rate.
        rounds: smallest and largest number of them.
        margin: share by which the rival must be better, however little it takes of the machine.

    Returns:
        `None` when the time ended before the smallest number of rounds.
    """
    sides: list[_Side] = [(_Staircase if is_rate_sought else _Fixed)(rate) for _ in range(2)]
    gain = error = 0.0
    for number in range(rounds[1]):
        if not has_time(max(side.level for side in sides)):
            break
        for each in (0, 1) if number % 2 == 0 else (1, 0):
            sides[each].add(run(each, sides[each].level))
        (own, own_error), (other, other_error) = (side.goodness() for side in sides)
        gain, error = other - own, math.hypot(own_error, other_error)
        if number + 1 >= rounds[0] and abs(gain) + _INDIFFERENT > _CLEAR * error:
            break
    if sides[0].rounds < rounds[0]:
        return None
    costs = _cost(rival)[:2], _cost(best)[:2]  # instances and threads
    needed = 0.0 if costs[0] == costs[1] else _EQUAL if costs[0] > costs[1] else -_EQUAL
    is_won = not sides[1].is_out and (sides[0].is_out or gain > (math.log1p(margin) if margin else needed))
    return Duel(
        best=best.label,
        rival=rival.label,
        ratio=math.exp(gain),
        error=error,
        rounds=sides[0].rounds,
        is_won=is_won,
        levels=(tuple(sides[0].rows), tuple(sides[1].rows)),
        level=sides[is_won].level_held(),
    )


class _Side(ABC):
    """One side of a duel.

    Args:
        level: rate of its first block, in requests a second.
    """

    def __init__(self, level: float) -> None:
        self.level = level
        self.rows: list[Mapping[str, Any]] = []
        self._blocks: list[RaceBlock] = []

    @property
    def rounds(self) -> int:
        """Number of its blocks."""
        return len(self._blocks)

    def add(self, block: RaceBlock) -> None:
        """Take in a block at `level`."""
        self.rows += block.rows
        self._blocks.append(block)

    @property
    def is_out(self) -> bool:
        """Whether most of its blocks are outside the gates, where that does not decide its rate."""
        return False

    @abstractmethod
    def goodness(self) -> tuple[float, float]:
        """Return the logarithm of what is compared, more is better, and its standard error."""

    @abstractmethod
    def level_held(self) -> float:
        """Return the rate that half of its blocks hold, or the fixed one, in requests a second."""


class _Staircase(_Side):
    """Seeks the rate that half of its blocks hold."""

    def __init__(self, level: float) -> None:
        super().__init__(level)
        self._step = _FIRST_STEP
        self._levels: list[float] = []

    def add(self, block: RaceBlock) -> None:
        if self._blocks and self._blocks[-1].is_held != block.is_held:
            self._step = _STEP
        super().add(block)
        self._levels.append(math.log(self.level))
        self.level = float(f"{self.level * (1 + self._step if block.is_held else 1 / (1 + self._step)):.4g}")

    def goodness(self) -> tuple[float, float]:
        levels = np.array(self._levels)
        signs = np.array([1.0 if block.is_held else -1.0 for block in self._blocks])
        grid = np.linspace(levels.min() - _REACH, levels.max() + _REACH, 801)
        distance = (grid[:, None] - levels[None, :]) / _WIDTH
        at = int((-np.logaddexp(0.0, -signs * distance).sum(axis=1)).argmax())
        shares = 1 / (1 + np.exp(-distance[at]))
        return float(grid[at]), float(_WIDTH / math.sqrt(max((shares * (1 - shares)).sum(), 0.1)))

    def level_held(self) -> float:
        return float(f"{math.exp(self.goodness()[0]):.4g}")


class _Fixed(_Side):
    """Has one rate, at which a number is compared. Less of it is better."""

    @property
    def is_out(self) -> bool:
        return statistics.mean(block.is_held for block in self._blocks) < 0.5

    def goodness(self) -> tuple[float, float]:
        logs = [-math.log(block.number) for block in self._blocks if block.number]
        if len(logs) < 2:
            return 0.0, math.inf
        return statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs))

    def level_held(self) -> float:
        return self.level
