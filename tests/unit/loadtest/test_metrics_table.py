"""A number is written once, in the table; everything else iterates it."""

from __future__ import annotations

import dataclasses

import pytest

from repo_manager.errors import UsageError
from repo_manager.loadtest.judge import parse_slo
from repo_manager.loadtest.metrics import METRICS, metric_of, metrics_in
from repo_manager.loadtest.result import Intervals, Latency
from repo_manager.stats.histogram import Histogram
from repo_manager.stats.quantiles import PERCENTILES


def test_names_are_unique_and_found() -> None:
    names = [name for metric in METRICS for name in {metric.key, metric.title, *metric.aliases}]
    assert len(names) == len(set(names))
    assert all(metric_of(metric.title) is metric_of(metric.key) is metric for metric in METRICS)
    with pytest.raises(UsageError, match=r"no metric 'p1', expected one of throughput, .*, p99\.9"):
        metric_of("p1")


def test_every_gate_of_the_table_is_read_in_each_of_its_units() -> None:
    for metric in (metric for metric in METRICS if metric.is_gate):
        for unit, size in metric.unit.sizes.items():
            assert parse_slo(f"{metric.key}<2{unit}").limit == pytest.approx(2 * size)


def test_a_percentile_is_a_field_of_the_latencies_and_of_their_intervals() -> None:
    latency = Latency.of(Histogram.of(list(range(1, 100_001))))
    fields = {field.name for field in dataclasses.fields(Intervals)}
    for row in PERCENTILES:
        assert getattr(latency, row.field) == pytest.approx(1e5 * row.share, rel=0.01)
        assert row.field in fields
        assert metric_of(row.key).places == row.places


def test_the_places_hold_what_they_held() -> None:
    percentiles = ["p50", "p90", "p95", "p99"]
    keys = {place: [metric.key for metric in metrics_in(place)] for place in ("terminal", "markdown", "baseline")}
    assert keys["terminal"] == keys["markdown"] == ["throughput", *percentiles]
    assert keys["baseline"] == ["throughput", "p50", "p99"]
    compared = [metric.title for metric in metrics_in("compare")]
    assert compared == ["throughput", "inferences per joule", "mean latency", "p50 latency", "p99 latency"]
