"""Reads load-test reports back, and merges those of several generators under one model at the same time."""

from __future__ import annotations

import collections
import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_manager.errors import InputError
from repo_manager.files import reason_of
from repo_manager.loadtest.result import (
    CURVE_QUANTILES,
    SCHEMA_VERSION,
    Detail,
    ErrorCount,
    Intervals,
    Latency,
    LoadPoint,
    LoadTestReport,
)
from repo_manager.stats.histogram import Histogram
from repo_manager.stats.intervals import Interval
from repo_manager.types import StrPath

__all__ = ["merge_reports", "read_report", "report_from_json"]


# Read the JSON of a load test.


def read_report(path: StrPath) -> LoadTestReport:
    """Read the JSON of `loadtest --json` or `--report`.

    Raises:
        InputError: unreadable, no such report, or of an unknown schema.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise InputError(f"{path} cannot be read as a load test's report: {reason_of(exc)}") from exc
    return report_from_json(document, where=str(path))


def report_from_json(document: Any, *, where: str = "the report") -> LoadTestReport:
    """Return the report behind a `document` of `as_json`. Unknown fields are left out.

    Raises:
        InputError: it is none, or of another schema version.
    """
    hint = "Write one with: repo-manager loadtest ... --report FILE."
    if not isinstance(document, Mapping) or "points" not in document:
        raise InputError(f"{where} is no report of a load test", hint=hint)
    if document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version")
        raise InputError(f"{where} has the schema version {found}, expected {SCHEMA_VERSION}", hint=hint)
    try:
        report: LoadTestReport = _restored(LoadTestReport, document)
    except (KeyError, TypeError, ValueError) as exc:
        raise InputError(f"{where} is a damaged report of a load test: {exc!r}", hint=hint) from exc
    return report


def _restored(kind: Any, value: Any) -> Any:
    """Turn plain JSON into the annotated type: dataclasses, tuples, mappings, optional values."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _restored(next(item for item in arguments if item is not types.NoneType), value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = _hints(kind)
        names = [field.name for field in dataclasses.fields(kind) if field.name in value]
        return kind(**{name: _restored(hints[name], value[name]) for name in names})
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_restored(arguments[0], item) for item in value)
        return tuple(_restored(item, part) for item, part in zip(arguments, value, strict=True))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return {_key(arguments[0], key): _restored(arguments[1], item) for key, item in value.items()}
    return value


def _hints(kind: type) -> dict[str, Any]:
    """Return a dataclass's field types. Those a generic base leaves open as this class fills them in."""
    filled = tuple(argument for base in getattr(kind, "__orig_bases__", ()) for argument in typing.get_args(base))
    hints = typing.get_type_hints(kind)
    return {name: hint[filled] if getattr(hint, "__parameters__", ()) else hint for name, hint in hints.items()}


def _key(kind: Any, key: str) -> Any:
    return int(key) if kind is int else key


_OWN_OPTIONS = {"url", "seed", "workers", "connections", "metrics_url", "command", "start_at", "data"}
_LEAST_OVERLAP = 0.5
_NOTED_OVERLAP = 0.9
_OUTCOMES = ("failed", "overloaded", "over_limit", "unstable", "stable")


def merge_reports(reports: Sequence[LoadTestReport]) -> LoadTestReport:
    """Merge reports of load generators run against one model at the same time.

    The n-th rows belong together. Rates, requests and requests in flight add up, histograms are merged and percentiles
    taken from the merged ones. The worst outcome is the row's. The server's counters and metrics are the first
    report's, since every generator read the same ones. Intervals are taken as if a disturbance of one generator
    disturbed all (their distances add up, weighted by requests): the server is common to all of them.

    Raises:
        InputError: no report; another model, configuration or number of rows; rows without a histogram
            (perf_analyzer's); or rows measured at different times.
    """
    if not reports:
        raise InputError("no report to merge")
    for number, report in enumerate(reports[1:], start=2):
        _check_alike(reports[0], report, number)
    points, notes = [], []
    for column in zip(*(report.points for report in reports), strict=True):
        overlap = _overlap(column)
        if overlap is not None and overlap < _LEAST_OVERLAP:
            raise InputError(
                f"{column[0].label}: the load generators measured at the same time for {overlap:.0%} of the time, "
                f"and their rates only add up when that is at least {_LEAST_OVERLAP:.0%}",
                hint="Start them together: --start-at with the same moment, --duration, and clocks that agree (NTP).",
            )
        merged = _merged(column)
        points.append(merged)
        if overlap is None:
            notes.append(f"{merged.label}: the reports do not say when they measured, so overlap is not checked.")
        elif overlap < _NOTED_OVERLAP:
            notes.append(f"{merged.label}: the generators measured together for {overlap:.0%} of the time only.")
    return dataclasses.replace(
        reports[0],
        points=tuple(points),
        started=min(report.started for report in reports),
        seconds=max(report.seconds for report in reports),
        knee=None,
        knee_rule="",
        command="",
        search=None,
        notes=(
            f"Merged from {len(reports)} load generators; intervals assume that disturbances are common to all.",
            *notes,
            *dict.fromkeys(note for report in reports for note in report.notes),
        ),
    )


def _check_alike(first: LoadTestReport, other: LoadTestReport, number: int) -> None:
    """Refuse reports that cannot be added up.

    Raises:
        InputError: another model, version, configuration or number of load levels.
    """
    hint = "Only reports of one load test, run on several machines at once, can be merged."
    if other.points and other.points == first.points:
        raise InputError(f"report {number} is the first one again", hint="Give each load generator's report once.")
    ours, theirs = ((report.target.model, report.target.version) for report in (first, other))
    if ours != theirs:
        raise InputError(f"report {number} is of {':'.join(theirs)}, the first one of {':'.join(ours)}", hint=hint)
    for name in sorted((set(first.options) | set(other.options)) - _OWN_OPTIONS):
        a, b = first.options.get(name), other.options.get(name)
        if a != b:
            raise InputError(f"report {number} was measured with {name} {b!r}, the first one with {a!r}", hint=hint)
    if len(first.points) != len(other.points):
        raise InputError(
            f"report {number} has {len(other.points)} load levels, the first one {len(first.points)}", hint=hint
        )


def _overlap(points: Sequence[LoadPoint]) -> float | None:
    """Return the share of the longest measured time common to all, or `None` when a row has no times."""
    measured = [point for point in points if point.outcome != "failed"]
    if len(measured) < 2:
        return 1.0
    spans = [
        (point.measured_from, point.measured_from + point.duration_s)
        for point in measured
        if point.measured_from is not None
    ]
    if len(spans) < len(measured):
        return None
    common = min(end for _, end in spans) - max(start for start, _ in spans)
    longest = max(end - start for start, end in spans)
    return max(common, 0.0) / longest if longest > 0 else 0.0


def _merged(points: Sequence[LoadPoint]) -> LoadPoint:
    first = points[0]
    alike = {(point.mode, point.arrival, point.batch_size) for point in points}
    if len(alike) > 1 or any(point.histogram is None and point.outcome != "failed" for point in points):
        raise InputError(f"{first.label}: rows of different modes, or without a histogram, cannot be merged")
    histogram = Histogram.merge(
        Histogram.from_json(dict(point.histogram)) for point in points if point.histogram is not None
    )
    messages: collections.Counter[str] = collections.Counter()
    for point in points:
        messages.update({error.message: error.count for error in point.error_messages})
    worst = min(points, key=lambda point: _OUTCOMES.index(point.outcome))
    latency = Latency.of(histogram)
    throughput = sum(point.throughput_per_s for point in points)
    starts = [point.measured_from for point in points if point.measured_from is not None]
    return dataclasses.replace(
        first,
        level=sum(point.level for point in points),
        outcome=worst.outcome,
        reason=worst.reason,
        client=dataclasses.replace(
            first.client,
            workers=sum(point.client.workers for point in points),
            bottleneck=any(point.client.bottleneck for point in points),
            note="; ".join(dict.fromkeys(point.client.note for point in points if point.client.note)),
        ),
        duration_s=max(point.duration_s for point in points),
        measured_from=min(starts, default=None),
        requests=histogram.count,
        errors=sum(point.errors for point in points),
        error_messages=tuple(ErrorCount(message, count) for message, count in messages.most_common()),
        throughput_per_s=throughput,
        latency=latency,
        intervals=_intervals(points, latency, throughput),
        windows=(),
        series=(),
        curve=tuple((q, value) for q in CURVE_QUANTILES if (value := histogram.quantile_ns(q)) is not None),
        histogram=histogram.to_json(),
        details=_merged_details(points),
    )


def _merged_details(points: Sequence[LoadPoint]) -> dict[str, Detail]:
    """Add up the numbers of sequences and of single responses. Without intervals."""
    merged = {}
    for name in dict.fromkeys(name for point in points for name in point.details):
        parts = [point.details[name] for point in points if name in point.details]
        whole = Histogram.merge(Histogram.from_json(dict(part.histogram)) for part in parts)
        per_s = sum(part.per_s for part in parts)
        merged[name] = Detail(whole.count, per_s, Latency.of(whole), Intervals(), whole.to_json())
    return merged


def _intervals(points: Sequence[LoadPoint], latency: Latency, throughput: float) -> Intervals:
    """Return intervals around the merged numbers, as wide as if the generators' disturbances were the same ones."""
    found: dict[str, Interval | None] = {}
    total = sum(point.requests for point in points)
    for field in dataclasses.fields(Intervals):
        name = field.name
        below = above = 0.0
        known = True
        for point in points:
            interval: Interval | None = getattr(point.intervals, name)
            is_rate = name == "throughput_per_s"
            value = point.throughput_per_s if is_rate else getattr(point.latency, name)
            if interval is None or value is None or not total:
                known = False
                break
            weight = 1.0 if is_rate else point.requests / total
            below += weight * max(value - interval.low, 0.0)
            above += weight * max(interval.high - value, 0.0)
        centre = throughput if name == "throughput_per_s" else getattr(latency, name)
        found[name] = Interval(max(centre - below, 0.0), centre + above) if known and centre is not None else None
    return Intervals(**found)
