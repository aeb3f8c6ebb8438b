"""An open loop above the server's capacity: the level is overloaded, and no limit on its latency holds."""

from __future__ import annotations

import numpy as np
import pytest

from repo_manager.gates import Outcome
from repo_manager.loadtest.derive import client_use, growing_queue
from repo_manager.loadtest.judge import judge, parse_slo
from repo_manager.loadtest.result import ClientUse, Latency, LoadPoint, LoadTestReport
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.loadtest.worker.recorder import Slice
from repo_manager.stats.histogram import Histogram

SECONDS, SLICE_NS = 6.0, 100_000_000


def slices(rate, capacity, *, client=np.inf, cap=10**9, poisson=False, seed=0):
    """Simulate a server of `capacity` a second and a client of at most `client` a second with `cap` requests open."""
    rng = np.random.default_rng(seed)
    gaps = (
        rng.exponential(1 / rate, round(rate * SECONDS * 1.2)) if poisson else np.full(round(rate * SECONDS), 1 / rate)
    )
    due = np.cumsum(gaps)
    sent, ends = np.empty_like(due), np.empty_like(due)
    for place, moment in enumerate(due):
        free = ends[place - cap] if place >= cap else 0.0
        after = sent[place - 1] + 1 / client if place else 0.0
        sent[place] = max(moment, free, after)
        ends[place] = max(sent[place], ends[place - 1] if place else 0.0) + 1 / capacity
    made = []
    for index in range(round(SECONDS * 1e9 / SLICE_NS)):
        low, high = index * SLICE_NS / 1e9, (index + 1) * SLICE_NS / 1e9
        inside = (ends >= low) & (ends < high)
        latencies = Histogram.of(((ends - due)[inside] * 1e9).astype(np.int64))
        made.append(Slice(index, SLICE_NS, latencies, sent=int(np.sum((sent >= low) & (sent < high)))))
    return made


def found(rate, capacity, *, limit=10**9, **changes):
    made = slices(rate, capacity, **changes)
    return growing_queue(made, made[5:], rate, limit)


@pytest.mark.parametrize("poisson", [False, True])
@pytest.mark.parametrize(("rate", "capacity"), [(20, 10), (200, 150), (2000, 1800), (100, 5)])
def test_a_rate_above_the_capacity_is_seen_and_the_capacity_named(rate, capacity, poisson):
    reason = found(rate, capacity, poisson=poisson)
    assert reason is not None
    named = float(reason.rpartition("about ")[2].removesuffix("/s"))
    assert named == pytest.approx(capacity, rel=0.1)


def test_requests_that_wait_for_a_free_place_count_as_the_servers():
    assert found(2000, 500, cap=256, limit=256) is not None


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("rate", "capacity"), [(20, 40), (200, 300), (5, 50)])
def test_a_server_that_keeps_up_is_not_overloaded(rate, capacity, seed):
    assert found(rate, capacity, poisson=True, seed=seed) is None


def test_a_client_that_is_too_slow_is_not_the_servers_fault():
    assert found(200, 1000, client=100) is None


def test_no_answer_at_all_and_too_few_slices_decide_nothing():
    made = slices(20, 10)
    assert growing_queue(made, made[:2], 20, 4096) is None
    empty = [Slice(index, SLICE_NS, Histogram.empty(), sent=2) for index in range(30)]
    assert growing_queue(empty, empty, 20, 4096) is None


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("p99<500ms", Outcome.FAIL),
        ("mean<1s", Outcome.FAIL),
        ("p99<3600s", Outcome.FAIL),
        ("throughput>15", Outcome.FAIL),
        ("throughput>5", Outcome.PASS),
    ],
)
def test_gates_of_an_overloaded_level_are_decided_although_the_client_sent_late(text, outcome):
    facts = ServedModelFacts("grpc://a:1", "grpc", "t", "1", "m", "1", "b", 0, (), (), False, False, False, False)
    late = ClientUse("native", bottleneck=True, late_share=0.4, note="42 % late")
    level = LoadPoint(
        "rate", 20.0, "overloaded", "the queue grows: ...", 1, late, duration_s=6.0, requests=60, throughput_per_s=10.0,
        latency=Latency(mean_ns=1.5e9, p99_ns=3 * 10**9),
    )  # fmt: skip
    (result,) = judge(LoadTestReport(facts, {}, (level,), "now", 6.0, {}), [parse_slo(text)]).results
    assert result.outcome is outcome
    assert ("the queue grows" in result.reason) is text.startswith(("p99", "mean"))


@pytest.mark.parametrize(("late", "bottleneck"), [(2, False), (60, True)])
def test_a_few_late_sends_of_a_low_rate_are_no_bottleneck(late, bottleneck):
    whole = Slice(0, SLICE_NS, Histogram.of(np.full(50, 10**6)), sent=50 if late < 50 else 5000, late=late)
    assert client_use(whole, 10.0, 1, is_open=True).bottleneck is bottleneck


@pytest.mark.parametrize(("cpu_s", "is_late"), [(1, True), (10, False)])
def test_late_sends_of_a_client_with_time_left_are_named_so(cpu_s, is_late):
    whole = Slice(0, SLICE_NS, Histogram.of(np.full(50, 10**6)), sent=50, late=40, cpu_ns=cpu_s * 10**9)
    used = client_use(whole, 10.0, 1, is_open=True)
    assert (used.bottleneck, used.is_late) == (True, is_late)
