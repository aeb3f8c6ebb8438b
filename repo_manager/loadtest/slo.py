"""Gates: `p99<20ms`, `throughput>500`, `errors<0.1%`, `energy<0.05J`; pass, fail, or inconclusive.

A gate passes when the whole 95 % interval of its number is on the right side of the limit, fails when the whole
interval is on the wrong side, and is inconclusive in between; then the time that would decide it is estimated, since
an interval shrinks with the square root of the measured time.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from repo_manager.errors import UsageError
from repo_manager.loadtest.result import LoadPoint, LoadTestReport
from repo_manager.stats.intervals import Interval

__all__ = ["Gate", "GateResult", "Outcome", "Over", "Verdict", "combine_verdicts", "judge", "judge_point", "parse_slo"]

Over = Literal["every", "some"]
"""Which levels have to hold the gates: all of them, or one."""

_LATENCIES = {
    "mean": "mean_ns",
    "avg": "mean_ns",
    "p50": "p50_ns",
    "p90": "p90_ns",
    "p95": "p95_ns",
    "p99": "p99_ns",
    "p99.9": "p999_ns",
    "max": "max_ns",
}
_NS_OF = {"ns": 1.0, "us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}
_PATTERN = re.compile(
    r"^\s*([a-z0-9.]+)\s*(<=|>=|<|>)\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-zµ%/]*)\s*(?:@\s*([0-9.]+))?\s*$", re.I
)
_UNITS_OF = {
    "throughput": {"": 1.0, "/s": 1.0, "infer/s": 1.0, "k/s": 1e3},
    "errors": {"%": 0.01, "": 1.0},
    "energy": {"j": 1.0, "mj": 1e-3, "": 1.0},
    "queue": _NS_OF,
}
_Z = 1.96


class Outcome(str, enum.Enum):
    """How a gate ended."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class Gate:
    """One objective.

    Attributes:
        text: as it was given.
        metric: `p99`, `throughput`, `errors`, `energy`, `queue`, ...
        below: whether the number has to be below the limit (else above).
        limit: in nanoseconds, inferences a second, a share, or joules an inference.
        level: only at this load level; `None`: at every one.
    """

    text: str
    metric: str
    below: bool
    limit: float
    level: float | None = None


@dataclasses.dataclass(frozen=True)
class GateResult:
    """One gate at one load level.

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


def parse_slo(text: str) -> Gate:
    """Parse one gate, optionally bound to a level: `p99<20ms@8`.

    Raises:
        UsageError: unknown metric, unit or form.
    """
    match = _PATTERN.match(text)
    metrics = ", ".join((*_LATENCIES, *_UNITS_OF))
    if match is None:
        raise UsageError(
            f"the objective {text!r} cannot be read",
            hint='Examples: "p99<20ms", "throughput>500", "errors<0.1%", "energy<0.05J".',
        )
    metric, sign, number, unit, level = match.groups()
    metric, unit = metric.lower(), unit.lower()
    units = _NS_OF if metric in _LATENCIES else _UNITS_OF.get(metric)
    if units is None:
        raise UsageError(f"the objective {text!r} names {metric!r}, expected one of {metrics}")
    if unit not in units:
        raise UsageError(
            f"the objective {text!r} has the unit {unit!r}, expected one of {', '.join(filter(None, units))}"
        )
    return Gate(
        text.strip(), metric, sign.startswith("<"), float(number) * units[unit], None if level is None else float(level)
    )


def judge(report: LoadTestReport, gates: Sequence[Gate], *, over: Over = "every") -> Verdict:
    """Judge a report.

    Args:
        report: the load test.
        gates: the objectives.
        over: `every`: each level has to hold them; `some`: one level that holds all of them is enough.

    Raises:
        UsageError: a gate is bound to a level that was not measured, or `over` is neither.
    """
    if over not in get_args(Over):
        raise UsageError(f"over is {over!r}, expected every or some")
    measured = {point.level for point in report.points}
    for gate in gates:
        if gate.level is not None and gate.level not in measured:
            raise UsageError(f"the objective {gate.text!r} names a level that was not measured: {gate.level:g}")
    results: list[GateResult] = []
    outcomes: list[tuple[str, Outcome]] = []
    for point in report.points:
        of_point = [judge_point(point, gate) for gate in gates if gate.level in (None, point.level)]
        results += of_point
        if of_point:
            outcomes.append((point.label, _worst([result.outcome for result in of_point])))
    holding = tuple(label for label, outcome in outcomes if outcome is Outcome.PASS)
    if over == "some" and holding:
        return Verdict(Outcome.PASS, tuple(results), holding)
    found = [outcome for _, outcome in outcomes]
    if over == "some" and Outcome.INCONCLUSIVE in found:
        return Verdict(Outcome.INCONCLUSIVE, tuple(results), holding)
    return Verdict(_worst(found), tuple(results), holding)


def combine_verdicts(verdicts: Iterable[Verdict | None]) -> Verdict | None:
    """Return one verdict of several on the same levels: every gate, the worst outcome; `None` of none.

    A level holds when it does in each of them.
    """
    found = [verdict for verdict in verdicts if verdict is not None]
    if not found:
        return None
    holding = tuple(label for label in found[0].holding if all(label in verdict.holding for verdict in found))
    results = tuple(result for verdict in found for result in verdict.results)
    return Verdict(_worst([verdict.outcome for verdict in found]), results, holding)


def _worst(outcomes: Sequence[Outcome]) -> Outcome:
    for outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE):
        if outcome in outcomes:
            return outcome
    return Outcome.PASS


def judge_point(point: LoadPoint, gate: Gate) -> GateResult:
    """Judge one gate at one load level."""
    value, interval = _value_of(point, gate)
    name = point.label

    def result(outcome: Outcome, reason: str, needed_s: float | None = None) -> GateResult:
        return GateResult(gate.text, name, outcome, value, interval, reason, needed_s)

    if point.outcome == "failed" and gate.metric != "errors":
        return result(Outcome.FAIL, f"the level failed: {point.reason}")
    if value is None:
        return result(Outcome.INCONCLUSIVE, f"{gate.metric} was not reported at {name}")
    low, high = (value, value) if interval is None else (interval.low, interval.high)
    holds, breaks = (high < gate.limit, low >= gate.limit) if gate.below else (low > gate.limit, high <= gate.limit)
    if not holds and not breaks:
        return result(
            Outcome.INCONCLUSIVE,
            f"{_words(gate, value, interval)}: the interval contains the limit",
            _needed_s(point, value, low, high, gate),
        )
    if interval is None and point.outcome == "unstable" and not _windows_agree(point, gate):
        return result(Outcome.INCONCLUSIVE, f"the level is unstable: {point.reason}")
    if breaks and point.client.bottleneck and gate.metric != "errors":
        return result(Outcome.INCONCLUSIVE, f"the client was the bottleneck: {point.client.note}")
    return result(Outcome.PASS if holds else Outcome.FAIL, _words(gate, value, interval))


def _windows_agree(point: LoadPoint, gate: Gate) -> bool:
    """Say whether every window that makes the row is on the same side of the limit as the others."""
    field = {"throughput": "throughput_per_s", "mean": "mean_ns", "avg": "mean_ns", "p50": "p50_ns", "p99": "p99_ns"}
    values = [getattr(window, field[gate.metric]) for window in point.windows if window.used and gate.metric in field]
    if not values or any(value is None for value in values):
        return False
    return len({(value < gate.limit) for value in values}) == 1


def _value_of(point: LoadPoint, gate: Gate) -> tuple[float | None, Interval | None]:
    """Return the gate's number at a point and its interval."""
    if gate.metric in _LATENCIES:
        field = _LATENCIES[gate.metric]
        return getattr(point.latency, field), getattr(point.intervals, field, None)
    if gate.metric == "throughput":
        return point.throughput_per_s, point.intervals.throughput_per_s
    if gate.metric == "errors":
        return point.error_share, _wilson(point.errors, point.requests + point.errors)
    if gate.metric == "energy":
        return point.gpu.energy_per_inference_j, None
    return (None if point.server is None else point.server.queue_ns), None


def _words(gate: Gate, value: float, interval: Interval | None) -> str:
    """Return `p99 1.39 ms [1.23, 1.53]`."""
    if gate.metric in _LATENCIES or gate.metric == "queue":
        unit, size = next(
            ((unit, size) for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)) if value >= size), ("ns", 1)
        )
    else:
        unit, size = {"throughput": ("/s", 1.0), "errors": ("%", 0.01)}.get(gate.metric, ("J", 1.0))
    text = f"{gate.metric} {value / size:.4g} {unit}"
    return text if interval is None else f"{text} [{interval.low / size:.4g}, {interval.high / size:.4g}]"


def _wilson(errors: int, total: int) -> Interval | None:
    """Return Wilson's 95 % interval of a share (Wilson 1927); without an error, the upper end is about 3.8 / total."""
    if not total:
        return None
    share, square = errors / total, _Z * _Z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = _Z / (1 + square / total) * (share * (1 - share) / total + square / (4 * total * total)) ** 0.5
    return Interval(max(centre - half, 0.0) if errors else 0.0, min(centre + half, 1.0))


def _needed_s(point: LoadPoint, value: float, low: float, high: float, gate: Gate) -> float | None:
    """Estimate the measuring time after which the interval would leave the limit out."""
    distance = abs(gate.limit - value)
    half = high - value if gate.limit > value else value - low
    if distance <= 0 or half <= 0 or not point.duration_s:
        return None
    # An interval shrinks with the root of the time; that of a share of which nothing was seen, with the time itself.
    return float(point.duration_s * (half / distance) ** (1 if value == 0.0 and gate.metric == "errors" else 2))
