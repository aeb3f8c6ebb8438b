"""Two settings in turn under load: which one is better, and by how much."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import random
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.tuning import simulated, subjects_of

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.loadtest.judge import parse_slo
from repo_manager.loadtest.result import ClientUse, Latency, LoadPoint
from repo_manager.report.tune_view import tune_page, tune_view
from repo_manager.tuning.measuring import BudgetEndedError
from repo_manager.tuning.race import ROUNDS, Bout, RaceBlock, Side, bout, judged, side_of
from repo_manager.tuning.result import TuneOptions, Tuning
from repo_manager.tuning.run import TuningRun
from repo_manager.tuning.search import MOST_RIVALS, MeasuredSetting, rivals_of
from repo_manager.tuning.space import Setting
from repo_manager.tuning.standings import Standings


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
    rounds: tuple[int, int] = (16, 24),
    tells: bool = True,
) -> tuple[Bout, tuple[Side, Side]]:
    """Let two settings of known rates take turns on a noisy machine, whose speed also drifts from block to block."""
    drawn, blocks = random.Random(seed), [0]

    def run(side: int, rate: float) -> RaceBlock:
        blocks[0] += 1
        seen = capacities[side] * drift(blocks[0]) * (1 + drawn.gauss(0, noise))
        shift = min(math.log(seen / rate), 0.045) if tells else None
        return RaceBlock(seen > rate, None, (row(rate, min(rate, seen)),), shift)

    sides = (side_of(start, is_rate_sought=True), side_of(start, is_rate_sought=True))
    return bout(sides, run, rounds=rounds), sides


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("start", [60.0, 100.0, 160.0])
def test_the_ratio_is_right_on_average_wherever_the_staircases_begin(start: float, tells: bool) -> None:
    logs = [math.log(raced((100.0, 120.0), seed=seed, start=start, tells=tells)[0].ratio) for seed in range(60)]
    assert math.exp(statistics.mean(logs)) == pytest.approx(1.2, rel=0.03)


def test_its_error_says_how_far_the_ratio_is_off() -> None:
    """Two standard errors around the ratio cover the true one in most bouts."""
    found = [raced((100.0, 100.0), seed=seed, noise=0.05)[0] for seed in range(60)]
    assert sum(abs(math.log(each.ratio)) < 2 * each.error for each in found) >= 50


def test_what_slows_the_machine_slows_both_sides() -> None:
    """A quarter of its speed is gone in the middle, and the levels of both follow it."""
    found = [
        raced((100.0, 115.0), seed=seed, noise=0.02, drift=lambda at: 1.0 if at < 17 else 0.75) for seed in range(40)
    ]
    assert statistics.mean(each.ratio for each, _ in found) == pytest.approx(1.15, rel=0.02)


def test_after_a_slow_block_of_one_side_the_next_rounds_are_right() -> None:
    """With a load of its own it would have less of it, hold that, and look worse for rounds."""
    found, _ = raced((100.0, 100.0), noise=0.0, drift=lambda at: 0.75 if at == 5 else 1.0, rounds=(6, 8))
    assert [abs(gain) > 0.01 for gain in found.gains].count(True) == 1


def test_blocks_that_both_hold_do_not_count_and_raise_the_load() -> None:
    found, sides = raced((100.0, 110.0), noise=0.0, start=50.0, rounds=(2, 8))
    assert found.ratio == pytest.approx(1.1)
    assert len(found.gains) < found.rounds
    assert sides[0].levels == sides[1].levels


def test_how_far_the_latency_is_from_its_limit_makes_a_bout_more_exact() -> None:
    """Five rounds that tell are as good as many that say only whether they held."""

    def off(tells: bool, rounds: int) -> float:
        bouts = [
            raced((100.0, 100.0), seed=seed, noise=0.03, tells=tells, rounds=(rounds, 20))[0] for seed in range(80)
        ]
        return statistics.pstdev(math.log(each.ratio) for each in bouts)

    assert off(True, 5) < off(False, 10)


def test_the_rate_that_half_of_the_blocks_hold() -> None:
    levels = [side.level_held() for seed in range(40) for side in raced((100.0, 100.0), seed=seed, noise=0.05)[1]]
    assert statistics.mean(levels) == pytest.approx(100.0, rel=0.03)


def test_a_bout_goes_on_until_both_are_near_their_rate() -> None:
    found, _ = raced((100.0, 150.0), noise=0.0, rounds=(2, 12))
    assert 4 <= found.rounds <= 8
    assert found.ratio == pytest.approx(1.5, rel=0.06)


@pytest.mark.parametrize(
    ("numbers", "held", "ratio", "out"),
    [
        ((2e6, 1e6), (True, True), 2.0, (False, False)),
        ((1e6, 2e6), (True, True), 0.5, (False, False)),
        ((2e6, 1e6), (True, False), 2.0, (False, True)),  # faster, and not within the gates
    ],
)
def test_at_a_fixed_rate_the_number_is_compared(
    numbers: tuple[float, float], held: tuple[bool, bool], ratio: float, out: tuple[bool, bool]
) -> None:
    asked = []

    def run(side: int, rate: float) -> RaceBlock:
        asked.append(rate)
        return RaceBlock(held[side], numbers[side], ())

    sides = (side_of(50.0, is_rate_sought=False), side_of(50.0, is_rate_sought=False))
    found = bout(sides, run)
    assert set(asked) == {50.0}
    assert found.ratio == pytest.approx(ratio)
    assert tuple(side.is_out for side in sides) == out
    assert sides[0].level_held() == 50.0


def test_blocks_without_the_number_do_not_count() -> None:
    sides = (side_of(50.0, is_rate_sought=False), side_of(50.0, is_rate_sought=False))
    found = bout(sides, lambda _side, _rate: RaceBlock(True, None, ()))
    assert found == Bout((), ROUNDS[1])


def test_without_time_no_round_is_begun() -> None:
    left = iter([True] * 3)
    sides = (side_of(100.0, is_rate_sought=True), side_of(100.0, is_rate_sought=True))
    found = bout(sides, lambda _side, _rate: RaceBlock(True, None, (), 0.04), has_time=lambda _: next(left, False))
    assert found.rounds == 3


def answered(rate: float, holds: float, seconds: float = 2.0) -> LoadPoint:
    """A level of a server that answers one request after the other, and so many a second at most."""
    free, waits = 0.0, []
    for number in range(int(rate * seconds)):
        came = number / rate
        free = max(free, came) + 1 / holds
        waits.append(int((free - came) * 1e9))
    waits.sort()
    latency = Latency(
        mean_ns=statistics.mean(waits),
        p50_ns=waits[len(waits) // 2],
        p99_ns=waits[int(len(waits) * 0.99)],
        max_ns=waits[-1],
    )
    return LoadPoint("rate", rate, "stable", "", 1, ClientUse("native"), duration_s=seconds, latency=latency)


@pytest.mark.parametrize("text", ["p99<100ms", "p50<80ms", "mean<90ms", "max<100ms"])
@pytest.mark.parametrize("overload", [1.03, 1.1, 1.3])
def test_a_block_tells_the_rate_that_it_would_have_held(text: str, overload: float) -> None:
    """Against a queue computed request by request, whose largest rate within the gate is searched by halves."""
    gates, holds = (parse_slo(text),), 1000.0
    low, high = 0.5 * holds, 2 * holds
    while high / low > 1.0005:
        middle = math.sqrt(low * high)
        is_held, _ = judged({"m": answered(middle, holds)}, lambda _: gates)
        low, high = (middle, high) if is_held else (low, middle)
    is_held, shift = judged({"m": answered(overload * holds, holds)}, lambda _: gates)
    assert shift is not None
    assert overload * holds * math.exp(shift) == pytest.approx(low, rel=0.02)
    assert is_held is (overload * holds < low)


def test_a_block_without_a_queue_tells_a_little_more_than_its_own_rate() -> None:
    _, shift = judged({"m": answered(500.0, 1000.0)}, lambda _: (parse_slo("p99<100ms"),))
    assert shift == pytest.approx(math.log(1 + 0.1 / (0.99 * 2)), rel=0.02)


@pytest.mark.parametrize("text", ["errors<1%", "throughput>10", "p99<10ms"])
def test_what_no_queue_delays_or_at_once_does_not_tell(text: str) -> None:
    assert judged({"m": answered(1100.0, 1000.0)}, lambda _: (parse_slo(text),))[1] is None


def test_of_several_models_and_limits_the_tightest_tells() -> None:
    gates = {"a": (parse_slo("p99<500ms"), parse_slo("p50<90ms")), "b": (parse_slo("p99<300ms"),)}
    points = {"a": answered(1050.0, 1000.0), "b": answered(1200.0, 1000.0)}
    alone = [judged({name: point}, gates.__getitem__) for name, point in points.items()]
    assert [held for held, _ in alone] == [True, False]
    assert judged(points, gates.__getitem__) == (False, min(shift for _, shift in alone if shift is not None))


def test_a_block_that_fails_otherwise_holds_no_more_than_its_rate() -> None:
    refused = dataclasses.replace(answered(500.0, 1000.0), errors=500)
    assert judged({"m": refused}, lambda _: (parse_slo("p99<100ms"), parse_slo("errors<1%"))) == (False, 0.0)
    overloaded = dataclasses.replace(answered(500.0, 1000.0), outcome="overloaded")
    assert judged({"m": overloaded}, lambda _: (parse_slo("p99<100ms"),)) == (False, 0.0)


def standings_of(*values: float) -> Standings:
    """Settings with little in common."""
    return Standings([measured(4**at, 4**at, value) for at, value in enumerate(values)], "throughput")


def test_what_the_search_saw_counts_until_rounds_say_more() -> None:
    standings = standings_of(100.0, 95.0)
    assert standings.leader == 0
    gains, errors = standings.against(0)
    assert list(gains) == pytest.approx([0.0, math.log(0.95)], abs=0.02)
    standings.add(0, 1, [0.1, 0.12, 0.08, 0.1])
    assert standings.leader == 1
    closer, certain = standings.against(0)
    assert 0.05 < closer[1] < 0.1
    assert certain[1] < errors[1] / 2


def test_rounds_between_others_count_for_all_they_connect() -> None:
    standings = standings_of(100.0, 100.0, 100.0)
    standings.add(0, 1, [0.2] * 6)
    standings.add(1, 2, [0.2] * 6)
    gains, _ = standings.against(0)
    assert gains[2] == pytest.approx(0.4, rel=0.1)


def test_the_next_one_is_the_one_that_may_be_best_until_none_may_be() -> None:
    standings = standings_of(100.0, 98.0, 90.0)
    assert standings.challenger == 1
    standings.add(0, 1, [-0.2, -0.21, -0.2, -0.19])
    assert standings.challenger == 2
    standings.add(0, 2, [-0.2, -0.21, -0.2, -0.19])
    assert standings.challenger is None


def test_one_like_a_setting_that_proves_better_is_expected_to_be_better() -> None:
    """The search saw two instances while the machine was slow."""
    slow = [measured(2, batch, None, (row(100.0, 78.0),)) for batch in (32, 64)]
    standings = Standings([measured(1, 32, 100.0), *slow], "throughput")
    before = standings.against(0)[0][2]
    standings.add(0, 1, [0.3, 0.3, 0.3])
    gains, errors = standings.against(0)
    assert gains[2] > before + 0.1
    assert errors[2] > errors[1]
    assert standings.challenger == 2


def test_one_outside_the_gates_neither_leads_nor_is_asked_again() -> None:
    standings = standings_of(100.0, 98.0)
    standings.out.add(0)
    assert standings.leader == 1
    assert standings.challenger is None


@pytest.mark.parametrize("instances", [1, 2])
def test_of_equals_the_one_with_fewer_instances_wins(tmp_path: Path, instances: int) -> None:
    """With large batches one instance holds as much as two, to the third figure."""
    run, _ = simulated(
        subjects_of({"m": CONFIG.replace("count: 1", f"count: {instances}")}, ["m"]),
        TuneOptions(gates=(parse_slo("p99<100ms"),), budget_s=900.0, search=("instances", "max_batch_size")),
        tmp_path,
        cores=2,
        rate_of=lambda state: 500.0 if state["m"].max_batch_size < 8 else 999.0 + state["m"].instances,
        batch_ms=lambda _model, size: float(size) ** 0.5,
        seed=0,
        noise=0.001,
    )
    best = run.go().best.setting
    assert best.instances == 1
    assert best.max_batch_size >= 8


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
    assert [each.rounds > 0 for each in result.finalists] == [True, True]
    assert result.finalists[0].label == result.today.label
    assert result.outcome == "kept"


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
        assert len(result.finalists) <= MOST_RIVALS + 1
        won += won_in_race(result)
        found.append(result.best.setting.max_batch_size)
    assert found.count(32) >= 18, found
    assert won >= 3


def won_in_race(result: Tuning) -> bool:
    return "in turn with it" in result.best.reason


def won_by_race(folder: Path) -> tuple[Tuning, Any, int]:
    for seed in range(40):
        place = folder / str(seed)
        place.mkdir()
        run, surface = flat(place, seed)
        result = run.go()
        if won_in_race(result):
            return result, surface, seed
    raise AssertionError("no race was won by a rival")


def test_the_winner_of_a_race_has_a_value_by_its_ratio(tmp_path: Path) -> None:
    result, *_ = won_by_race(tmp_path)
    winner, *others = result.finalists
    assert (winner.label, winner.ratio, winner.low, winner.high) == (result.best.label, 1.0, 1.0, 1.0)
    assert all(each.low < each.ratio < each.high for each in others)
    assert all(each.ratio <= one.ratio for one, each in itertools.pairwise(others))
    (beaten,) = (each for each in others if each.label in result.best.reason)
    assert result.best.reason == f"{1 / beaten.ratio:.2f} times as good as {beaten.label}, in turn with it and others"
    before = max(each.value for each in result.trials if each.value is not None and each.label != result.best.label)
    assert result.best.value is not None
    assert before * 0.8 < result.best.value < before * 1.4
    assert result.changes["m"]["max_batch_size"] == str(result.best.setting.max_batch_size)


def test_a_second_run_repeats_no_block_of_a_race(tmp_path: Path) -> None:
    result, surface, seed = won_by_race(tmp_path)
    again, second = flat(tmp_path / str(seed), seed)
    assert again.go().finalists == result.finalists
    assert second.now() < surface.now() / 3  # the proof is measured again


@pytest.mark.parametrize("error", [BudgetEndedError(), ServerRefusedError("no room")])
def test_a_race_that_cannot_go_on_leaves_the_best_of_the_search(tmp_path: Path, error: Exception) -> None:
    run, surface = flat(tmp_path, noise=0.02)

    def ended(_copy: str, _rate: float) -> RaceBlock:
        raise error

    surface.block = ended
    result = run.go()
    assert result.finalists == ()
    assert any("in turn with others under load: the budget ended" in said for said in result.left_out)
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
    assert result.finalists == ()
    assert any("in turn with others under load: the budget ended" in said for said in result.left_out)
    assert result.outcome == "better"


def test_the_page_and_the_terminal_show_the_race(tmp_path: Path) -> None:
    result = dataclasses.replace(won_by_race(tmp_path)[0], comparisons=())
    page, terminal = re.sub("<td[^>]*>", "<td>", tune_page(result)), io.StringIO()
    Console(file=terminal, width=140).print(*tune_view(result, written=False))
    for number, each in enumerate(result.finalists):
        interval = f"{each.low:.1%} to {each.high:.1%}" if number else "-"
        assert f"<td>{each.ratio:.1%}</td><td>{interval}</td><td>{each.rounds}</td>" in page
        assert f"{each.ratio:.1%}" in terminal.getvalue()
