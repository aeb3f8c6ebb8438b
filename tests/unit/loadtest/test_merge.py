from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from repo_manager.errors import InputError
from repo_manager.loadtest.merge import merge_reports
from repo_manager.loadtest.result import ClientUse, ErrorCount, Intervals, Latency, LoadPoint, LoadTestReport
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.request_data.tensors import InputFacts
from repo_manager.stats.histogram import Histogram
from repo_manager.stats.intervals import Interval

X = InputFacts("x", "FP32", (-1, 4))
FACTS = ServedModelFacts(
    "grpc://a:1", "grpc", "triton", "2.51.0", "m", "1", "b", 8, (X,), ("y",), False, True, False, False
)
OPTIONS = {"seed": 0, "batch_size": 2, "url": "grpc://a:1"}


def report(values, *, start=1000.0, options=None, **changes) -> LoadTestReport:
    histogram = Histogram.of(values)
    point = LoadPoint(
        "concurrency", 4, "stable", "why", 2, ClientUse("native", workers=2), duration_s=10.0,
        requests=histogram.count, error_messages=(ErrorCount("no", changes.get("errors", 0)),),
        throughput_per_s=histogram.count / 10.0, latency=Latency.of(histogram),
        histogram=histogram.to_json(), measured_from=start,
    )  # fmt: skip
    point = dataclasses.replace(point, **changes)
    return LoadTestReport(FACTS, {**OPTIONS, **(options or {})}, (point,), "now", 12.0, {"cpu": "c"}, notes=("n",))


def test_merged_percentiles_come_from_the_merged_histogram_and_rates_add_up():
    rng = np.random.default_rng(0)
    fast, slow = rng.integers(1_000_000, 2_000_000, 9000), rng.integers(50_000_000, 60_000_000, 1000)
    merged = merge_reports([report(fast), report(slow, outcome="unstable", errors=3, options={"seed": 1, "url": "b"})])
    (point,) = merged.points
    both = np.concatenate([fast, slow])
    assert point.requests == 10_000
    assert point.latency.p50_ns == pytest.approx(np.quantile(both, 0.5), rel=0.01)
    assert point.latency.p99_ns == pytest.approx(np.quantile(both, 0.99), rel=0.01)
    assert point.latency.mean_ns == pytest.approx(both.mean())
    assert point.throughput_per_s == 1000
    assert (point.level, point.outcome, point.errors) == (8, "unstable", 3)
    assert point.client.workers == 4
    assert {e.message: e.count for e in point.error_messages}["no"] == 3
    assert Histogram.from_json(dict(point.histogram)).count == 10_000
    assert "2 load generators" in merged.notes[0]


def test_intervals_are_as_wide_as_if_disturbances_were_common():
    near = Intervals(throughput_per_s=Interval(90.0, 120.0), p50_ns=Interval(9e5, 1.2e6))
    one, other = (report([1_000_000] * 1000, start=1000.0 + shift, intervals=near) for shift in (0.0, 0.1))
    (point,) = merge_reports([one, other]).points
    assert point.intervals.throughput_per_s == Interval(180.0, 240.0)
    assert point.intervals.p50_ns.low == pytest.approx(9e5, rel=1e-3)
    assert point.intervals.p50_ns.high == pytest.approx(1.2e6, rel=1e-3)
    assert point.intervals.p99_ns is None


def test_generators_that_did_not_run_together_are_refused_and_a_little_apart_is_noted():
    with pytest.raises(InputError, match="at the same time for 40%") as caught:
        merge_reports([report([1]), report([2], start=1006.0)])
    assert "--start-at" in caught.value.hint
    assert any("80%" in note for note in merge_reports([report([1]), report([2], start=1002.0)]).notes)
    assert not any("%" in note for note in merge_reports([report([1]), report([2], start=1000.5)]).notes)
    assert any("not checked" in note for note in merge_reports([report([1]), report([2], start=None)]).notes)


def test_a_generator_that_failed_makes_the_row_failed_and_adds_nothing():
    failed = report([], outcome="failed", reason="gone", histogram=None, throughput_per_s=0.0, measured_from=None)
    (point,) = merge_reports([report([5] * 10), failed]).points
    assert (point.outcome, point.reason, point.requests, point.throughput_per_s) == ("failed", "gone", 10, 1.0)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (dataclasses.replace(report([2]), points=()), "0 load levels"),
        (report([2], histogram=None), "without a histogram"),
        (report([2], mode="rate"), "different modes"),
        (report([2], options={"batch_size": 4}), "batch_size 4"),
        (report([2], options={"window_s": 1.0}), "window_s"),
        (dataclasses.replace(report([2]), target=dataclasses.replace(FACTS, version="2")), "m:2"),
        (report([1]), "first one again"),
    ],
)
def test_reports_that_do_not_belong_together_are_refused(other, words):
    with pytest.raises(InputError, match=words):
        merge_reports([report([1]), other])


def test_nothing_to_merge():
    with pytest.raises(InputError, match="no report"):
        merge_reports([])
