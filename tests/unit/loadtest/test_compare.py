from __future__ import annotations

import numpy as np
import pytest

from repo_manager.errors import UsageError
from repo_manager.loadtest.compare import ComparePlan, compare
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.stats.resampling import ratio_interval


def noise(kind, rng, size):
    if kind == "normal":
        return rng.normal(0, 0.1, size)
    if kind == "skewed":
        return rng.exponential(0.1, size) - rng.exponential(0.1, size) * (rng.random(size) < 0.5) - 0.05
    return rng.standard_t(3, size) * 0.05


@pytest.mark.parametrize("kind", ["normal", "skewed", "heavy tails"])
def test_the_interval_misses_about_as_often_as_it_says(kind):
    """Four compared numbers at 2 % together: alpha 0.5 % each. 400 runs: at most 12 misses of the 2 expected."""
    rng = np.random.default_rng(0)
    misses = 0
    for run in range(400):
        interval = ratio_interval(noise(kind, rng, 30), alpha=0.005, seed=run)
        misses += not interval.low <= 1 <= interval.high
    assert misses <= 12


def test_a_tenth_slower_is_found_through_noise():
    rng = np.random.default_rng(1)
    found = sum(
        ratio_interval(np.log(1.1) + noise("normal", rng, 30), alpha=0.005, seed=run).low > 1 for run in range(100)
    )
    assert found >= 90


def test_no_noise_at_all():
    interval = ratio_interval(np.full(10, np.log(2.0)), alpha=0.01)
    assert (interval.low, interval.high) == (pytest.approx(2), pytest.approx(2))


def test_what_cannot_be_compared():
    with pytest.raises(UsageError):
        ComparePlan(pairs=5)
    options = LoadTestOptions("grpc://127.0.0.1:9", "m", concurrency=(1,), client="perf_analyzer")
    with pytest.raises(UsageError, match="interleaved"):
        compare(options, options)
    options = LoadTestOptions("grpc://127.0.0.1:9", "m", until_saturation=True)
    with pytest.raises(UsageError, match="one concurrency"):
        compare(options, options)
