"""Two settings in turn under load: which one is better, and by how much."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tuning import simulated, subjects_of

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.loadtest.judge import parse_slo
from repo_manager.tuning.measuring import BudgetEndedError
from repo_manager.tuning.race import MOST_RIVALS, Duel, RaceBlock, duel, rivals_of
from repo_manager.tuning.result import TuneOptions, Tuning
from repo_manager.tuning.run import TuningRun
from repo_manager.tuning.search import MeasuredSetting
from repo_manager.tuning.space import Setting


def measured(
    instances: int = 1, batch: int = 4, value: float | None = 100.0, levels: tuple[dict[str, Any], ...] = ()
) -> MeasuredSetting:
    setting = Setting(instances, batch, 0)
    return MeasuredSetting(setting, value is not None, value, "", 1.0, levels=levels, state={"m": setting})


def row(level: float, answered: float, **more: Any) -> dict[str, Any]:
    return {
        "level": level,
        "throughput_per_s": answered,
        "p99_ns": 1e6,
        "joules_per_inference": None,
        "decision": "fails",
        **more,
    }


def raced(
    capacities: tuple[float, float],
    *,
    seed: int = 0,
    noise: float = 0.1,
    start: float = 100.0,
    drift: Callable[[int], float] = lambda _: 1.0,
    sides: tuple[MeasuredSetting, MeasuredSetting] | None = None,
    rounds: tuple[int, int] = (5, 10),
    margin: float = 0.0,
) -> Duel:
    """Race two settings of known rates on a noisy machine, whose speed also drifts from block to block."""
    drawn, blocks = random.Random(seed), [0]

    def run(side: int, rate: float) -> RaceBlock:
        blocks[0] += 1
        seen = capacities[side] * drift(blocks[0]) * (1 + drawn.gauss(0, noise))
        return RaceBlock(seen > rate, None, (row(rate, min(rate, seen)),))

    both = sides or (measured(), measured(batch=8))
    found = duel(*both, run, rate=start, is_rate_sought=True, rounds=rounds, margin=margin)
    assert found is not None
    return found


@pytest.mark.parametrize("start", [60.0, 100.0, 160.0])
def test_the_ratio_is_right_on_average_wherever_the_staircases_begin(start: float) -> None:
    logs = [math.log(raced((100.0, 120.0), seed=seed, start=start, rounds=(16, 16)).ratio) for seed in range(60)]
    assert math.exp(sum(logs) / len(logs)) == pytest.approx(1.2, rel=0.02)


def test_its_error_says_how_far_the_ratio_is_off() -> None:
    """Two standard errors around the ratio cover the true one in most races."""
    found = [raced((100.0, 100.0), seed=seed, noise=0.05, rounds=(16, 16)) for seed in range(60)]
    assert sum(abs(math.log(each.ratio)) < 2 * each.error for each in found) >= 52


def test_what_slows_the_machine_slows_both_sides() -> None:
    """Half of its speed is gone in the middle of the race."""

    def drift(block: int) -> float:
        return 1.0 if block < 16 else 0.5

    wins = sum(raced((100.0, 115.0), seed=seed, drift=drift, rounds=(16, 16)).is_won for seed in range(40))
    assert wins >= 36


@pytest.mark.parametrize("ratio", [0.85, 1 / 0.85])
def test_the_better_one_wins_nearly_always(ratio: float) -> None:
    wins = sum(raced((100.0, 100.0 * ratio), seed=seed).is_won for seed in range(50))
    assert (wins >= 47) if ratio > 1 else (wins <= 3)


def test_a_clear_difference_ends_it_early() -> None:
    assert raced((100.0, 200.0)).rounds < 10
    assert raced((100.0, 100.0), noise=0.02).rounds == 10


@pytest.mark.parametrize(("instances", "wins"), [((2, 1), True), ((1, 2), False)])
def test_of_equals_the_one_with_fewer_instances_wins(instances: tuple[int, int], wins: bool) -> None:
    sides = (measured(instances[0]), measured(instances[1]))
    assert raced((100.0, 100.0), noise=0.0, sides=sides).is_won is wins


@pytest.mark.parametrize(("rate", "instances", "wins"), [(100.0, 1, False), (115.0, 2, True)])
def test_todays_setting_loses_its_place_to_a_gain_only(rate: float, instances: int, wins: bool) -> None:
    sides = (measured(2), measured(instances, batch=8))
    assert raced((100.0, rate), noise=0.0, sides=sides, margin=0.04).is_won is wins


def test_a_race_against_todays_setting_has_the_margin_of_the_search(tmp_path: Path) -> None:
    text, levels = CONFIG.replace("max_batch_size: 4", "max_batch_size: 32"), {32: 1000.0, 64: 1010.0}
    run, _ = simulated(
        subjects_of({"m": text}, ["m"]),
        TuneOptions(gates=(parse_slo("p99<100ms"),), budget_s=600.0, search=("max_batch_size",)),
        tmp_path,
        cores=2,
        rate_of=lambda state: levels.get(state["m"].max_batch_size, 500.0),
        batch_ms=lambda _model, size: float(size) ** 0.5,
        seed=0,
        noise=0.001,
    )
    result = run.go()
    assert [each.is_won for each in result.duels] == [False]
    assert result.outcome == "kept"


@pytest.mark.parametrize(
    ("numbers", "held", "ratio", "wins"),
    [
        ((2e6, 1e6), (True, True), 2.0, True),
        ((1e6, 2e6), (True, True), 0.5, False),
        ((2e6, 1e6), (True, False), 2.0, False),  # faster, and not within the gates
        ((1e6, 2e6), (False, True), 0.5, True),
        ((None, None), (True, True), 1.0, False),
    ],
)
def test_at_a_fixed_rate_the_number_decides_within_the_gates(
    numbers: tuple[float | None, float | None], held: tuple[bool, bool], ratio: float, wins: bool
) -> None:
    asked = []

    def run(side: int, rate: float) -> RaceBlock:
        asked.append(rate)
        return RaceBlock(held[side], numbers[side], ())

    found = duel(measured(), measured(batch=8), run, rate=50.0, is_rate_sought=False)
    assert found is not None
    assert set(asked) == {50.0}
    assert found.ratio == pytest.approx(ratio)
    assert found.is_won is wins
    assert found.level == 50.0


def test_without_time_for_the_fewest_rounds_nothing_is_decided() -> None:
    left = iter([True] * 4)
    found = duel(
        measured(),
        measured(batch=8),
        lambda _side, rate: RaceBlock(True, None, (row(rate, rate),)),
        rate=100.0,
        is_rate_sought=True,
        has_time=lambda _: next(left, False),
    )
    assert found is None


def test_rivals_are_near_the_best_whether_they_lost_or_were_overtaken() -> None:
    best = measured(batch=64, value=100.0)
    lost = measured(batch=32, value=None, levels=(row(104.0, 99.0),))
    overtaken = measured(batch=16, value=95.0)
    far = measured(batch=8, value=None, levels=(row(104.0, 60.0),))
    early = measured(batch=2, value=None, levels=(row(50.0, 50.0),))  # lost against a former best
    unknown = measured(batch=1, value=None)
    undecided = measured(batch=24, value=None, levels=(row(97.0, 97.0, decision="undecided"),))
    found = rivals_of(best, [unknown, early, far, overtaken, lost, undecided, best], "throughput")
    assert [each.setting.max_batch_size for each in found] == [24, 32, 16]


def test_rivals_of_several_models_are_scored_by_their_sum() -> None:
    best = measured(value=100.0)
    lost = measured(batch=8, value=None, levels=(row(104.0, 50.0, model="a"), row(104.0, 45.0, model="b")))
    assert rivals_of(best, [lost], "throughput") == [lost]


@pytest.mark.parametrize("seeks", ["latency", "energy"])
def test_rivals_at_a_fixed_rate_have_nearly_as_small_a_number(seeks: str) -> None:
    key = "p99_ns" if seeks == "latency" else "joules_per_inference"
    best = measured(value=1.0)
    near = measured(batch=8, value=None, levels=(row(50.0, 50.0, **{key: 1.1}),))
    far = measured(batch=16, value=None, levels=(row(50.0, 50.0, **{key: 1.5}),))
    assert rivals_of(best, [near, far], seeks) == [near]


CONFIG = (
    'name: "m" backend: "onnxruntime" max_batch_size: 4 instance_group { count: 1 kind: KIND_CPU } dynamic_batching {}'
)


def flat(folder: Path, seed: int = 0, budget_s: float = 600.0, noise: float = 0.12) -> tuple[TuningRun, Any]:
    """A surface whose settings differ by less than its noise, except that batches of 32 hold a fifth more."""
    return simulated(
        subjects_of({"m": CONFIG}, ["m"]),
        TuneOptions(gates=(parse_slo("p99<100ms"),), budget_s=budget_s, search=("max_batch_size",)),
        folder,
        cores=2,
        rate_of=lambda state: {32: 1200.0, 4: 500.0}.get(state["m"].max_batch_size, 1000.0),
        batch_ms=lambda _model, size: float(size) ** 0.5,
        seed=seed,
        noise=noise,
    )


def test_a_setting_that_was_unlucky_in_the_search_wins_the_race(tmp_path: Path) -> None:
    found, won = [], 0
    for seed in range(20):
        folder = tmp_path / str(seed)
        folder.mkdir()
        run, _ = flat(folder, seed)
        result = run.go()
        assert len(result.duels) <= MOST_RIVALS
        won += any(each.is_won for each in result.duels)
        found.append(result.best.setting.max_batch_size)
    assert found.count(32) >= 18, found
    assert won >= 3


def won_by_race(folder: Path) -> tuple[Tuning, Any, int]:
    for seed in range(40):
        place = folder / str(seed)
        place.mkdir()
        run, surface = flat(place, seed)
        result = run.go()
        if any(each.is_won for each in result.duels):
            return result, surface, seed
    raise AssertionError("no race was won by a rival")


def test_the_winner_of_a_race_has_a_value_by_its_ratio(tmp_path: Path) -> None:
    result, *_ = won_by_race(tmp_path)
    last = [each for each in result.duels if each.is_won][-1]
    assert result.best.label == last.rival
    assert (
        result.best.reason == f"{last.ratio:.2f} times as good as {last.best} in {last.rounds} rounds in turn with it"
    )
    before = max(each.value for each in result.trials if each.value is not None and each.label != result.best.label)
    assert result.best.value is not None
    assert before * 0.8 < result.best.value <= last.level
    assert result.changes["m"]["max_batch_size"] == str(result.best.setting.max_batch_size)


def test_a_second_run_repeats_no_block_of_a_race(tmp_path: Path) -> None:
    result, surface, seed = won_by_race(tmp_path)
    again, second = flat(tmp_path / str(seed), seed)
    assert again.go().duels == result.duels
    assert second.now() < surface.now() / 3  # the proof is measured again


@pytest.mark.parametrize("error", [BudgetEndedError(), ServerRefusedError("no room")])
def test_a_race_that_cannot_go_on_leaves_the_best_of_the_search(tmp_path: Path, error: Exception) -> None:
    run, surface = flat(tmp_path, noise=0.02)

    def ended(_copy: str, _rate: float) -> RaceBlock:
        raise error

    surface.block = ended
    result = run.go()
    assert result.duels == ()
    assert result.outcome == "better"


def test_a_server_that_ends_under_a_race_is_started_again_for_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, surface = flat(tmp_path, noise=0.02)
    ended: list[bool] = []

    def block(_copy: str, _rate: float) -> RaceBlock:
        ended.append(True)
        raise ServerUnreachableError("gone")

    monkeypatch.setattr(surface, "block", block)
    monkeypatch.setattr(run.copies, "revive", lambda: bool(ended) and ended.pop())
    result = run.go()
    assert not ended
    assert result.duels == ()
    assert result.outcome == "better"
