"""The intervals for repeated looks: their promises checked by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_manager.stats.intervals import Interval, share_bounds, spent
from repo_manager.stats.resampling import bootstrap_bounds

ALPHA = 0.05


def test_nothing_seen_says_nothing() -> None:
    assert share_bounds(0, 0, ALPHA) == Interval(0.0, 1.0)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_the_share_that_was_seen_is_inside(total: int, share: float) -> None:
    hits = round(total * share)
    bounds = share_bounds(hits, total, ALPHA)
    assert 0.0 <= bounds.low <= hits / total <= bounds.high <= 1.0
    if hits == 0:
        assert bounds.low == 0.0
    if hits == total:
        assert bounds.high == 1.0


@pytest.mark.parametrize(("hits", "total"), [(0, 100), (3, 100), (50, 100), (99, 100)])
def test_the_ends_are_where_the_mixture_is_twenty_times_as_likely(hits: int, total: int) -> None:
    """The defining equation, by numerical integration of the mixture over a fine grid."""
    shares = (np.arange(200_000) + 0.5) / 200_000
    likelihood = shares**hits * (1 - shares) ** (total - hits)
    prior = 1 / (np.pi * np.sqrt(shares * (1 - shares)))
    mixture = float((likelihood * prior).mean())
    for end in (share_bounds(hits, total, ALPHA).low, share_bounds(hits, total, ALPHA).high):
        if 0 < end < 1:
            assert end**hits * (1 - end) ** (total - hits) == pytest.approx(mixture * ALPHA, rel=1e-2)


def test_more_of_the_same_narrows() -> None:
    widths = [bounds.high - bounds.low for bounds in (share_bounds(n // 50, n, ALPHA) for n in (50, 500, 5000, 50000))]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_looking_after_every_request_is_seldom_wrong(share: float) -> None:
    """Wilson's or any fixed interval would leave the true share out in far more than 5 % of such walks."""
    random, walks, wrong = np.random.default_rng(7), 120, 0
    for _ in range(walks):
        hits = np.cumsum(random.random(600) < share)
        looks = (share_bounds(int(hits[n - 1]), n, ALPHA) for n in range(1, 601, 12))
        wrong += any(not bounds.low <= share <= bounds.high for bounds in looks)
    assert wrong / walks <= ALPHA + 0.02


def test_the_looks_share_alpha() -> None:
    assert sum(spent(ALPHA, look) for look in range(1, 100_000)) == pytest.approx(ALPHA, rel=1e-4)


def test_the_bootstrap_covers_the_mean() -> None:
    random, wrong = np.random.default_rng(5), 0
    for seed in range(100):
        rows = random.exponential(2.0, (400, 1))
        bounds = bootstrap_bounds(rows, lambda sample: float(sample.mean()), ALPHA, seed=seed)
        wrong += not bounds.low <= 2.0 <= bounds.high
    assert wrong <= 12


def test_the_bootstrap_keeps_neighbours_together() -> None:
    """A slow drift makes neighbours alike: resampling single rows would give a far too narrow interval."""
    walk = np.cumsum(np.random.default_rng(3).standard_normal(4000))[:, None]
    apart = np.random.default_rng(4).permutation(walk)
    wide, narrow = (bootstrap_bounds(rows, lambda sample: float(sample.mean()), ALPHA) for rows in (walk, apart))
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_a_later_look_is_wider() -> None:
    rows = np.random.default_rng(1).standard_normal((200, 1))
    first, tenth = (bootstrap_bounds(rows, lambda s: float(s.mean()), spent(ALPHA, look)) for look in (1, 10))
    assert tenth.low < first.low < first.high < tenth.high
