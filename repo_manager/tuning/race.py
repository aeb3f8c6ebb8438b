"""A race: the best settings of the search take turns under load, two at a time.

The search asks each setting for a few seconds only. On a busy machine such an answer is off by 10 % or more, so the
search ends at a good and lucky setting, and others as good look worse. In a race two settings are served side by
side, and run short blocks of load in turn. Whatever slows the machine slows both.

For the largest rate both get the same load, more than either holds. The latency of an overloaded block tells the rate
that it would just have held. A block that holds tells only that it would hold more, so the load is raised. Different
loads compare badly: after one slow block a setting would have less load, hold it, and look worse for several rounds.
Where no latency tells, each one climbs its own staircase (Dixon and Mood, 1948): the next block of a setting has more
load if the last one held the limits, and less if not. Other objectives have a fixed rate, where the number itself is
read. The readings of two blocks in turn are compared. What all comparisons together show is in `standings.py`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from repo_manager.gates import Gate
from repo_manager.loadtest.metrics import metric_of
from repo_manager.loadtest.result import LoadPoint
from repo_manager.stats.quantiles import PERCENTILES

__all__ = [
    "OVERLOAD",
    "ROUNDS",
    "TELLING",
    "Bout",
    "Finalist",
    "RaceBlock",
    "Side",
    "bout",
    "judged",
    "side_of",
]

OVERLOAD = 1.15  # of a block whose latency shall tell
ROUNDS = (2, 6)  # of a bout: those to count, and the most with those on the way to the rate sought
_FIRST_STEP, _STEP = 0.1, 0.05
_MORE = 1.2  # the next step where the last block held
_REACH = 0.5  # of a reading: a stall of the machine tells no more
TELLING = 0.03  # share of a block: the queue of an overloaded block passes a shorter limit at once
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
                tells = value is not None and gate.limit > TELLING * grown_ns
                shifts.append(math.log((grown_ns + gate.limit) / (grown_ns + value)) if tells and value else None)
    known = [each for each in shifts if each is not None]
    if not known or len(known) < len(shifts):
        return held, None
    return held, min(known) if held else min(*known, 0.0)


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
        if all(side.tells for side in sides):
            sides[0].level = sides[1].level = max(side.level for side in sides)
        for each in (0, 1) if done % 2 == 0 else (1, 0):
            sides[each].add(run(each, sides[each].level))
        done += 1
        found = [_gain(sides, (before[0] + at, before[1] + at)) for at in range(done)]
        gains = [gain for gain in found if gain is not None]
        if len(gains) >= rounds[0] and all(side.is_near for side in sides):
            break
    return Bout(tuple(gains), done)


def _gain(sides: tuple[Side, Side], at: tuple[int, int]) -> float | None:
    """Return the logarithm of how many times better the second one was in a round. `None`: the round does not count.

    At the same load, two blocks that hold show no difference. After a stall, none of the two tells how fast it is.

    Args:
        sides: the two.
        at: number of each one's block.
    """
    if any(number < side.first for side, number in zip(sides, at, strict=True)):
        return None
    one, two = (side.blocks[number] for side, number in zip(sides, at, strict=True))
    is_same_load = sides[0].levels[at[0]] == sides[1].levels[at[1]]
    if is_same_load and one.shift is not None and two.shift is not None:
        are_held, are_stalled = one.is_held and two.is_held, max(one.shift, two.shift) < -_REACH
        if are_held or are_stalled:
            return None
    before, after = (side.readings[number] for side, number in zip(sides, at, strict=True))
    return None if before is None or after is None else after - before


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
        blocks: its blocks.
        levels: their rates.
    """

    def __init__(self, level: float) -> None:
        self.level = level
        self.rows: list[Mapping[str, Any]] = []
        self.readings: list[float | None] = []
        self.blocks: list[RaceBlock] = []
        self.levels: list[float] = []

    @property
    def rounds(self) -> int:
        """Number of its blocks."""
        return len(self.blocks)

    def add(self, block: RaceBlock) -> None:
        """Take in a block at `level`."""
        self.rows += block.rows
        self.blocks.append(block)
        self.levels.append(self.level)
        self.readings.append(self._reading(block))

    @property
    def is_out(self) -> bool:
        """Whether most of its blocks are outside the gates, where that does not decide its rate."""
        return False

    @property
    def tells(self) -> bool:
        """Whether an overloaded block tells the rate that it would have held."""
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
        if block.shift is None:
            step = _STEP if self.is_near else _FIRST_STEP
            share = 1 + step if block.is_held else 1 / (1 + step)
        else:
            share = _MORE if block.is_held else math.exp(max(block.shift, -_REACH)) * OVERLOAD
        self.level = float(f"{self.level * share:.4g}")

    @property
    def tells(self) -> bool:
        return not self.blocks or self.blocks[-1].shift is not None

    @property
    def is_near(self) -> bool:
        if self.tells:
            return not self.blocks[-1].is_held
        return len({each.is_held for each in self.blocks}) == 2

    def _reading(self, block: RaceBlock) -> float | None:
        # Without a limited latency a block is half a step from the rate sought on average.
        half = math.log1p(_STEP) / 2
        shift = block.shift if block.shift is not None else half if block.is_held else -half
        return math.log(self.level) + min(max(shift, -_REACH), _REACH)

    @property
    def first(self) -> int:
        """The last block on the way from the first level to the rate sought: those before tell the direction only."""
        if self.tells:
            return next((at for at, each in enumerate(self.blocks) if not each.is_held), self.rounds)
        turn = next((at for at, each in enumerate(self.blocks) if each.is_held != self.blocks[0].is_held), None)
        return max(self.rounds - 2, 0) if turn is None else turn - 1

    def level_held(self) -> float:
        known = [each for each in self.readings if each is not None]
        known = known[self.first :] or known[-1:]  # each block of a staircase has a reading
        return float(f"{math.exp(statistics.mean(known)):.4g}")


class _Fixed(Side):
    """Has one rate, at which a number is compared. Less of it is better."""

    @property
    def is_out(self) -> bool:
        return statistics.mean(block.is_held for block in self.blocks) < 0.5

    def _reading(self, block: RaceBlock) -> float | None:
        return -math.log(block.number) if block.number else None

    def level_held(self) -> float:
        return self.level
