"""A regression gate: this report against an earlier one, with the noise of both taken into account."""

from __future__ import annotations

import math

from repo_manager.errors import InputError
from repo_manager.loadtest.result import LoadPoint, LoadTestReport
from repo_manager.loadtest.slo import GateResult, Outcome, Verdict
from repo_manager.stats.intervals import Interval

__all__ = ["judge_against"]

_NUMBERS = {
    "throughput": ("throughput_per_s", False),
    "p50": ("p50_ns", True),
    "p99": ("p99_ns", True),
}


def judge_against(report: LoadTestReport, baseline: LoadTestReport, *, tolerance: float = 0.05) -> Verdict:
    """Judge whether throughput, p50 or p99 got worse than `tolerance` at a level that both reports have.

    The ratio of new to old gets an interval from the intervals of both (their log half-widths in quadrature). It fails
    when the whole interval is beyond the tolerance, passes when none of it is, and is inconclusive between.

    Args:
        report: the new report.
        baseline: the earlier one, by `read_report`.
        tolerance: the allowed share of worsening.

    Raises:
        InputError: no level in common.
    """
    old = {(point.mode, point.level, point.batch_size): point for point in baseline.points}
    pairs = [
        (point, old[key]) for point in report.points if (key := (point.mode, point.level, point.batch_size)) in old
    ]
    if not pairs:
        raise InputError("the baseline has no load level in common with this report")
    results: list[GateResult] = []
    holding: list[str] = []
    for point, before in pairs:
        of_point = [_judge(point, before, name, tolerance) for name in _NUMBERS]
        results += of_point
        if all(result.outcome is Outcome.PASS for result in of_point):
            holding.append(point.label)
    found = {result.outcome for result in results}
    order = (Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.PASS)
    return Verdict(next(outcome for outcome in order if outcome in found), tuple(results), tuple(holding))


def _judge(point: LoadPoint, before: LoadPoint, name: str, tolerance: float) -> GateResult:
    field, larger_is_worse = _NUMBERS[name]
    gate = f"{name} against the baseline, at most {tolerance:.0%} worse"
    if point.outcome == "failed":
        return GateResult(gate, point.label, Outcome.FAIL, None, None, f"the level failed: {point.reason}")
    new, previous = (
        row.throughput_per_s if name == "throughput" else getattr(row.latency, field) for row in (point, before)
    )
    if not new or not previous:
        return GateResult(gate, point.label, Outcome.INCONCLUSIVE, None, None, "one of the reports has no such number")
    worse = new / previous if larger_is_worse else previous / new
    half = math.hypot(*(_log_half_width(getattr(row.intervals, field)) for row in (point, before)))
    interval = Interval(worse * math.exp(-half), worse * math.exp(half))
    limit = 1 + tolerance
    if interval.high <= limit:
        outcome = Outcome.PASS
    elif interval.low > limit:
        outcome = Outcome.FAIL
    else:
        outcome = Outcome.INCONCLUSIVE
    words = f"worse by a factor of {worse:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
    if half == 0:
        words = f"worse by a factor of {worse:.3f}; neither report says how large its noise is"
    needed_s = None
    if outcome is Outcome.INCONCLUSIVE and worse != limit and point.duration_s:
        needed_s = point.duration_s * (half / abs(math.log(limit / worse))) ** 2
    return GateResult(gate, point.label, outcome, worse, interval, words, needed_s)


def _log_half_width(interval: Interval | None) -> float:
    if interval is None or interval.low <= 0:
        return 0.0
    return math.log(interval.high / interval.low) / 2
