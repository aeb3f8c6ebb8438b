"""Judges a load test: its gates (`p99<20ms`, `throughput>500`, `errors<0.1%`), and an earlier report as the limit.

A gate passes when the whole 95 % interval of its number is on the right side of the limit, fails when the whole
interval is on the wrong side, and is inconclusive in between. Then the measuring time for a decision is estimated: an
interval shrinks with the square root of the measured time.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal, get_args

from repo_manager.errors import InputError, UsageError
from repo_manager.gates import Gate, GateMetric, GateResult, Grammar, Outcome, Verdict, decide, growth_needed, worst
from repo_manager.loadtest.metrics import METRICS, Metric, metric_of
from repo_manager.loadtest.result import BUSY_SHARE, LoadPoint, LoadTestReport
from repo_manager.stats.intervals import Interval

__all__ = [
    "COMPARED_OPTIONS",
    "LoadComparison",
    "LoadDifference",
    "Over",
    "compare_load_tests",
    "judge",
    "judge_against",
    "judge_point",
    "parse_slo",
]

_ALPHA = 0.05
Over = Literal["every", "some"]
"""The levels that must hold the gates: all of them, or one."""

_GRAMMAR = Grammar(
    {name: GateMetric(metric.unit) for metric in METRICS if metric.is_gate for name in (metric.key, *metric.aliases)},
    examples=("p99<20ms", "throughput>500", "errors<0.1%", "energy<0.05J", "p99<20ms@8"),
    has_levels=True,
)


def parse_slo(text: str) -> Gate:
    """Parse one gate, optionally bound to a level: `p99<20ms@8`.

    Raises:
        UsageError: unknown metric, unit or form.
    """
    return _GRAMMAR.parse(text)


def judge(report: LoadTestReport, gates: Sequence[Gate], *, over: Over = "every") -> Verdict:
    """Judge a report.

    Args:
        report: result of a load test, with a point per level.
        gates: limits, by `parse_slo`. One bound to a level is judged only there.
        over: `every`: each level must hold them. `some`: one level that passes every gate is enough.

    Raises:
        UsageError: a gate is bound to a level not measured, or `over` is neither.
    """
    if over not in get_args(Over):
        raise UsageError(f"over is {over!r}, expected every or some")
    measured = {point.level for point in report.points}
    for gate in gates:
        if gate.level is not None and gate.level not in measured:
            raise UsageError(f"the gate {gate.text!r} names a level not measured: {gate.level:g}")
    results: list[GateResult] = []
    outcomes: list[tuple[str, Outcome]] = []
    for point in report.points:
        of_point = [judge_point(point, gate) for gate in gates if gate.level in (None, point.level)]
        results += of_point
        if of_point:
            outcomes.append((point.label, worst([result.outcome for result in of_point])))
    holding = tuple(label for label, outcome in outcomes if outcome is Outcome.PASS)
    if over == "some" and holding:
        return Verdict(Outcome.PASS, tuple(results), holding)
    found = [outcome for _, outcome in outcomes]
    if over == "some" and Outcome.INCONCLUSIVE in found:
        return Verdict(Outcome.INCONCLUSIVE, tuple(results), holding)
    return Verdict(worst(found), tuple(results), holding)


def judge_point(point: LoadPoint, gate: Gate, *, looks: int = 1) -> GateResult:
    """Judge one gate at one load level.

    Args:
        point: row of the load level.
        gate: limit, by `parse_slo`. It is judged here even if bound to another level.
        looks: how often the level is judged while it runs. The interval is widened so that all of these looks
            together miss the number with 5 % (Bonferroni).
    """
    metric = metric_of(gate.metric)
    value, interval = metric.get(point), metric.interval(point)
    if value is not None and interval is not None and looks > 1:
        # With no errors, the width of Wilson's interval grows with the square of the normal quantile.
        interval = _widened(value, interval, looks, power=2 if gate.metric == "errors" and not value else 1)
    name = point.label

    def result(outcome: Outcome, reason: str, needed_s: float | None = None) -> GateResult:
        return GateResult(gate.text, name, outcome, reason, value, interval, needed_s)

    if point.outcome == "failed" and gate.metric != "errors":
        return result(Outcome.FAIL, f"the level failed: {point.reason}")
    if value is None:
        return result(Outcome.INCONCLUSIVE, f"{gate.metric} was not reported at {name}")
    around = Interval(value, value) if interval is None else interval
    words = f"{gate.metric} {metric.unit.text(value, interval)}"
    outcome = decide(around, gate.limit, below=gate.below)
    if point.outcome == "overloaded" and metric.is_latency and gate.below:
        return result(Outcome.FAIL, f"{words}: {point.reason}")
    if outcome is Outcome.INCONCLUSIVE:
        return result(outcome, f"{words}: the interval contains the limit", _needed_s(point, value, around, gate))
    if interval is None and point.outcome == "unstable" and not _windows_agree(point, metric, gate.limit):
        return result(Outcome.INCONCLUSIVE, f"the level is unstable: {point.reason}")
    to_blame = point.client.bottleneck and point.outcome != "overloaded"
    to_blame = to_blame and not _fails_without_the_client(point, metric, around, gate)
    if outcome is Outcome.FAIL and to_blame and gate.metric != "errors":
        return result(Outcome.INCONCLUSIVE, f"the client was the bottleneck: {point.client.note}")
    return result(outcome, words)


def _fails_without_the_client(point: LoadPoint, metric: Metric, around: Interval, gate: Gate) -> bool:
    """Say whether a latency is over its limit even without the largest delay of a send."""
    client = point.client
    if not (metric.is_latency and gate.below) or client.max_late_ns is None or (client.cpu_share or 0.0) > BUSY_SHARE:
        return False
    return around.low - client.max_late_ns > gate.limit


def _widened(value: float, interval: Interval, looks: int, *, power: int) -> Interval:
    """Return a 95 % interval as one of the confidence each of several looks needs, by normal quantiles."""
    normal = statistics.NormalDist()
    factor = (normal.inv_cdf(1 - _ALPHA / 2 / looks) / normal.inv_cdf(1 - _ALPHA / 2)) ** power
    low, high = value - (value - interval.low) * factor, value + (interval.high - value) * factor
    return Interval(max(low, 0.0), high)


def _windows_agree(point: LoadPoint, metric: Metric, limit: float) -> bool:
    """Return whether all windows of the row are on the same side of the limit."""
    values = [metric.of_window(window) for window in point.windows if window.used]
    if not values or any(value is None for value in values):
        return False
    return len({value < limit for value in values if value is not None}) == 1


def _needed_s(point: LoadPoint, value: float, interval: Interval, gate: Gate) -> float | None:
    """Estimate the measuring time after which the interval would leave the limit out."""
    # An error share of zero has an interval inversely proportional to the time.
    times = growth_needed(value, interval, gate.limit, power=1.0 if value == 0.0 and gate.metric == "errors" else 2.0)
    return None if times is None or not point.duration_s else point.duration_s * times


def judge_against(report: LoadTestReport, baseline: LoadTestReport, *, tolerance: float = 0.05) -> Verdict:
    """Judge whether throughput, p50 or p99 got worse than `tolerance` at a level both reports have.

    The ratio of new to old gets an interval from the intervals of both (their log half-widths in quadrature). It fails
    when the whole interval is beyond the tolerance, passes when none of it is, and is inconclusive between.

    Args:
        report: result of a load test, with a point per level.
        baseline: the earlier one, by `read_report`.
        tolerance: the allowed share of worsening.

    Raises:
        InputError: no level in common.
    """
    pairs = _same_levels(report, baseline)
    if not pairs:
        raise InputError("the baseline has no load level in common with this report")
    results: list[GateResult] = []
    holding: list[str] = []
    for point, before in pairs:
        of_point = [_judge_ratio(point, before, metric, tolerance) for metric in METRICS if "baseline" in metric.places]
        results += of_point
        if all(result.outcome is Outcome.PASS for result in of_point):
            holding.append(point.label)
    return Verdict(worst(result.outcome for result in results), tuple(results), tuple(holding))


def _same_levels(report: LoadTestReport, earlier: LoadTestReport) -> list[tuple[LoadPoint, LoadPoint]]:
    old = {(point.mode, point.level, point.batch_size): point for point in earlier.points}
    keys = [(point, (point.mode, point.level, point.batch_size)) for point in report.points]
    return [(point, old[key]) for point, key in keys if key in old]


@dataclasses.dataclass(frozen=True)
class LoadDifference:
    """One number of one load level in two load tests.

    Attributes:
        level: as `LoadPoint.label`: `concurrency 8`.
        metric: as `Metric.title`: `throughput`, `p99 latency`.
        before: in the first, as text. `-` where it was not measured.
        after: the same in the second.
        change: in words, with its 95 % interval.
        outcome: `better`, `worse`, or `no difference shown`.
        ratio: a factor above 1 is worse. `None` where a number is missing.
        interval: of `ratio`, 95 %. `None` where a number is missing.
    """

    level: str
    metric: str
    before: str
    after: str
    change: str
    outcome: str
    ratio: float | None = None
    interval: Interval | None = None


_COMPARED = {Outcome.PASS: "better", Outcome.FAIL: "worse", Outcome.INCONCLUSIVE: "no difference shown"}


@dataclasses.dataclass(frozen=True)
class LoadComparison:
    """Two load tests measured one after the other.

    Attributes:
        before: the earlier one, or the first version's.
        after: the later one, or the second version's. A ratio above 1 means it is worse.
        differences: a row for each number of a baseline at each level both have.
        notes: reasons against the comparison: other servers, machines or options.
    """

    before: LoadTestReport
    after: LoadTestReport
    differences: tuple[LoadDifference, ...]
    notes: tuple[str, ...]


COMPARED_OPTIONS = (
    "batch_size",
    "shapes",
    "data",
    "distinct",
    "warmup_s",
    "duration_s",
    "request_count",
    "compression",
)
"""Options of a load test with an effect on its numbers."""


def compare_load_tests(before: LoadTestReport, after: LoadTestReport) -> LoadComparison:
    """Compare two load tests. `compare` measures both together, in pairs, and sees smaller differences.

    Args:
        before: the earlier one, or the first version's.
        after: result of the later load test.
    """
    facts = (
        ("servers", before.target.url, after.target.url),
        ("releases of the server", before.target.server_version, after.target.server_version),
        ("client machines", before.environment.get("machine"), after.environment.get("machine")),
        *((f"option {name}", before.options.get(name), after.options.get(name)) for name in COMPARED_OPTIONS),
    )
    notes = tuple(f"{what} differ: {one} and {other}" for what, one, other in facts if one != other)
    return LoadComparison(before, after, _differences(before, after), notes)


def _differences(earlier: LoadTestReport, report: LoadTestReport) -> tuple[LoadDifference, ...]:
    found = []
    for point, before in _same_levels(report, earlier):
        for metric in METRICS:
            if "baseline" not in metric.places:
                continue
            result = _judge_ratio(point, before, metric, 0.0)
            is_noise_known = result.interval is not None and result.interval.low < result.interval.high
            outcome = _COMPARED[result.outcome] if is_noise_known else "no difference shown"
            old, new = (
                "-" if (value := metric.get(row)) is None else metric.unit.text(value) for row in (before, point)
            )
            words = (point.label, metric.title, old, new, result.reason, outcome)
            found.append(LoadDifference(*words, result.value, result.interval))
    return tuple(found)


def _judge_ratio(point: LoadPoint, before: LoadPoint, metric: Metric, tolerance: float) -> GateResult:
    gate = f"{metric.key} against the baseline, at most {tolerance:.0%} worse"
    if point.outcome == "failed":
        return GateResult(gate, point.label, Outcome.FAIL, f"the level failed: {point.reason}")
    new, previous = metric.get(point), metric.get(before)
    if not new or not previous:
        return GateResult(gate, point.label, Outcome.INCONCLUSIVE, "one of the reports has no such number")
    worse = new / previous if metric.lower_is_better else previous / new
    half = math.hypot(*(_log_half_width(metric.interval(row)) for row in (point, before)))
    interval = Interval(worse * math.exp(-half), worse * math.exp(half))
    limit = 1 + tolerance if metric.lower_is_better else math.inf if tolerance >= 1 else 1 / (1 - tolerance)
    if interval.high <= limit:
        outcome = Outcome.PASS
    elif interval.low > limit:
        outcome = Outcome.FAIL
    else:
        outcome = Outcome.INCONCLUSIVE
    change, *ends = (_change(each, metric) for each in (worse, interval.low, interval.high))
    words = f"{change} (between {ends[0]} and {ends[1]})"
    if half == 0:
        words = f"{change}; neither report says how large its noise is"
    needed_s = None
    if outcome is Outcome.INCONCLUSIVE and worse != limit and point.duration_s:
        needed_s = point.duration_s * (half / abs(math.log(limit / worse))) ** 2
    return GateResult(gate, point.label, outcome, words, worse, interval, needed_s)


def _change(worse: float, metric: Metric) -> str:
    """Write a factor above 1 (worse) or below as the percentage by which the number itself differs."""
    share = worse - 1 if metric.lower_is_better else 1 / worse - 1
    if f"{abs(share):.1%}" == "0.0%":
        return "as before"
    return f"{abs(share):.1%} {'worse' if worse > 1 else 'better'}"


def _log_half_width(interval: Interval | None) -> float:
    if interval is None or interval.low <= 0:
        return 0.0
    return math.log(interval.high / interval.low) / 2
