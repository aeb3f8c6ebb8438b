"""The comparison's statistics, simulated: noise with memory, drifts and jumps, as on shared machines."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from repo_manager.stats.resampling import compared_numbers, verdict_of

RUNS = 100
LOWER_IS_BETTER = {
    "throughput": False,
    "inferences per joule": False,
    "mean latency": True,
    "p50 latency": True,
    "p99 latency": True,
}


def autoregressive(rng: np.random.Generator, size: int, memory: float) -> np.ndarray:
    """Noise of unit variance, each value partly the one before."""
    values = np.empty(size)
    values[0] = rng.normal()
    for place in range(1, size):
        values[place] = memory * values[place - 1] + np.sqrt(1 - memory**2) * rng.normal()
    return values


def machine(kind: str, rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Return the log slowness of the machine in each block, common to whatever runs in it."""
    if kind == "quiet":
        return rng.normal(0, 0.02, blocks)
    if kind == "remembers":
        return 0.06 * autoregressive(rng, blocks, 0.9)
    if kind == "drifts":  # it gets warm: 20 % over the run
        return np.linspace(0, 0.2, blocks) + rng.normal(0, 0.03, blocks)
    if kind == "jumps":  # a neighbour comes and goes: a third slower for some blocks
        busy = np.cumsum(rng.random(blocks) < 0.1) % 2
        return 0.3 * busy + rng.normal(0, 0.03, blocks)
    return np.where(rng.random(blocks) < 0.05, 0.5, 0.0) + rng.normal(0, 0.03, blocks)  # outliers


@functools.cache
def simulated(kind: str, slower: float, seed: int, pairs: int = 30):
    """Return `compare` for B slower by a factor. Its numbers depend on each other as real ones do."""
    rng = np.random.default_rng(seed)
    slowness = machine(kind, rng, 2 * pairs)
    order = rng.integers(0, 2, pairs)
    sides = ([], [])
    for pair in range(pairs):
        for place, side in enumerate((order[pair], 1 - order[pair])):
            log = slowness[2 * pair + place] + (np.log(slower) if side else 0.0)
            own = rng.normal(0, 0.01, 3)
            sides[side].append(
                {
                    "throughput": float(np.exp(-log)),
                    "mean latency": float(np.exp(log + own[0])),
                    "p50 latency": float(np.exp(log + own[1])),
                    "p99 latency": float(np.exp(1.5 * log + 5 * own[2])),
                }
            )
    numbers, _ = compared_numbers(*sides, (sides[0][0], sides[1][0]), lower_is_better=LOWER_IS_BETTER, seed=seed)
    return numbers


KINDS = ("quiet", "remembers", "drifts", "jumps", "outliers")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_against_itself_shows_no_difference_in_95_of_100(kind):
    right = sum(not any(number.shown for number in simulated(kind, 1.0, seed)) for seed in range(RUNS))
    assert right >= 95


@pytest.mark.parametrize("kind", ["quiet", "remembers", "drifts"])
def test_a_tenth_slower_is_found_in_90_of_100(kind):
    found = [simulated(kind, 1.1, seed) for seed in range(RUNS)]
    assert sum(any(number.shown for number in numbers) for numbers in found) >= 90
    assert not any(number.shown and number.better == "B" for numbers in found for number in numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_the_intervals_hold_the_true_ratio_as_often_as_they_say(kind):
    """Each of four intervals may miss in 0.5 % of the runs: of 400, 2 are expected."""
    truth = {"throughput": 1 / 1.1, "mean latency": 1.1, "p50 latency": 1.1, "p99 latency": 1.1**1.5}
    misses = sum(
        not number.interval.low <= truth[number.name] <= number.interval.high
        for seed in range(RUNS)
        for number in simulated(kind, 1.1, seed)
    )
    assert misses <= 12


def test_only_numbers_that_every_block_has_are_compared():
    sides = [{"throughput": 1.0 + 0.01 * n, "inferences per joule": 2.0} for n in range(8)]
    lacking = [{"throughput": 1.0 + 0.01 * n} for n in range(8)]
    numbers, ratios = compared_numbers(sides, lacking, (sides[0], lacking[0]), lower_is_better=LOWER_IS_BETTER)
    assert [number.name for number in numbers] == ["throughput"]
    assert ratios["throughput"] == (1.0,) * 8
    assert verdict_of(numbers).startswith("no difference shown")


def test_the_verdict_names_what_differs():
    text = verdict_of(simulated("quiet", 1.1, 0))
    assert text.startswith("throughput of B is 0.9")
    assert "; p50 latency of B is 1.0" in text
