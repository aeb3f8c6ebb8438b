"""Gates of a trial: how they are written, and how they are judged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from repo_manager.errors import GateError, InconclusiveError, RolloutUndoneError, UsageError
from repo_manager.gates import GateResult, Outcome
from repo_manager.rollout.options import TrialOptions, parse_gates, parse_steps
from repo_manager.rollout.trial.gates import Evidence, judge_gates, worst_outcome
from repo_manager.rollout.trial.steps import gate_error, run_steps

PASS, FAIL, OPEN = Outcome.PASS, Outcome.FAIL, Outcome.INCONCLUSIVE


def evidence(
    requests: int = 2000, errors: int = 0, new_ms: float = 5.0, old_ms: float = 5.0, source: str = "shadow"
) -> Evidence:
    spread = np.random.default_rng(0).uniform(0.9, 1.1, (requests, 2))
    return Evidence(source, requests, errors, spread * np.array([new_ms, old_ms]) * 1e6)


def outcome(text: str, seen: Evidence) -> Outcome:
    (result,) = judge_gates(parse_gates(text), seen)
    assert result.gate == text
    assert result.level == seen.source
    return result.outcome


@pytest.mark.parametrize(
    ("text", "metric", "limit", "relative"),
    [
        ("p99<20ms", "p99", 20e6, False),
        (" P99.9 <= 1.5 s ", "p99.9", 1.5e9, False),
        ("mean<300us", "mean", 3e5, False),
        ("p50<1.2x", "p50", 1.2, True),
        ("errors<0.1%", "errors", 0.001, False),
        ("errors<0.001", "errors", 0.001, False),
        ("agreement>99%", "agreement", 0.99, False),
        ("drift<1e-2", "drift", 0.01, False),
    ],
)
def test_gates_are_read(text: str, metric: str, limit: float, relative: bool) -> None:
    (gate,) = parse_gates(text)
    assert (gate.metric, gate.limit, gate.relative) == (metric, pytest.approx(limit), relative)


def test_several_gates() -> None:
    assert [gate.text for gate in parse_gates("p99<20ms, errors<1%,")] == ["p99<20ms", "errors<1%"]
    assert parse_gates("") == ()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("p99", "cannot be read"),
        ("p98<1ms", "names 'p98'"),
        ("p99>1ms", "expected <"),
        ("agreement<99%", "expected >"),
        ("p99<20", "the unit ''"),
        ("errors<1ms", "the unit 'ms'"),
        ("errors<2", "more than 100 %"),
        ("agreement>990%", "more than 100 %"),
        ("drift<1x", "the unit 'x'"),
        ("p99<-1ms", "cannot be read"),
    ],
)
def test_gates_that_are_none(text: str, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        parse_gates(text)


@pytest.mark.parametrize(
    ("text", "seen", "expected"),
    [
        ("errors<1%", evidence(errors=0), PASS),
        ("errors<1%", evidence(errors=100), FAIL),
        ("errors<1%", evidence(errors=20), OPEN),
        ("errors<0.01%", evidence(errors=0), OPEN),
        ("p99<20ms", evidence(new_ms=5), PASS),
        ("p99<20ms", evidence(new_ms=30), FAIL),
        ("p99<20ms", evidence(requests=50), OPEN),
        ("mean<6ms", evidence(new_ms=5), PASS),
        ("mean<4ms", evidence(new_ms=5), FAIL),
        ("mean<5ms", evidence(new_ms=5), OPEN),
        ("p50<1.2x", evidence(new_ms=5, old_ms=5), PASS),
        ("p99<1.2x", evidence(new_ms=10, old_ms=5), FAIL),
        ("mean<2x", evidence(new_ms=10, old_ms=5), OPEN),
        ("agreement>99%", dataclasses.replace(evidence(), compared=2000, agreeing=2000), PASS),
        ("agreement>99%", dataclasses.replace(evidence(), compared=2000, agreeing=1900), FAIL),
        ("agreement>99%", evidence(), OPEN),
        ("drift<1e-2", dataclasses.replace(evidence(), drifts=np.full(2000, 1e-3)), PASS),
        ("drift<1e-2", dataclasses.replace(evidence(), drifts=np.full(2000, 1e-1)), FAIL),
        ("drift<1e-2", dataclasses.replace(evidence(), drifts=np.full(2000, np.inf)), FAIL),
        ("drift<1e-2", dataclasses.replace(evidence(), drifts=np.full(2000, np.nan)), FAIL),
        ("drift<1e-2", evidence(), OPEN),
        ("errors<1%", evidence(requests=0), OPEN),
        ("mean<1s", evidence(requests=0), OPEN),
    ],
)
def test_gates_are_judged(text: str, seen: Evidence, expected: Outcome) -> None:
    assert outcome(text, seen) is expected


def test_a_latency_of_exactly_the_limit_is_over_it() -> None:
    seen = Evidence("shadow", 2000, 0, np.full((2000, 2), 20e6))
    assert outcome("p99<20ms", seen) is FAIL


def test_counters_judge_what_they_know() -> None:
    seen = Evidence("traffic", 3000, 0, np.column_stack([np.full(30, 5e6), np.full(30, 100.0)]))
    results = judge_gates(parse_gates("errors<1%, mean<6ms, p99<20ms, drift<1, agreement>1%, mean<2x"), seen)
    assert [(result.gate, result.outcome) for result in results] == [("errors<1%", PASS), ("mean<6ms", PASS)]


def test_traffic_periods_weigh_by_their_requests() -> None:
    periods = np.array([[1e6, 1.0]] * 20 + [[9e6, 1000.0]] * 20)
    (result,) = judge_gates(parse_gates("mean<5ms"), Evidence("traffic", 20_020, 0, periods))
    assert result.outcome is FAIL


def test_an_undecided_gate_says_how_much_more_would_decide() -> None:
    gates = parse_gates("errors<0.1%")
    (result,) = judge_gates(gates, evidence(requests=1000))
    assert result.needed_requests is not None
    (then,) = judge_gates(gates, Evidence("shadow", result.needed_requests, 0, np.empty((0, 2))))
    (before,) = judge_gates(gates, Evidence("shadow", result.needed_requests // 2, 0, np.empty((0, 2))))
    assert (then.outcome, before.outcome) == (PASS, OPEN)


def test_more_gates_make_each_one_harder() -> None:
    alone = judge_gates(parse_gates("errors<1%"), evidence(requests=850))
    with_others = judge_gates(parse_gates("errors<1%, p50<1s, p90<1s, p95<1s, p99<1s"), evidence(requests=850))
    assert (alone[0].outcome, with_others[0].outcome) == (PASS, OPEN)


def test_the_worst_outcome_counts() -> None:
    of = {each: GateResult("g", "shadow", each, "") for each in Outcome}
    assert worst_outcome([of[PASS], of[OPEN], of[FAIL]]) is FAIL
    assert worst_outcome([of[PASS], of[OPEN]]) is OPEN
    assert worst_outcome([of[PASS]]) is PASS


def test_the_error_says_which_gate_and_what_more() -> None:
    failed = gate_error(
        [GateResult("a", "shadow", FAIL, "bad"), GateResult("b", "shadow", OPEN, "open", needed_requests=7)]
    )
    assert (type(failed), failed.message) == (GateError, "the gate a failed: bad")
    open_ = gate_error([GateResult("b", "shadow", OPEN, "few", needed_requests=70_000)])
    assert (type(open_), open_.message) == (InconclusiveError, "the gate b is undecided: few")
    assert "70,000 requests" in str(open_.hint)
    assert gate_error([GateResult("b", "shadow", OPEN, "few")]).hint is None


def test_a_trial_needs_something_to_judge_by() -> None:
    with pytest.raises(UsageError, match="neither"):
        TrialOptions().check()
    with pytest.raises(UsageError, match="agreement>9%"):
        TrialOptions(steps=(0.5, 1.0), gates=parse_gates("errors<1%, agreement>9%")).check()
    with pytest.raises(UsageError, match="mean<2x"):
        TrialOptions(steps=(0.5, 1.0), gates=parse_gates("mean<2x")).check()


@pytest.mark.parametrize(("text", "steps"), [("5%,25%,100%", (0.05, 0.25, 1.0)), ("50, 100", (0.5, 1.0))])
def test_steps_are_read(text: str, steps: tuple[float, ...]) -> None:
    assert parse_steps(text) == pytest.approx(steps)


@pytest.mark.parametrize("text", ["", "a%", "5%", "100%", "5%,5%,100%", "50%,20%,100%", "5%,50%", "0%,100%", "5%,200%"])
def test_steps_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="canary steps"):
        parse_steps(text)


class Recorder:
    """Weights and watch in one: remembers the shares, and answers with the outcomes given."""

    def __init__(self, *outcomes: Outcome | BaseException) -> None:
        self.shares: list[float] = []
        self._outcomes = list(outcomes)

    def set_weight(self, fraction: float) -> None:
        self.shares.append(fraction)

    def current(self) -> float:
        return self.shares[-1] if self.shares else 0.0

    def watch(self, seconds: float) -> tuple[GateResult, ...]:
        assert seconds == 3.0
        found = self._outcomes.pop(0)
        if isinstance(found, BaseException):
            raise found
        return (GateResult("g", "shadow", found, "because"),)

    def requests(self) -> int:
        return 10 * len(self.shares)


def steps_of(recorder: Recorder) -> tuple[float, ...]:
    taken = run_steps(recorder, (0.1, 0.5, 1.0), 3.0, recorder, lambda _: None)
    return tuple(step.fraction for step in taken)


def test_steps_are_taken_one_after_the_other() -> None:
    recorder = Recorder(PASS, PASS, PASS)
    assert steps_of(recorder) == (0.1, 0.5, 1.0)
    assert recorder.shares == [0.1, 0.5, 1.0]


def test_an_undecided_step_may_be_followed_by_the_next_but_not_by_all() -> None:
    assert steps_of(Recorder(OPEN, PASS, PASS)) == (0.1, 0.5, 1.0)
    recorder = Recorder(PASS, OPEN)
    with pytest.raises(InconclusiveError):
        steps_of(recorder)
    assert recorder.shares == [0.1, 0.5, 0.0]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failed_step_goes_back_to_nothing(at: int) -> None:
    recorder = Recorder(*[PASS] * at, FAIL)
    with pytest.raises(GateError, match="because"):
        steps_of(recorder)
    assert recorder.shares[-1] == 0.0
    assert len(recorder.shares) == at + 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RolloutUndoneError("x"), OSError("disk")])
def test_whatever_ends_it_the_weight_goes_back_to_nothing(error: BaseException) -> None:
    recorder = Recorder(PASS, error)
    with pytest.raises(type(error)):
        steps_of(recorder)
    assert recorder.shares == [0.1, 0.5, 0.0]
