"""When a shadow's gates are decided, with answers that arrive at chosen moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from repo_manager.gates import GateResult, Outcome
from repo_manager.rollout.options import parse_gates
from repo_manager.rollout.trial.gates import Evidence, judge_gates, worst_outcome
from repo_manager.rollout.trial.watch import ShadowWatch

CALM = [(10.2e6 if number % 3 else 9.6e6, 10e6) for number in range(16)]


class SlowMirror:
    """Has one more batch of answers at each look. The batches after the end were on their way when it was stopped."""

    def __init__(self, *batches: Sequence[tuple[float, float]]) -> None:
        self._batches, self._rows = list(batches), list(batches[0])
        self.stopped = False

    def run(self, seconds: float, stop: Callable[[], bool]) -> None:
        for batch in (*self._batches[1:], ()):
            self.stopped = self.stopped or stop()
            self._rows += batch

    def evidence(self) -> Evidence:
        return Evidence("shadow", len(self._rows), 0, np.array(self._rows))


def watch(mirror: SlowMirror, gate: str, *, until_decided: bool = True) -> tuple[GateResult, ...]:
    return ShadowWatch(mirror, parse_gates(gate), until_decided=until_decided).watch(1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("late", [[], [(40e6, 10e6)] * 3])
def test_a_decision_that_ends_the_mirroring_is_the_verdict(late: list[tuple[float, float]]) -> None:
    gate = f"mean<{_limit_passed_at_the_first_look_alone():.6g}ms"
    mirror = SlowMirror(CALM, late)
    (result,) = watch(mirror, gate)
    assert mirror.stopped
    assert result.outcome is Outcome.PASS, result.reason
    assert "16 requests" in result.reason


def test_a_failure_stays_one_whatever_arrives_after_it() -> None:
    slow = [(latency * 1.5, old) for latency, old in CALM]
    mirror = SlowMirror(slow, [(1e6, 10e6)] * 60)
    (result,) = watch(mirror, "mean<1.2x", until_decided=False)
    assert mirror.stopped
    assert result.outcome is Outcome.FAIL, result.reason


def test_without_a_decision_the_gates_are_judged_on_the_last_answers() -> None:
    mirror = SlowMirror(CALM[:7], CALM[:7])
    (result,) = watch(mirror, "mean<20ms")
    assert not mirror.stopped  # the first look is due after 16 answers
    assert result.outcome is Outcome.PASS
    assert "14 requests" in result.reason


def _limit_passed_at_the_first_look_alone() -> float:
    """Return a limit in ms that the first look on the calm answers passes, and the second leaves undecided."""
    seen = Evidence("shadow", len(CALM), 0, np.array(CALM))
    for limit in np.arange(10.0, 11.0, 0.005):
        looks = [judge_gates(parse_gates(f"mean<{limit:.6g}ms"), seen, look=look) for look in (1, 2)]
        if [worst_outcome(results) for results in looks] == [Outcome.PASS, Outcome.INCONCLUSIVE]:
            return float(limit)
    raise AssertionError("no such limit")
