"""The one table of a load test's numbers: gates, baseline, comparison and every report iterate it.

A percentile is a row in `stats/quantiles.py`, any other number a row here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from repo_manager.errors import UsageError
from repo_manager.gates import ENERGY, RATE, RATIO, SHARE, TIME, Unit
from repo_manager.loadtest.result import LoadPoint, Window
from repo_manager.stats.histogram import Histogram
from repo_manager.stats.intervals import Interval, wilson_interval
from repo_manager.stats.quantiles import PERCENTILES, Percentile, Place

__all__ = ["METRICS", "Block", "Export", "Metric", "metric_of", "metrics_in"]


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """One measured block of a comparison, or all of one side.

    Attributes:
        latencies: of the successful requests, in nanoseconds. Failed ones are in `errors` only.
        energy_j: joules used. `None` when nothing reports it.
    """

    latencies: Histogram
    seconds: float
    errors: int
    energy_j: float | None
    inferences: int


@dataclasses.dataclass(frozen=True)
class Export:
    """How a number is exported to OpenMetrics.

    Attributes:
        family: of the metric, without the common prefix.
        scale: factor from the unit of the number to the family's.
        quantile: value of the label `quantile`. Empty: no such label.
    """

    family: str
    scale: float = 1.0
    quantile: str = ""


def _nothing(_: object) -> None:
    """Return `None`: a number a point, a window or a block does not have."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number of a load level.

    Attributes:
        key: name in gates, and head of a column.
        title: name in comparisons: `p99 latency`. `metric_of` takes it, too.
        unit: unit of the number from `get`.
        get: the number of a level. `None` when it was not reported.
        interval: its 95 % interval. `None` without one.
        lower_is_better: whether less of it is better.
        places: where it is a column, and where it is compared.
        of_window: the number of one measuring window.
        of_block: the number of one block of a comparison, above 0.
        aliases: further names a gate may use: `avg` for `mean`.
        is_gate: whether a gate may name it.
        is_latency: whether its gates are limits in the chart of latencies.
        export: to OpenMetrics. `None` is not exported.
    """

    key: str
    title: str
    unit: Unit
    get: Callable[[LoadPoint], float | None]
    interval: Callable[[LoadPoint], Interval | None] = _nothing
    lower_is_better: bool = True
    places: frozenset[Place] = frozenset()
    of_window: Callable[[Window], float | None] = _nothing
    of_block: Callable[[Block], float | None] = _nothing
    aliases: tuple[str, ...] = ()
    is_gate: bool = True
    is_latency: bool = False
    export: Export | None = None


def _percentile(row: Percentile) -> Metric:
    def get(point: LoadPoint) -> float | None:
        value: int | None = getattr(point.latency, row.field)
        return value

    def interval(point: LoadPoint) -> Interval | None:
        value: Interval | None = getattr(point.intervals, row.field)
        return value

    def of_window(window: Window) -> float | None:
        value: int | None = getattr(window, row.field, None)
        return value

    return Metric(
        row.key,
        f"{row.key} latency",
        TIME,
        get,
        interval,
        places=row.places,
        of_window=of_window,
        of_block=lambda block: block.latencies.quantile_ns(row.share),
        is_latency=True,
        export=Export("latency_seconds", 1e-9, f"{row.share:g}"),
    )


def _detail_metrics(name: str, title: str) -> tuple[Metric, ...]:
    """Return the gates on numbers other than whole requests: `first.p99<50ms`."""

    def metric(key: str, field: str) -> Metric:
        def get(point: LoadPoint) -> float | None:
            detail = point.details.get(name)
            value: float | None = None if detail is None else getattr(detail.latency, field)
            return value

        def interval(point: LoadPoint) -> Interval | None:
            detail = point.details.get(name)
            value: Interval | None = None if detail is None else getattr(detail.intervals, field, None)
            return value

        return Metric(f"{name}.{key}", f"{key} {title}", TIME, get, interval, is_latency=True)

    fields = [(percentile.key, percentile.field) for percentile in PERCENTILES]
    return tuple(metric(key, field) for key, field in (("mean", "mean_ns"), *fields, ("max", "max_ns")))


METRICS = (
    Metric(
        "throughput",
        "throughput",
        RATE,
        lambda point: point.throughput_per_s,
        lambda point: point.intervals.throughput_per_s,
        lower_is_better=False,
        places=frozenset({"terminal", "markdown", "html", "baseline", "compare"}),
        of_window=lambda window: window.throughput_per_s,
        of_block=lambda block: block.inferences / block.seconds,
        export=Export("throughput_per_second"),
    ),
    Metric(
        "inferences per joule",
        "inferences per joule",
        RATIO,
        _nothing,
        lower_is_better=False,
        places=frozenset({"compare"}),
        of_block=lambda block: block.inferences / block.energy_j if block.energy_j else None,
        is_gate=False,
    ),
    Metric(
        "mean",
        "mean latency",
        TIME,
        lambda point: point.latency.mean_ns,
        lambda point: point.intervals.mean_ns,
        places=frozenset({"compare"}),
        of_window=lambda window: window.mean_ns,
        of_block=lambda block: block.latencies.mean_ns,
        aliases=("avg",),
        is_latency=True,
    ),
    *map(_percentile, PERCENTILES),
    Metric("max", "max latency", TIME, lambda point: point.latency.max_ns, places=frozenset({"html"}), is_latency=True),
    Metric(
        "errors",
        "error share",
        SHARE,
        lambda point: point.error_share,
        lambda point: wilson_interval(point.errors, point.requests + point.errors),
    ),
    Metric(
        "energy",
        "energy per inference",
        ENERGY,
        lambda point: point.gpu.energy_per_inference_j,
        export=Export("energy_joules_per_inference"),
    ),
    *_detail_metrics("first", "time to the first response"),
    *_detail_metrics("between", "time between responses"),
    *_detail_metrics("sequence", "time of a sequence"),
    Metric("responses", "responses", RATE, lambda point: point.responses_per_s, lower_is_better=False),
    Metric("queue", "time in the queue", TIME, lambda point: None if point.server is None else point.server.queue_ns),
)
_BY_NAME = {name: metric for metric in METRICS for name in (metric.key, metric.title, *metric.aliases)}


def metric_of(name: str) -> Metric:
    """Return the metric with a key, title or alias.

    Raises:
        UsageError: there is none.
    """
    if name not in _BY_NAME:
        raise UsageError(f"there is no metric {name!r}, expected one of {', '.join(metric.key for metric in METRICS)}")
    return _BY_NAME[name]


def metrics_in(place: Place) -> tuple[Metric, ...]:
    """Return the metrics with a place, in the order of the table."""
    return tuple(metric for metric in METRICS if place in metric.places)
