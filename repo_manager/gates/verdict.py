"""What an interval says of a limit, and several results together."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable

from repo_manager.stats.intervals import Interval

__all__ = ["GateResult", "Outcome", "Verdict", "combine_verdicts", "decide", "growth_needed", "worst"]


class Outcome(str, enum.Enum):
    """How a gate ended."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class GateResult:
    """One gate of a load test at one load level.

    Attributes:
        value: the measured number, in the gate's unit; `None` when it was not reported.
        needed_s: seconds of measuring that would probably decide an inconclusive gate; `None`: more do not help.
    """

    gate: str
    level: str
    outcome: Outcome
    value: float | None
    interval: Interval | None
    reason: str
    needed_s: float | None = None

    @property
    def why(self) -> str:
        """The reason, and how much more measuring would probably decide."""
        if self.needed_s is None:
            return self.reason
        return f"{self.reason}; about {self.needed_s:.0f} s of measuring would decide"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """All gates at all levels.

    Attributes:
        outcome: fail if any gate failed, else inconclusive if any is, else pass.
        holding: labels of the levels at which every gate passed, in order of load.
    """

    outcome: Outcome
    results: tuple[GateResult, ...]
    holding: tuple[str, ...]

    @property
    def largest_holding(self) -> str | None:
        """The highest level at which every gate passed."""
        return self.holding[-1] if self.holding else None


def decide(interval: Interval, limit: float, *, below: bool) -> Outcome:
    """Return pass when the whole interval is on the right side of the limit, fail when it is on the wrong side.

    The limit itself is on the wrong side. An interval that reaches over the limit decides nothing.
    """
    if below:
        passes, fails = interval.high < limit, interval.low >= limit
    else:
        passes, fails = interval.low > limit, interval.high <= limit
    if passes:
        return Outcome.PASS
    return Outcome.FAIL if fails else Outcome.INCONCLUSIVE


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """Return fail if any failed, else inconclusive if any is, else pass."""
    found = set(outcomes)
    return next((each for each in (Outcome.FAIL, Outcome.INCONCLUSIVE) if each in found), Outcome.PASS)


def growth_needed(value: float, interval: Interval, limit: float, *, power: float = 2.0) -> float | None:
    """Estimate how many times the observations would decide, if the number stays what it is; `None`: none would.

    Args:
        value: the number.
        interval: around it.
        limit: that it contains.
        power: 2 for an interval that shrinks with the square root of the observations, 1 for one that shrinks as they
            grow.
    """
    half = interval.high - value if limit > value else value - interval.low
    distance = abs(limit - value)
    return (half / distance) ** power if distance > 0 and half > 0 else None


def combine_verdicts(verdicts: Iterable[Verdict | None]) -> Verdict | None:
    """Return one verdict of several on the same levels: every gate, the worst outcome; `None` of none.

    A level holds when it does in each of them.
    """
    found = [verdict for verdict in verdicts if verdict is not None]
    if not found:
        return None
    holding = tuple(label for label in found[0].holding if all(label in verdict.holding for verdict in found))
    results = tuple(result for verdict in found for result in verdict.results)
    return Verdict(worst(verdict.outcome for verdict in found), results, holding)
