"""One language for the gates of load tests and of trials."""

from __future__ import annotations

import pytest

from repo_manager.errors import UsageError
from repo_manager.gates import Gate, Outcome, decide, growth_needed, worst
from repo_manager.loadtest.judge import parse_slo
from repo_manager.rollout.options import parse_gates
from repo_manager.stats.intervals import Interval


@pytest.mark.parametrize(
    "text", ["p99<20ms", " P99.9 <= 1.5 s ", "mean<300us", "p50<1e6ns", "errors<0.1%", "errors<0.001"]
)
def test_both_read_a_common_gate_alike(text: str) -> None:
    assert parse_slo(text) == parse_gates(text)[0]


@pytest.mark.parametrize(
    ("text", "limit"), [("p99<20µs", 20e3), ("p90<.5ms", 5e5), ("mean<1.5s", 1.5e9), ("drift<1%", 0.01)]
)
def test_a_trial_takes_the_units_of_time_and_share(text: str, limit: float) -> None:
    (gate,) = parse_gates(text)
    assert gate.limit == pytest.approx(limit)
    assert gate.below


def test_a_factor_is_a_trials_and_a_level_a_load_tests() -> None:
    assert parse_gates("p99<1.2x") == (Gate("p99<1.2x", "p99", True, 1.2, relative=True),)
    assert parse_slo("p99<20ms@8").level == 8
    with pytest.raises(UsageError, match="the unit 'x', expected one of ns, us, µs, ms, s"):
        parse_slo("p99<1.2x")
    with pytest.raises(UsageError, match="only the gates of a load test"):
        parse_gates("p99<20ms@8")


def test_a_message_names_what_is_known() -> None:
    with pytest.raises(
        UsageError, match=r"names 'p98', expected one of throughput, mean, avg, p50, .*, errors, energy"
    ):
        parse_slo("p98<20ms")
    with pytest.raises(UsageError, match=r"names 'throughput', expected one of mean, p50, .*, agreement, drift"):
        parse_gates("throughput>5")
    with pytest.raises(UsageError, match="cannot be read") as caught:
        parse_slo("p99=20ms")
    assert caught.value.hint is not None
    assert '"p99<20ms"' in caught.value.hint
    assert "throughput, mean" in caught.value.hint


@pytest.mark.parametrize("text", ["p99<20ms@", "p99<20ms@.", "p99<20ms@1.2.3", "p99<20ms@-1"])
def test_a_level_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        parse_slo(text)


@pytest.mark.parametrize(
    ("low", "high", "below", "above"),
    [
        (1.0, 9.0, Outcome.PASS, Outcome.FAIL),
        (1.0, 10.0, Outcome.INCONCLUSIVE, Outcome.FAIL),
        (10.0, 20.0, Outcome.FAIL, Outcome.INCONCLUSIVE),
        (11.0, 20.0, Outcome.FAIL, Outcome.PASS),
        (10.0, 10.0, Outcome.FAIL, Outcome.FAIL),
    ],
)
def test_the_limit_itself_is_on_the_wrong_side(low: float, high: float, below: Outcome, above: Outcome) -> None:
    assert decide(Interval(low, high), 10.0, below=True) is below
    assert decide(Interval(low, high), 10.0, below=False) is above


def test_the_worst_outcome_counts() -> None:
    assert worst([]) is Outcome.PASS
    assert worst([Outcome.PASS, Outcome.INCONCLUSIVE]) is Outcome.INCONCLUSIVE
    assert worst([Outcome.INCONCLUSIVE, Outcome.FAIL, Outcome.PASS]) is Outcome.FAIL


def test_what_would_decide_is_estimated() -> None:
    assert growth_needed(10.0, Interval(8.0, 14.0), 11.0) == pytest.approx(16.0)
    assert growth_needed(10.0, Interval(8.0, 14.0), 9.0, power=1.0) == pytest.approx(2.0)
    assert growth_needed(10.0, Interval(8.0, 14.0), 10.0) is None
