from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_manager.errors import InputError
from repo_manager.stats.histogram import Histogram, bins_of, values_of

VALUES = st.lists(st.integers(0, 10**13), min_size=1, max_size=200)


@given(VALUES)
def test_a_bins_middle_is_within_one_part_in_2048(values):
    middles = values_of(bins_of(values))
    assert all(abs(int(middle) - value) * 2048 <= max(value, 1) for middle, value in zip(middles, values, strict=True))


@given(st.integers(0, 10**13), st.integers(0, 10**13))
def test_bins_keep_the_order(first, second):
    low, high = sorted((first, second))
    assert bins_of([low])[0] <= bins_of([high])[0]


@given(st.lists(VALUES, min_size=1, max_size=5))
def test_merging_equals_counting_everything_at_once(parts):
    merged = Histogram.merge(Histogram.of(part) for part in parts)
    whole = Histogram.of([value for part in parts for value in part])
    assert merged.bins.tolist() == whole.bins.tolist()
    assert merged.counts.tolist() == whole.counts.tolist()
    assert (merged.total_ns, merged.min_ns, merged.max_ns) == (whole.total_ns, whole.min_ns, whole.max_ns)


@given(VALUES, st.floats(0, 1))
def test_quantiles_are_those_of_the_sorted_values(values, quantile):
    exact = sorted(values)[max(int(np.ceil(quantile * len(values) - 1e-9)), 1) - 1]
    found = Histogram.of(values).quantile_ns(quantile)
    assert abs(found - exact) * 1024 <= max(exact, 1)


def test_mean_and_deviation_are_exact():
    histogram = Histogram.of([0, 10, 20, 30])
    assert histogram.mean_ns == 15
    assert histogram.std_ns == pytest.approx(np.std([0, 10, 20, 30]))
    assert histogram.count == 4


def test_nothing_has_no_numbers():
    empty = Histogram.merge([])
    assert (empty.count, empty.mean_ns, empty.std_ns, empty.quantile_ns(0.5), empty.share_above(1)) == (
        0,
        None,
        None,
        None,
        None,
    )


def test_share_above_a_limit():
    histogram = Histogram.of([1_000_000] * 90 + [5_000_000] * 10)
    assert histogram.share_above(2_000_000) == pytest.approx(0.1)
    assert histogram.share_above(9_000_000) == 0


def test_json_restores_it():
    histogram = Histogram.of([0, 5, 12_345_678, 12_345_679])
    restored = Histogram.from_json(json.loads(json.dumps(histogram.to_json())))
    assert restored.to_json() == histogram.to_json()
    assert restored.quantile_ns(1.0) == 12_345_679


@pytest.mark.parametrize("change", [{"sub_buckets": 512}, {"bins": "x"}, {"total_ns": None}])
def test_damaged_json_is_refused(change):
    with pytest.raises(InputError):
        Histogram.from_json({**Histogram.of([1]).to_json(), **change})
