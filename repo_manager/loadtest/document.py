"""Reads a load test's JSON back, and merges the reports of several load generators."""

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
from repo_manager.loadtest.histogram import Histogram
from repo_manager.loadtest.result import (
    CURVE_QUANTILES,
    SCHEMA_VERSION,
    ErrorCount,
    Intervals,
    Latency,
    LoadPoint,
    LoadTestReport,
)

__all__ = ["merge_reports", "read_report", "report_from_json"]


def read_report(path: Path) -> LoadTestReport:
    """Read the JSON that `loadtest --json` or `--report` wrote.

    Raises:
        InputError: unreadable, no such report, or of a schema that is not understood.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise InputError(f"{path} cannot be read as a load test's report: {exc}") from exc
    return report_from_json(document, where=str(path))


def report_from_json(document: Any, *, where: str = "the report") -> LoadTestReport:
    """Return the report that `as_json` made `document` of; unknown fields are left out.

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
        hints = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind) if field.name in value]
        return kind(**{name: _restored(hints[name], value[name]) for name in names})
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_restored(arguments[0], item) for item in value)
        return tuple(_restored(item, part) for item, part in zip(arguments, value, strict=True))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return {_key(arguments[0], key): _restored(arguments[1], item) for key, item in value.items()}
    return value


def _key(kind: Any, key: str) -> Any:
    return int(key) if kind is int else key


def merge_reports(reports: Sequence[LoadTestReport]) -> LoadTestReport:
    """Merge reports of load generators that loaded one model at the same time.

    The n-th rows belong together. Rates, requests and requests in flight add up, histograms are merged and percentiles
    taken from the merged ones; the worst outcome is the row's. Intervals are not carried over, and the server's
    counters are the first report's, since every generator read the same ones.

    Raises:
        InputError: no report, different numbers of rows or modes, or rows without a histogram (perf_analyzer's).
    """
    if not reports:
        raise InputError("no report to merge")
    if len({len(report.points) for report in reports}) != 1:
        raise InputError("the reports have different numbers of load levels and cannot be merged")
    columns = zip(*(report.points for report in reports), strict=True)
    return dataclasses.replace(
        reports[0],
        points=tuple(_merged(column) for column in columns),
        knee=None,
        knee_rule="",
        notes=(f"Merged from {len(reports)} load generators.", *dict.fromkeys(n for r in reports for n in r.notes)),
    )


def _merged(points: Sequence[LoadPoint]) -> LoadPoint:
    first = points[0]
    if any(point.mode != first.mode or point.histogram is None for point in points):
        raise InputError(f"{first.label}: rows of different modes, or without a histogram, cannot be merged")
    histogram = Histogram.merge(Histogram.from_json(dict(point.histogram or {})) for point in points)
    messages: collections.Counter[str] = collections.Counter()
    for point in points:
        messages.update({error.message: error.count for error in point.error_messages})
    order = ("failed", "over_limit", "unstable", "stable")
    worst = min(points, key=lambda point: order.index(point.outcome))
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
        requests=histogram.count,
        errors=sum(point.errors for point in points),
        error_messages=tuple(ErrorCount(message, count) for message, count in messages.most_common()),
        throughput_per_s=sum(point.throughput_per_s for point in points),
        latency=Latency.of(histogram),
        intervals=Intervals(),
        windows=(),
        series=(),
        curve=tuple((q, value) for q in CURVE_QUANTILES if (value := histogram.quantile_ns(q)) is not None),
        histogram=histogram.to_json(),
    )
