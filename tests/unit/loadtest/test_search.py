"""The search for the largest load within gates, on simulated servers with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from repo_manager.errors import UsageError
from repo_manager.gates import Outcome
from repo_manager.loadtest.derive import intervals_of, outcome_of
from repo_manager.loadtest.gpu import MetricsSource
from repo_manager.loadtest.judge import parse_slo
from repo_manager.loadtest.measure import EarlyStop, Level, Measurement
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.result import ClientUse, Latency, LoadPoint, SearchStep, Window
from repo_manager.loadtest.search import (
    LoadSpace,
    check_gates,
    conclude,
    early_stop,
    next_level,
    search_load,
    search_verdict,
)
from repo_manager.loadtest.served_model import ModelStatistics
from repo_manager.loadtest.worker.recorder import Slice
from repo_manager.stats.histogram import Histogram

GATES = (parse_slo("p99<20ms"),)


def options(**changes):
    return LoadTestOptions("grpc://a:1", "m", **{"until": GATES, "max_windows": 10, **changes})


def walk(space, decision):
    """Search with the true decision of each level given."""
    steps = []
    while (size := next_level(space, steps)) is not None:
        steps.append(SearchStep(size, space.level(size).label, decision(size), "", 1.0))
        assert len(steps) < 40
    return conclude(space, GATES, steps)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 16, 17, 100, 333, 1000])
@pytest.mark.parametrize("start", [1, 8, 300])
def test_the_largest_concurrency_is_found_from_any_start(limit, start):
    space = LoadSpace.of(options(concurrency=(start,)))
    found = walk(space, lambda size: "holds" if size <= limit else "fails")
    assert found.outcome == "pass"
    assert found.holds <= limit < found.fails
    assert found.fails - found.holds == 1 or found.fails <= found.holds * 1.05
    assert len(found.steps) <= 2 * math.log2(1024) + 2


@pytest.mark.parametrize("limit", [7.0, 95.0, 1234.5, 80_000.0])
def test_the_largest_rate_is_found_to_within_the_resolution(limit):
    found = walk(LoadSpace.of(options(rate=(100.0,))), lambda size: "holds" if size <= limit else "fails")
    assert found.outcome == "pass"
    assert found.holds <= limit < found.fails <= found.holds * 1.05


def test_several_levels_bound_the_search():
    space = LoadSpace.of(options(concurrency=(4, 8, 16)))
    assert (space.start, space.lowest, space.highest) == (4, 4, 16)
    assert walk(space, lambda size: "fails").outcome == "fail"
    found = walk(space, lambda size: "holds")
    assert (found.outcome, found.holds, found.fails) == ("pass", 16, None)
    assert "the largest load to be tried" in found.reason


def test_undecided_levels_narrow_both_sides_and_leave_the_search_open():
    def decision(size):
        return "holds" if size <= 90 else "fails" if size >= 120 else "undecided"

    found = walk(LoadSpace.of(options(rate=(10.0,))), decision)
    assert found.outcome == "inconclusive"
    assert 85 < found.holds <= 90
    assert 120 <= found.fails < 126
    assert "undecided" in found.reason


def test_an_undecided_level_between_neighbours_does_not_matter():
    found = walk(LoadSpace.of(options(rate=(100.0,))), lambda size: "holds" if size < 101 else "fails")
    assert found.outcome == "pass"
    decisions = {step.level: step.decision for step in found.steps}
    steps = [SearchStep(100.0, "", "holds", "", 1), SearchStep(102.0, "", "undecided", "", 1)]
    steps.append(SearchStep(104.0, "", "fails", "", 1))
    assert conclude(LoadSpace.of(options(rate=(100.0,))), GATES, steps).outcome == "pass"
    assert decisions


def test_nothing_is_shown_when_every_level_is_undecided():
    found = walk(LoadSpace.of(options()), lambda size: "undecided")
    assert (found.outcome, found.holds, found.steps[-1].level) == ("inconclusive", None, 1024)


def test_a_level_with_too_few_requests_sends_the_search_upwards():
    def decision(size):
        return "undecided" if size < 400 else "holds" if size < 1500 else "fails"

    found = walk(LoadSpace.of(options(rate=(50.0,))), decision)
    assert found.outcome == "pass"
    assert 1400 < found.holds < 1500 <= found.fails


def test_below_what_fails_a_few_undecided_levels_end_the_search():
    found = walk(LoadSpace.of(options(rate=(1e5,))), lambda size: "fails" if size > 5e4 else "undecided")
    assert found.outcome == "inconclusive"
    assert len(found.steps) < 6


def test_no_rate_is_tried_that_a_level_cannot_decide():
    assert LoadSpace.of(options(rate=(100.0,))).lowest == 5.0  # 50 requests in 10 s


def test_a_failure_below_what_holds_is_no_answer():
    space = LoadSpace.of(options())
    steps = [SearchStep(8, "concurrency 8", "fails", "", 1), SearchStep(16, "concurrency 16", "holds", "", 1)]
    steps.append(SearchStep(17, "concurrency 17", "fails", "", 1))
    found = conclude(space, GATES, steps)
    assert (found.outcome, "not steady" in found.reason) == ("inconclusive", True)


@pytest.mark.parametrize("text", ["throughput>500", "p99>20ms", "p99<20ms@8", "energy<1J", "throughput<5"])
def test_a_gate_that_load_does_not_make_harder_is_refused(text):
    with pytest.raises(UsageError):
        check_gates([parse_slo(text)])


@pytest.mark.parametrize(
    "changes",
    [
        {"concurrency": (1,), "rate": (5.0,)},
        {"until_saturation": True},
        {"rate": (5.0,), "arrival": "ramp"},
        {"request_count": 5},
        {"resolution": 0.0},
    ],
)
def test_options_that_contradict_a_search_are_refused(changes):
    with pytest.raises(UsageError):
        options(**changes)


class Queue:
    """A server with one place: of `capacity` requests a second, at a share u of it the mean latency is 1 / (1 - u)."""

    def __init__(self, capacity, seed):
        self.capacity = capacity
        self.rng = np.random.default_rng(seed)
        self.windows = []

    def true_p99_ns(self, rate):
        return math.log(100) / (self.capacity - rate) * 1e9 if rate < self.capacity else math.inf

    def measure(self, made):
        def run(level: Level, stop: EarlyStop) -> LoadPoint:
            slices = []
            for window in range(1, 11):
                for _ in range(10):
                    mean = 1e9 / max(self.capacity - level.level, 0.2)
                    drawn = self.rng.exponential(mean, self.rng.poisson(level.level / 10))
                    slices.append(
                        Slice(len(slices), 100_000_000, Histogram.of(np.maximum(drawn, 1e3).astype(int).tolist()))
                    )
                is_clear = stop is None or stop.may_decide([self.window(slices[-10:])])
                if (
                    stop is not None
                    and window in stop.after_windows
                    and is_clear
                    and stop.is_enough(self.point(level, slices, made))
                ):
                    break
            self.windows.append(window)
            return self.point(level, slices, made)

        return run

    def window(self, slices):
        whole = Slice.merge(slices).latencies
        return Window(0.0, 1.0, whole.count, 0, whole.count, whole.mean_ns, 0, whole.quantile_ns(0.99), False)

    def point(self, level, slices, made):
        whole = Slice.merge(slices).latencies
        return LoadPoint(
            "rate", level.level, *outcome_of([], slices, made), 1, ClientUse("native"), duration_s=len(slices) / 10,
            requests=whole.count, latency=Latency.of(whole), intervals=intervals_of(slices, batch_size=1),
        )  # fmt: skip


def test_on_a_noisy_server_the_bracket_contains_the_truth_and_clear_levels_end_early():
    missed = 0
    for seed in range(3):
        made = options(rate=(100.0,))
        server = Queue(1000.0, seed)
        space = LoadSpace.of(made)
        steps = [step for _, step in search_load(space, made, server.measure(made))]
        found = conclude(space, GATES, steps)
        limit = 1000 - math.log(100) / 0.02  # where p99 is 20 ms
        missed += not (found.holds or 0) <= limit <= (found.fails or math.inf)
        clear = [n for n, step in zip(server.windows, steps, strict=True) if step.level > 1.5 * limit]
        assert all(windows <= 3 for windows in clear), (clear, steps)
    assert missed <= 1


def test_the_load_that_is_found_is_measured_for_its_whole_time():
    """At 8, the first seconds hold and the whole time does not: a longer look finds a lower load."""
    asked = []

    def measure(level, stop):
        asked.append((level.level, stop is None))
        limit_ns = 5 if level.level < 8 or (level.level == 8 and stop is not None) else 30_000_000
        seconds = 2.0 if stop is not None else 10.0
        latency = Latency(p99_ns=limit_ns)
        return LoadPoint(
            "concurrency", level.level, "stable", "", 1, ClientUse("native"), duration_s=seconds, latency=latency
        )

    made = options()
    steps = [step for _, step in search_load(LoadSpace.of(made), made, measure)]
    assert asked[-4:] == [(8, True), (6, False), (7, False), (7, True)]
    found = conclude(LoadSpace.of(made), GATES, steps)
    assert (found.outcome, found.holds, found.fails) == ("pass", 7, 8)


def test_the_last_decision_of_a_level_measured_again_counts():
    space = LoadSpace("rate", 100.0, 100.0, 115.0)
    steps = [
        SearchStep(100.0, "rate 100/s", "holds", "p99 5 ms", 2.0),
        SearchStep(100.0, "rate 100/s", "undecided", "p99 19 ms [5, 40]", 10.0),
        SearchStep(115.0, "rate 115/s", "undecided", "p99 25 ms [8, 60]", 10.0),
    ]
    found = conclude(space, GATES, steps)
    assert found.reason == "no load is shown to hold: rate 100/s is undecided (p99 19 ms [5, 40])"
    assert next_level(space, steps) is None


def test_a_server_without_answers_ends_the_search():
    def measure(level, stop):
        outcome = "failed" if level.level > 2 else "stable"
        return LoadPoint(
            "concurrency", level.level, outcome, "it died", 1, ClientUse("native"), latency=Latency(p99_ns=5)
        )

    made = options()
    found = [point.level for point, _ in search_load(LoadSpace.of(made), made, measure)]
    assert found == [1, 2, 4]


def test_the_verdict_of_a_search_names_the_levels_that_hold():
    found = walk(LoadSpace.of(options()), lambda size: "holds" if size <= 3 else "fails")
    points = [LoadPoint("concurrency", size, "stable", "", 1, ClientUse("native")) for size in (1, 2, 3, 4)]
    verdict = search_verdict(found, points)
    assert (verdict.outcome, verdict.largest_holding) == (Outcome.PASS, "concurrency 3")


class Counters:
    def statistics(self):
        times = dict.fromkeys(("queue", "compute_input", "compute_infer", "compute_output"), 1000)
        return ModelStatistics(1, 1, 1, 0, 0, times, {1: 1})


@pytest.mark.parametrize(("latency_ns", "windows"), [(1_000_000, 2), (40_000_000, 2)])
def test_a_measurement_ends_when_its_interval_decides(latency_ns, windows):
    made = options(duration_s=10.0, warmup_s=0.0, concurrency=(1,))
    metrics = MetricsSource("http://127.0.0.1:9/metrics")
    measurement = Measurement(Level("concurrency", 1, "closed loop"), made, Counters(), metrics, None, early_stop(made))
    for index in range(100):
        measurement.take(Slice(index, 100_000_000, Histogram.of([latency_ns] * 20)), 1)
        if measurement.finished:
            break
    assert measurement.point().duration_s == pytest.approx(windows)


def test_a_measurement_near_the_limit_takes_its_whole_time():
    made = options(duration_s=3.0, warmup_s=0.0, concurrency=(1,))
    metrics = MetricsSource("http://127.0.0.1:9/metrics")
    measurement = Measurement(Level("concurrency", 1, "closed loop"), made, Counters(), metrics, None, early_stop(made))
    rng = np.random.default_rng(0)
    for index in range(30):
        assert not measurement.finished
        values = rng.exponential(20e6 / math.log(100), 20).astype(int).tolist()
        measurement.take(Slice(index, 100_000_000, Histogram.of(values)), 1)
    assert measurement.finished
