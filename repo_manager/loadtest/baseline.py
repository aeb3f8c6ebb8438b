"""A regression gate: this report against an earlier one, with the noise of both taken into account."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import InputError
from repo_manager.loadtest.result import SCHEMA_VERSION, Interval, LoadPoint, LoadTestReport
from repo_manager.loadtest.slo import GateResult, Outcome, Verdict

__all__ = ["judge_against", "load_baseline"]

_NUMBERS = {
    "throughput": ("throughput_per_s", False),
    "p50": ("p50_ns", True),
    "p99": ("p99_ns", True),
}


def load_baseline(path: Path) -> dict[str, Any]:
    """Read the JSON of an earlier `LoadTestReport`.

    Raises:
        InputError: unreadable, no such report, or of a schema that is not understood.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version, points = document["schema_version"], document["points"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InputError(
            f"{path} is no report of a load test: {exc!r}", hint="Write one with: repo-manager loadtest ... --json."
        ) from exc
    if version != SCHEMA_VERSION or not isinstance(points, list):
        raise InputError(f"{path} has the schema version {version}, expected {SCHEMA_VERSION}")
    result: dict[str, Any] = document
    return result


def judge_against(report: LoadTestReport, baseline: Mapping[str, Any], *, tolerance: float = 0.05) -> Verdict:
    """Judge whether throughput, p50 or p99 got worse than `tolerance` at a level that both reports have.

    The ratio of new to old gets an interval from the intervals of both (their log half-widths in quadrature). It fails
    when the whole interval is beyond the tolerance, passes when none of it is, and is inconclusive between.

    Args:
        report: the new report.
        baseline: what `load_baseline` read.
        tolerance: the allowed share of worsening.

    Raises:
        InputError: no level in common.
    """
    old = {(point["mode"], point["level"], point["batch_size"]): point for point in baseline["points"]}
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


def _judge(point: LoadPoint, before: Mapping[str, Any], name: str, tolerance: float) -> GateResult:
    field, larger_is_worse = _NUMBERS[name]
    gate = f"{name} against the baseline, at most {tolerance:.0%} worse"
    if point.outcome == "failed":
        return GateResult(gate, point.label, Outcome.FAIL, None, None, f"the level failed: {point.reason}")
    is_throughput = name == "throughput"
    new = point.throughput_per_s if is_throughput else getattr(point.latency, field)
    previous = before[field] if is_throughput else before["latency"][field]
    if not new or not previous:
        return GateResult(gate, point.label, Outcome.INCONCLUSIVE, None, None, "one of the reports has no such number")
    worse = new / previous if larger_is_worse else previous / new
    known = before["intervals"].get(field)
    half = math.hypot(
        _log_half_width(getattr(point.intervals, field)),
        _log_half_width(None if known is None else Interval(known["low"], known["high"])),
    )
    interval = Interval(worse * math.exp(-half), worse * math.exp(half))
    limit = 1 + tolerance
    if interval.high <= limit:
        outcome = Outcome.PASS
    elif interval.low > limit:
        outcome = Outcome.FAIL
    else:
        outcome = Outcome.INCONCLUSIVE
    words = f"worse by a factor of {worse:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
    needed_s = None
    if outcome is Outcome.INCONCLUSIVE and worse != limit and point.duration_s:
        needed_s = point.duration_s * (half / abs(math.log(limit / worse))) ** 2
    return GateResult(gate, point.label, outcome, worse, interval, words, needed_s)


def _log_half_width(interval: Interval | None) -> float:
    if interval is None or interval.low <= 0:
        return 0.0
    return math.log(interval.high / interval.low) / 2
