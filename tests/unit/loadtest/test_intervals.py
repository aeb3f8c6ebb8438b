from __future__ import annotations

import numpy as np
import pytest

from repo_manager.loadtest.derive import intervals_of
from repo_manager.loadtest.worker.recorder import Slice
from repo_manager.stats.histogram import Histogram
from repo_manager.stats.resampling import block_weights


def slices(rng, count=40, requests=200, drift=0.0):
    made = []
    for index in range(count):
        factor = 1 + drift * rng.standard_normal()
        values = rng.lognormal(0, 0.5, requests) * 1e6 * factor
        made.append(Slice(index, 100_000_000, Histogram.of(values.astype(np.int64))))
    return made


def test_weights_draw_every_slice_equally_often():
    weights = block_weights(30, 4000, 0)
    assert (weights.sum(axis=1) == 30).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(30), abs=0.1)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Lognormal latencies, 100 runs of 40 slices: at most 14 of the 5 expected misses."""
    truth = {"mean_ns": 1e6 * np.exp(0.125), "p50_ns": 1e6, "p99_ns": 1e6 * np.exp(0.5 * 2.326)}
    misses = dict.fromkeys(truth, 0)
    for seed in range(100):
        found = intervals_of(slices(np.random.default_rng(seed)), batch_size=1, seed=seed)
        for name, value in truth.items():
            interval = getattr(found, name)
            misses[name] += not interval.low * 0.999 <= value <= interval.high * 1.001
    assert max(misses.values()) <= 14, misses


def test_a_drifting_server_has_wider_intervals():
    steady = intervals_of(slices(np.random.default_rng(0)), batch_size=1)
    drifting = intervals_of(slices(np.random.default_rng(0), drift=0.2), batch_size=1)
    assert drifting.mean_ns.high - drifting.mean_ns.low > 3 * (steady.mean_ns.high - steady.mean_ns.low)


def test_throughput_counts_batches():
    found = intervals_of(slices(np.random.default_rng(0)), batch_size=4)
    assert (found.throughput_per_s.low, found.throughput_per_s.high) == (pytest.approx(8000), pytest.approx(8000))


def test_too_little_data_has_no_interval():
    assert intervals_of(slices(np.random.default_rng(0), count=5), batch_size=1).p99_ns is None
    empty = [Slice(index, 100_000_000, Histogram.empty()) for index in range(20)]
    assert intervals_of(empty, batch_size=1).mean_ns is None


def test_many_slices_are_grouped():
    found = intervals_of(slices(np.random.default_rng(0), count=1000, requests=20), batch_size=1)
    assert found.p50_ns.low < 1e6 < found.p50_ns.high
