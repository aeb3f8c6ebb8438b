"""A tuning's conclusions from its measurements."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from repo_manager.accuracy.evaluate import AccuracyOptions
from repo_manager.errors import UsageError
from repo_manager.loadtest.judge import parse_slo
from repo_manager.tuning.result import TuneOptions, conclude, objective_of
from repo_manager.tuning.search import MeasuredSetting
from repo_manager.tuning.space import Setting

OPTIONS = TuneOptions(gates=(parse_slo("p99<20ms"),), budget_s=60.0)


def measured(
    value: float | None, instances: int = 1, p99_ns: float | None = None, decision: str = "fails"
) -> MeasuredSetting:
    levels = () if p99_ns is None else ({"level": 10.0, "p99_ns": p99_ns, "decision": decision},)
    return MeasuredSetting(Setting(instances, 8, 0), value is not None, value, "so it was", 1.0, None, levels)


def comparison(**better: str | None) -> Any:
    """A comparison with each number shown to be better on a side, or on none."""
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
        (comparison(**{"p99 latency": None, "p50 latency": "B", "mean latency": "B"}), True, "kept"),
    ],
)
def test_only_what_the_comparison_shows_is_better(compared: Any, is_complete: bool, outcome: str) -> None:
    today, best = measured(100.0), measured(150.0, instances=2)
    found, reason = conclude(OPTIONS, [today, best], best, [compared], is_complete=is_complete)
    assert found == outcome
    assert "2 instances" in reason


def test_the_latency_of_a_gate_is_evidence() -> None:
    options = dataclasses.replace(OPTIONS, gates=(parse_slo("mean<20ms"),))
    today, best = measured(100.0), measured(150.0, instances=2)
    shorter = comparison(**{"p99 latency": None, "mean latency": "B"})
    assert conclude(options, [today, best], best, [shorter], is_complete=True)[0] == "better"


def test_todays_stays_where_nothing_beat_it() -> None:
    today = measured(100.0)
    assert conclude(OPTIONS, [today, measured(None, 2)], today, (), is_complete=True)[0] == "kept"
    assert conclude(OPTIONS, [today], today, (), is_complete=False)[0] == "undecided"


def test_where_todays_holds_nothing_what_holds_is_better() -> None:
    today, best = measured(None), measured(50.0, instances=2)
    outcome, reason = conclude(OPTIONS, [today, best], best, (), is_complete=True)
    assert (outcome, "holds 50 requests/s" in reason) == ("better", True)
    slower = comparison(**{"p99 latency": "A"})
    assert conclude(OPTIONS, [today, best], best, [slower], is_complete=True)[0] == "kept"


def test_where_todays_is_undecided_the_comparison_decides() -> None:
    """A load left undecided by the machine's noise is not a failed load."""
    today, best = measured(None, 1, 20e6, "undecided"), measured(50.0, instances=2)
    alike, faster = comparison(**{"p99 latency": None}), comparison(**{"p99 latency": "B"})
    assert conclude(OPTIONS, [today, best], best, [alike], is_complete=True)[0] == "kept"
    assert conclude(OPTIONS, [today, best], best, [faster], is_complete=True)[0] == "better"
    assert conclude(OPTIONS, [today, measured(None, 2)], today, (), is_complete=True)[0] == "undecided"


def test_where_nothing_holds_the_nearest_is_named() -> None:
    settings = [measured(None, 1, 90e6), measured(None, 2, 25e6), measured(None, 4)]
    outcome, reason = conclude(OPTIONS, settings, settings[0], (), is_complete=True)
    assert outcome == "none holds"
    assert "the nearest is 2 instances" in reason
    assert conclude(OPTIONS, settings, settings[0], (), is_complete=False)[0] == "undecided"


def test_what_is_sought_is_named_and_checked() -> None:
    assert objective_of(OPTIONS) == "the largest rate with p99<20ms"
    assert objective_of(TuneOptions(rate=300.0)) == "the lowest p99 at 300 requests/s"
    with pytest.raises(UsageError, match="nothing to tune for"):
        TuneOptions()
    with pytest.raises(UsageError, match="cannot be searched"):
        TuneOptions(rate=1.0, search=("colour",))


def test_for_energy_a_longer_p99_is_no_loss_but_nothing_else_is_a_gain() -> None:
    options = TuneOptions(gates=OPTIONS.gates, objective="energy", budget_s=60.0)
    today, best = measured(2.0), measured(1.0, instances=2)
    shown = comparison(**{"inferences per joule": "B", "p99 latency": "A"})
    outcome, reason = conclude(options, [today, best], best, [shown], is_complete=True)
    assert (outcome, "1 inferences/J" in reason) == ("better", True)
    only_faster = comparison(**{"inferences per joule": None, "p99 latency": "B"})
    assert conclude(options, [today, best], best, [only_faster], is_complete=True)[0] == "kept"


def test_of_several_models_none_may_lose() -> None:
    today, best = measured(100.0), measured(150.0, instances=2)
    won, lost = comparison(**{"p99 latency": "B"}), comparison(**{"p99 latency": "A"})
    assert conclude(OPTIONS, [today, best], best, [won, comparison(throughput=None)], is_complete=True)[0] == "better"
    assert conclude(OPTIONS, [today, best], best, [won, lost], is_complete=True)[0] == "kept"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"own_gates": {"c": OPTIONS.gates}}, "c is not tuned"),
        ({"mix": {"a": 1.0}, "gates": OPTIONS.gates}, "leaves models out"),
        ({"own_gates": {"a": OPTIONS.gates}}, "b has no limit to hold"),
        ({"rate": 5.0}, "for the largest rate only"),
        ({"gates": OPTIONS.gates, "accuracy": AccuracyOptions("held.npz:labels")}, "held-out data belong to one model"),
    ],
)
def test_what_is_said_of_single_models_has_to_fit_them(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TuneOptions(**options).check_models(("a", "b"))


@pytest.mark.parametrize("options", [{"objective": "latency"}, {"objective": "throughput", "rate": 5.0}])
def test_an_objective_needs_its_rate(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="rate"):
        TuneOptions(gates=OPTIONS.gates, **options)
