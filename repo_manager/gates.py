"""The gate language: a limit on a number (`p99<20ms`), how it is read, and an interval's verdict on it."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable, Mapping

from repo_manager.errors import UsageError
from repo_manager.stats.intervals import Interval

__all__ = [
    "ENERGY",
    "FACTOR",
    "RATE",
    "RATIO",
    "SHARE",
    "TIME",
    "Gate",
    "GateMetric",
    "GateResult",
    "Grammar",
    "Outcome",
    "Unit",
    "Verdict",
    "combine_verdicts",
    "decide",
    "growth_needed",
    "worst",
]


# Units of limits and displayed numbers.


@dataclasses.dataclass(frozen=True)
class Unit:
    """One kind of number.

    Attributes:
        sizes: each accepted spelling, in lower case, and its size in the base unit. An empty spelling is no unit.
        shown: spellings for display with their sizes, largest first. A number takes the first it reaches.
    """

    sizes: Mapping[str, float]
    shown: tuple[tuple[str, float], ...]

    @property
    def spellings(self) -> str:
        """The accepted spellings, for a message."""
        named = ", ".join(filter(None, self.sizes))
        return f"{named} or no unit" if "" in self.sizes else named

    def text(self, value: float, interval: Interval | None = None) -> str:
        """Return `1.39 ms`, or with an interval `1.39 ms [1.23, 1.53]`.

        Args:
            value: the number, in the base unit.
            interval: confidence interval of the number. `None`: unknown.
        """
        name, size = next(((name, size) for name, size in self.shown if value >= size), self.shown[-1])
        text = f"{value / size:.4g} {name}"
        return text if interval is None else f"{text} [{interval.low / size:.4g}, {interval.high / size:.4g}]"


TIME = Unit({"ns": 1.0, "us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}, (("s", 1e9), ("ms", 1e6), ("µs", 1e3), ("ns", 1.0)))
"""Nanoseconds."""
RATE = Unit({"": 1.0, "/s": 1.0, "infer/s": 1.0, "k/s": 1e3}, (("/s", 1.0),))
"""Inferences a second."""
SHARE = Unit({"%": 0.01, "": 1.0}, (("%", 0.01),))
"""A share, 0 to 1."""
ENERGY = Unit({"j": 1.0, "mj": 1e-3, "": 1.0}, (("J", 1.0),))
"""Joules an inference."""
RATIO = Unit({"": 1.0}, (("", 1.0),))
"""A number without a unit. Gates do not take it."""
FACTOR = Unit({"x": 1.0}, (("x of the old version's", 1.0),))
"""A multiple of the old version's number."""


# Parse gates: `p99<20ms`, `throughput>500`, `errors<0.1%`, `p99<1.2x`, `mean<5ms@16`.
#
# A load test and a trial measure different things, so each has a `Grammar`: its metrics with their units and sides.

_NUMBER = r"[0-9]*\.?[0-9]+"
_PATTERN = re.compile(
    rf"^\s*([a-z0-9.]+)\s*(<=|>=|<|>)\s*({_NUMBER}(?:e[+-]?[0-9]+)?)\s*([a-zµ%/]*)\s*(?:@\s*({_NUMBER}|[0-9]+\.))?\s*$",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Gate:
    """One limit.

    Attributes:
        text: the gate as it was given, without spaces around it.
        metric: `p99`, `throughput`, `errors`, `drift`, ...
        below: whether the number must be below the limit (else above).
        limit: in the base unit of the metric, or with `relative` a factor of the old version's number.
        relative: whether the limit is a factor.
        level: only at this load level. `None`: at every one.
    """

    text: str
    metric: str
    below: bool
    limit: float
    relative: bool = False
    level: float | None = None


@dataclasses.dataclass(frozen=True)
class GateMetric:
    """A metric a gate may name.

    Attributes:
        unit: accepted spellings of the limit's unit, with their sizes in the base unit.
        side: the only sense the gate may have, `<` or `>`. `None` allows both.
        has_factor: whether the limit may also be a multiple of the old version's number (`1.2x`).
        is_share: whether a limit above 1 is a mistake.
    """

    unit: Unit
    side: str | None = None
    has_factor: bool = False
    is_share: bool = False


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The gates of one command.

    Attributes:
        subjects: by name, in lower case.
        examples: for the message about a text other than a gate.
        has_levels: whether a gate may name a load level (`@16`).
    """

    subjects: Mapping[str, GateMetric]
    examples: tuple[str, ...]
    has_levels: bool = False

    def parse(self, text: str) -> Gate:
        """Parse one gate.

        Raises:
            UsageError: unknown metric or unit, a side the metric does not have, or another form.
        """
        name = f"the gate {text.strip()!r}"
        match = _PATTERN.match(text)
        if match is None:
            examples = ", ".join(f'"{example}"' for example in self.examples)
            raise UsageError(
                f"{name} cannot be read",
                hint=f"Expected METRIC < or > LIMIT, as in {examples}. Metrics: {', '.join(self.subjects)}.",
            )
        metric, sign, number, unit = (part.lower() for part in match.groups()[:4])
        level = match.group(5)
        subject = self.subjects.get(metric)
        if subject is None:
            raise UsageError(f"{name} names {metric!r}, expected one of {', '.join(self.subjects)}")
        if subject.side is not None and not sign.startswith(subject.side):
            raise UsageError(f"{name} has {sign}, expected {subject.side}: {metric} has a limit on that side")
        if level is not None and not self.has_levels:
            raise UsageError(f"{name} names a load level (@{level}), which only the gates of a load test have")
        units = {**FACTOR.sizes, **subject.unit.sizes} if subject.has_factor else subject.unit.sizes
        if unit not in units:
            expected = f"{FACTOR.spellings}, {subject.unit.spellings}" if subject.has_factor else subject.unit.spellings
            raise UsageError(f"{name} has the unit {unit!r}, expected one of {expected}")
        limit = float(number) * units[unit]
        if subject.is_share and limit > 1:
            raise UsageError(f"{name} asks for more than 100 %", hint="Write a share with %, or 0 to 1.")
        relative = subject.has_factor and unit in FACTOR.sizes
        return Gate(
            text.strip(), metric, sign.startswith("<"), limit, relative, None if level is None else float(level)
        )

    def parse_all(self, text: str) -> tuple[Gate, ...]:
        """Parse gates separated by commas. Empty parts are left out.

        Raises:
            UsageError: as `parse`.
        """
        return tuple(self.parse(part) for part in text.split(",") if part.strip())


# Compare an interval with a limit, and combine several results.


class Outcome(str, enum.Enum):
    """How a gate ended."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class GateResult:
    """One gate, judged.

    Attributes:
        gate: text of the gate as it was given, or of the comparison with a baseline.
        level: of a load test, the load level. Of a trial, the evidence: `shadow` (mirrored requests) or `traffic` (the
            server's counters).
        outcome: pass or fail. Inconclusive: the interval holds the limit, or there is no number.
        reason: the measured number and its interval in words, or why there is none.
        value: the measured number, in the gate's unit. `None` when it was not reported. Trials give words alone.
        interval: confidence interval of `value`, in its unit. `None`: there is none.
        needed_s: likely seconds of measuring to decide an inconclusive gate. `None`: more do not help.
        needed_requests: the same for a trial, those seen included. `None`: no number would, or unknown.
    """

    gate: str
    level: str
    outcome: Outcome
    reason: str
    value: float | None = None
    interval: Interval | None = None
    needed_s: float | None = None
    needed_requests: int | None = None

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
        holding: labels of the levels with every gate passed, in order of load.
    """

    outcome: Outcome
    results: tuple[GateResult, ...]
    holding: tuple[str, ...]

    @property
    def largest_holding(self) -> str | None:
        """The highest level with every gate passed."""
        return self.holding[-1] if self.holding else None


def decide(interval: Interval, limit: float, *, below: bool) -> Outcome:
    """Return pass when the whole interval is on the right side of the limit, fail when it is on the wrong side.

    The limit itself is on the wrong side. An interval across the limit decides nothing.

    Args:
        interval: confidence interval of the measured number.
        limit: the gate's limit, in the unit of the number.
        below: whether the number must stay below the limit.
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
    """Estimate the factor of observations for a decision, if the number stays what it is. `None`: none would.

    Args:
        value: the number that was measured.
        interval: confidence interval of the number.
        limit: the limit, inside the interval.
        power: 2 for an interval that shrinks with the square root of the observations, 1 for one with a size inverse
            to them.
    """
    half = interval.high - value if limit > value else value - interval.low
    distance = abs(limit - value)
    return (half / distance) ** power if distance > 0 and half > 0 else None


def combine_verdicts(verdicts: Iterable[Verdict | None]) -> Verdict | None:
    """Return one verdict of several on the same levels: every gate, the worst outcome. `None` of none.

    A level holds when it does in each of them.

    Args:
        verdicts: verdicts of the same levels. `None` is skipped.
    """
    found = [verdict for verdict in verdicts if verdict is not None]
    if not found:
        return None
    holding = tuple(label for label in found[0].holding if all(label in verdict.holding for verdict in found))
    results = tuple(result for verdict in found for result in verdict.results)
    return Verdict(worst(verdict.outcome for verdict in found), results, holding)
