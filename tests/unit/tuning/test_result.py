"""What a tuning concludes from what it measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from repo_manager.errors import UsageError
from repo_manager.loadtest.judge import parse_slo
from repo_manager.tuning.result import TuneOptions, conclude, objective_of
from repo_manager.tuning.search import Trial
from repo_manager.tuning.space import Setting

OPTIONS = TuneOptions(gates=(parse_slo("p99<20ms"),), budget_s=60.0)


def trial(value: float | None, instances: int = 1, p99_ns: float | None = None) -> Trial:
    levels = () if p99_ns is None else ({"p99_ns": p99_ns},)
    return Trial(Setting(instances, 8, 0), value is not None, value, "so it was", 1.0, None, levels)


def comparison(**better: str | None) -> Any:
    """A comparison whose numbers are shown to be better on a side, or of which none is."""
    numbers = [SimpleNamespace(name=name, better=side, shown=side is not None) for name, side in better.items()]
    return SimpleNamespace(numbers=numbers, verdict="as it is")


@pytest.mark.parametrize(
    ("compared", "is_complete", "outcome"),
    [
        (comparison(**{"p99 latency": "B", "throughput": None}), True, "better"),
        (comparison(**{"p99 latency": "B", "throughput": None}), False, "better"),
        (comparison(**{"p99 latency": None, "throughput": None}), True, "kept"),
        (comparison(**{"p99 latency": None, "throughput": None}), False, "undecided"),
        (comparison(**{"p99 latency": "B", "throughput": "A"}), True, "kept"),
        (comparison(**{"p99 latency": "A", "p50 latency": "B"}), True, "kept"),
    ],
)
def test_only_what_the_comparison_shows_is_better(compared: Any, is_complete: bool, outcome: str) -> None:
    today, best = trial(100.0), trial(150.0, instances=2)
    found, reason = conclude(OPTIONS, [today, best], best, compared, is_complete=is_complete)
    assert found == outcome
    assert "2 instances" in reason


def test_todays_stays_where_nothing_beat_it() -> None:
    today = trial(100.0)
    assert conclude(OPTIONS, [today, trial(None, 2)], today, None, is_complete=True)[0] == "kept"
    assert conclude(OPTIONS, [today], today, None, is_complete=False)[0] == "undecided"


def test_where_todays_holds_nothing_what_holds_is_better() -> None:
    today, best = trial(None), trial(50.0, instances=2)
    outcome, reason = conclude(OPTIONS, [today, best], best, None, is_complete=True)
    assert (outcome, "holds 50 requests/s" in reason) == ("better", True)


def test_where_nothing_holds_the_nearest_is_named() -> None:
    trials = [trial(None, 1, 90e6), trial(None, 2, 25e6), trial(None, 4)]
    outcome, reason = conclude(OPTIONS, trials, trials[0], None, is_complete=True)
    assert outcome == "none holds"
    assert "the nearest is 2 instances" in reason
    assert conclude(OPTIONS, trials, trials[0], None, is_complete=False)[0] == "undecided"


def test_what_is_sought_is_named_and_checked() -> None:
    assert objective_of(OPTIONS) == "the largest rate with p99<20ms"
    assert objective_of(TuneOptions(rate=300.0)) == "the lowest p99 at 300 requests/s"
    with pytest.raises(UsageError, match="nothing to tune for"):
        TuneOptions()
    with pytest.raises(UsageError, match="cannot be searched"):
        TuneOptions(rate=1.0, search=("colour",))
