from __future__ import annotations

import dataclasses

import pytest

from repo_manager.errors import UsageError
from repo_manager.gates import Outcome, combine_verdicts
from repo_manager.loadtest.judge import judge, parse_slo
from repo_manager.loadtest.result import ClientUse, GpuUse, Intervals, Latency, LoadPoint, LoadTestReport, Window
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.stats.intervals import Interval

FACTS = ServedModelFacts(
    "grpc://a:1", "grpc", "triton", "2.51.0", "m", "1", "python", 0, (), (), False, False, False, False
)


def point(p99_ms=10.0, spread_ms=1.0, level=8.0, **changes):
    made = LoadPoint(
        "concurrency", level, "stable", "", 1, ClientUse("native"),
        duration_s=3.0, requests=10_000, throughput_per_s=600.0,
        latency=Latency(p99_ns=round(p99_ms * 1e6)),
        intervals=Intervals(
            throughput_per_s=Interval(590, 610), p99_ns=Interval((p99_ms - spread_ms) * 1e6, (p99_ms + spread_ms) * 1e6)
        ),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def report(*points):
    return LoadTestReport(FACTS, {}, points, "now", 1.0, {})


@pytest.mark.parametrize(
    ("text", "metric", "below", "limit", "level"),
    [
        ("p99<20ms", "p99", True, 20e6, None),
        (" P50 <= 1.5 us ", "p50", True, 1500, None),
        ("p99.9<1s", "p99.9", True, 1e9, None),
        ("throughput>500", "throughput", False, 500, None),
        ("throughput>=2k/s", "throughput", False, 2000, None),
        ("errors<0.1%", "errors", True, 0.001, None),
        ("energy<50mJ", "energy", True, 0.05, None),
        ("mean<3ns@16", "mean", True, 3, 16),
    ],
)
def test_parsing(text, metric, below, limit, level):
    gate = parse_slo(text)
    assert (gate.metric, gate.below, gate.level) == (metric, below, level)
    assert gate.limit == pytest.approx(limit)


@pytest.mark.parametrize(
    "text", ["", "p99", "p99<", "p99<20", "p98<20ms", "throughput>5ms", "errors<1J", "p99=20ms", "p99<-1ms"]
)
def test_what_is_no_objective(text):
    with pytest.raises(UsageError):
        parse_slo(text)


@pytest.mark.parametrize(("limit", "outcome"), [("12ms", "pass"), ("8ms", "fail"), ("10.5ms", "inconclusive")])
def test_an_interval_decides(limit, outcome):
    assert judge(report(point()), [parse_slo(f"p99<{limit}")]).outcome.value == outcome


def test_an_inconclusive_gate_says_how_long_it_would_take():
    (result,) = judge(report(point()), [parse_slo("p99<10.5ms")]).results
    assert result.needed_s == pytest.approx(3.0 * (1.0 / 0.5) ** 2)


@pytest.mark.parametrize(("limit", "outcome"), [("580", "pass"), ("620", "fail"), ("600", "inconclusive")])
def test_throughput_has_to_be_above(limit, outcome):
    assert judge(report(point()), [parse_slo(f"throughput>{limit}")]).outcome.value == outcome


def test_errors_use_the_interval_of_a_share():
    gate = parse_slo("errors<0.1%")
    assert judge(report(point()), [gate]).outcome is Outcome.PASS
    assert judge(report(point(requests=100)), [gate]).outcome is Outcome.INCONCLUSIVE
    assert judge(report(point(errors=100)), [gate]).outcome is Outcome.FAIL
    assert judge(report(point(outcome="failed", requests=0, errors=50)), [gate]).outcome is Outcome.FAIL


def test_a_failed_level_fails_its_gates_and_a_missing_number_decides_nothing():
    failed = point(outcome="failed", requests=0, latency=Latency(), intervals=Intervals())
    assert judge(report(failed), [parse_slo("p99<1s")]).outcome is Outcome.FAIL
    assert judge(report(point()), [parse_slo("energy<1J")]).outcome is Outcome.INCONCLUSIVE
    assert (
        judge(report(point(gpu=GpuUse(energy_per_inference_j=0.0))), [parse_slo("energy<1J")]).outcome is Outcome.PASS
    )


def test_a_client_that_was_the_bottleneck_cannot_fail_the_server():
    busy = ClientUse("native", bottleneck=True, note="busy")
    assert judge(report(point(client=busy)), [parse_slo("p99<8ms")]).outcome is Outcome.INCONCLUSIVE
    assert judge(report(point(client=busy)), [parse_slo("p99<12ms")]).outcome is Outcome.PASS


def test_late_sends_do_not_excuse_a_latency_far_above_its_limit():
    late = ClientUse("native", cpu_share=0.1, max_late_ns=10_000_000, bottleneck=True, note="late")
    gate = parse_slo("p99<500ms")
    assert judge(report(point(894, client=late)), [gate]).outcome is Outcome.FAIL
    assert judge(report(point(509, client=late)), [gate]).outcome is Outcome.INCONCLUSIVE
    busy = dataclasses.replace(late, cpu_share=0.95)
    assert judge(report(point(894, client=busy)), [gate]).outcome is Outcome.INCONCLUSIVE


def test_several_levels_and_gates():
    sweep = report(point(5, level=1), point(10, level=8), point(30, level=16))
    gates = [parse_slo("p99<20ms"), parse_slo("throughput>500")]
    verdict = judge(sweep, gates)
    assert verdict.outcome is Outcome.FAIL
    assert verdict.largest_holding == "concurrency 8"
    assert len(verdict.results) == 6
    assert judge(sweep, gates, over="some").outcome is Outcome.PASS
    assert judge(sweep, [parse_slo("p99<20ms@8")]).outcome is Outcome.PASS
    with pytest.raises(UsageError, match="not measured"):
        judge(sweep, [parse_slo("p99<20ms@3")])


def window(throughput_per_s, used=True):
    return Window(0.0, 1.0, 100, 0, throughput_per_s, 1e6, 1_000_000, 2_000_000, used)


@pytest.mark.parametrize(
    ("throughputs", "outcome"),
    [
        ((400.0, 900.0, 450.0), Outcome.INCONCLUSIVE),
        ((700.0, 900.0, 2000.0), Outcome.PASS),
        ((1.0, 90.0), Outcome.FAIL),
    ],
)
def test_an_unstable_level_without_an_interval_is_decided_when_every_window_agrees(throughputs, outcome):
    windows = (window(10_000.0, used=False), *map(window, throughputs))
    mean = sum(throughputs) / len(throughputs)
    unstable = point(outcome="unstable", windows=windows, intervals=Intervals(), throughput_per_s=mean)
    assert judge(report(unstable), [parse_slo("throughput>500")]).outcome is outcome


def test_without_an_error_the_time_that_would_decide_grows_with_the_interval_itself():
    calm = dataclasses.replace(point(), requests=100, errors=0, duration_s=2.0)
    (result,) = judge(report(calm), [parse_slo("errors<1%")]).results
    assert result.outcome.value == "inconclusive"
    assert result.needed_s == pytest.approx(2.0 * result.interval.high / 0.01)
    assert result.why.endswith(f"; about {result.needed_s:.0f} s of measuring would decide")


def test_several_verdicts_are_as_good_as_the_worst():
    both = report(point(), point(p99_ms=30.0, level=16.0))
    loose, strict = judge(both, [parse_slo("p99<40ms")]), judge(both, [parse_slo("p99<20ms")])
    assert combine_verdicts([]) is combine_verdicts([None]) is None
    whole = combine_verdicts([loose, None, strict])
    assert whole.outcome is Outcome.FAIL
    assert whole.results == (*loose.results, *strict.results)
    assert whole.holding == strict.holding != loose.holding
